// Causal attention over a paged KV cache, as `paged_attention.cpp` takes it.

#pragma once

#include <cstdint>

extern "C" {

// `block_bytes`: of a block's keys and values together.
struct Layer {
    void *cache;
    int64_t query_heads, kv_heads, key_dim, value_dim, block_size, block_bytes;
};

struct Batch {
    const int32_t *query_start, *context_len, *block_table;
    const int64_t *cache_slots;
    int64_t rows, tokens, max_blocks;
};

// Strides are in floats; the last dimension of query, key and value is dense, the output is dense altogether.
struct Call {
    const float *query, *key, *value;
    float *output;
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
    const float *sinks;      // [query_heads] or null
    int64_t sliding_window;  // keys visible to a query, itself included; 0 is all
    float scaling, softcap;  // softcap 0 is none
    int64_t threads;
};

void paged_attention(const Layer *layer, const Batch *batch, const Call *call);
}
