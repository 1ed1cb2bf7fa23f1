#include "rotary.h"

#include "norm.h"

namespace {

constexpr int64_t ALONE = 1 << 15;  // floats that aren't worth waking other threads for

void turn(float *low, int64_t half, const float *cos, const float *sin) {
    float *high = low + half;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        const float a = low[i], b = high[i];
        low[i] = a * cos[i] - b * sin[i];
        high[i] = b * cos[i + half] + a * sin[i + half];
    }
}

}  // namespace

extern "C" void rotary(float *x, int64_t tokens, int64_t stride, const Heads *queries, const Heads *keys, int64_t dim,
                       const float *cos, const float *sin, int64_t threads) {
    if (tokens * (queries->count + keys->count) * dim <= ALONE) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
        float *head = x + t * stride;
        for (const Heads *heads : {queries, keys})
            for (int64_t h = 0; h < heads->count; ++h, head += dim) {
                if (heads->weight) normalise(head, dim, heads->weight, heads->epsilon, nullptr, head);
                turn(head, dim / 2, cos + t * dim, sin + t * dim);
            }
    }
}
