// One decoder layer over a ragged batch, for the many models whose layers are
//
//     h = x + output(attention(rotary(qkv(norm(x)))))
//     y = h + down(gate_up(norm(h)))
//
// It calls the other files' kernels, by address, in the order in which the layer's own modules would: the same bits, and
// nothing between two kernels but the way back from a function.

#include <cstdint>

#include "linear.h"
#include "paged_attention.h"
#include "rotary.h"

extern "C" {

struct Kernels {
    decltype(rms_norm) *norm;
    decltype(linear) *multiply;
    decltype(rotary) *rotate;
    decltype(paged_attention) *attend;
};

struct Norm {
    const float *weight;
    float epsilon;
};

// `heads` are those that are turned: of queries and keys. `attention`: all but the addresses that a step brings.
struct DecoderLayer {
    const Linear *qkv, *output, *gate_up, *down;
    Norm before_attention, before_mlp;
    int64_t heads, head_dim;
    Call attention;
};

// cos, sin: [tokens, head_dim]. `scratch` has room for `scratch_width` floats of each token.
struct Step {
    int64_t tokens;
    const float *cos, *sin;
    const Runs *runs;
    const Layer *cache;
    const Batch *batch;
    float *scratch;
    int64_t threads;
};

int64_t scratch_width(const DecoderLayer *layer) {
    const int64_t attention = layer->qkv->out + layer->output->in, mlp = layer->down->in;
    return layer->qkv->in + (attention > mlp ? attention : mlp);
}

// x, y: [tokens, width], dense.
void decoder_layer(const DecoderLayer *layer, const Kernels *kernels, const Step *step, const float *x, float *y) {
    const int64_t tokens = step->tokens, width = layer->qkv->in, threads = step->threads;
    float *normed = step->scratch, *qkv = normed + tokens * width, *attended = qkv + tokens * layer->qkv->out;
    const auto norm = [&](const float *from, const Norm &by) {
        kernels->norm(from, tokens, width, by.weight, by.epsilon, normed, threads);
    };
    const auto multiply = [&](const Linear *by, const float *from, const float *residual, float *to) {
        kernels->multiply(by, from, tokens, residual, to, step->runs, threads);
    };

    norm(x, layer->before_attention);
    multiply(layer->qkv, normed, nullptr, qkv);
    kernels->rotate(qkv, tokens, layer->qkv->out, layer->heads, layer->head_dim, step->cos, step->sin, threads);
    Call call = layer->attention;
    call.query = qkv;
    call.key = qkv + step->cache->query_heads * layer->head_dim;
    call.value = call.key + step->cache->kv_heads * layer->head_dim;
    call.output = attended;
    call.threads = threads;
    kernels->attend(step->cache, step->batch, &call);
    multiply(layer->output, attended, x, y);

    // Queries, keys and values are done with.
    float *inner = qkv;
    norm(y, layer->before_mlp);
    multiply(layer->gate_up, normed, nullptr, inner);
    multiply(layer->down, inner, y, y);
}
}
