// Rotary position embeddings in place, in transformers' layout: dimension i turns with dimension i + dim / 2. In many models
// heads are normalised before (RMS, over each head).

#pragma once

#include <cstdint>

extern "C" {

// Heads that lie side by side. `weight`: [dim], of their norm; null where they have none.
struct Heads {
    int64_t count;
    const float *weight;
    float epsilon;
};

// x: [tokens, stride], dense; of each token the queries' heads are turned, and the keys' behind them. cos, sin: [tokens, dim].
void rotary(float *x, int64_t tokens, int64_t stride, const Heads *queries, const Heads *keys, int64_t dim, const float *cos,
            const float *sin, int64_t threads);
}
