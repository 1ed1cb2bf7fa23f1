#include "rotary.h"

namespace {

constexpr int64_t ALONE = 1 << 15;  // floats that aren't worth waking other threads for

}

extern "C" void rotary(float *x, int64_t tokens, int64_t stride, int64_t heads, int64_t dim, const float *cos,
                       const float *sin, int64_t threads) {
    const int64_t half = dim / 2;
    if (tokens * heads * dim <= ALONE) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
        const float *c = cos + t * dim, *s = sin + t * dim;
        for (int64_t h = 0; h < heads; ++h) {
            float *low = x + t * stride + h * dim, *high = low + half;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const float a = low[i], b = high[i];
                low[i] = a * c[i] - b * s[i];
                high[i] = b * c[i + half] + a * s[i + half];
            }
        }
    }
}
