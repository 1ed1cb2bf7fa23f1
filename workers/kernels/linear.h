// Packed linear layers as `linear.cpp` takes them.

#pragma once

#include <cstdint>

extern "C" {

struct Adapters;
struct Runs;

enum Gate : int64_t { NONE, SILU, GELU_TANH };

// Panels are padded with zeros. In a gated layer the first W columns of a panel are gates and the others what they let
// through: the output is silu(gate) * up, or gelu(gate) * up. `adapters`: null where it has none.
struct Linear {
    const char *weight;
    const float *scale, *bias;
    const Adapters *adapters;
    int64_t in, out, format;
    Gate gate;
};

// Memory that is read right after a product: `count` blocks of `bytes`, by their numbers from `base` on.
struct Upcoming {
    const char *base;
    const int32_t *blocks;
    int64_t count, bytes;

    Upcoming part(int64_t first, int64_t size) const { return {base, blocks + first, size, bytes}; }
};

// x: [rows, in]; y, and `residual`, which is added to the product and may be y itself, or null: [rows, out]; all dense.
// `runs`: of as many rows, or null where no row has an adapter. `upcoming`: fetched where memory has little else to do; or null.
void linear(const Linear *linear, const float *x, int64_t rows, const float *residual, float *y, const Runs *runs,
            const Upcoming *upcoming, int64_t threads);

// y = residual + weight * x / sqrt(mean(x^2) + epsilon) for each of `rows` rows of x; `residual` may be null, and y be either.
void rms_norm(const float *x, int64_t rows, int64_t width, const float *weight, float epsilon, const float *residual, float *y,
              int64_t threads);
}
