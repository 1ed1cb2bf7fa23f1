// RMS normalisation of one row.

#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace {

// to = residual + weight * from / sqrt(mean(from^2) + epsilon); `residual` may be null, and `to` may be either of them.
inline void normalise(const float *from, int64_t width, const float *weight, float epsilon, const float *residual, float *to) {
    F squares[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= width; i += 4 * W) {
        for (int n = 0; n < 4; ++n) squares[n] += load(from + i + n * W) * load(from + i + n * W);
    }
    float sum = reduce_add(squares[0] + squares[1] + squares[2] + squares[3]);
    for (; i < width; ++i) sum += from[i] * from[i];
    const float scale = 1 / std::sqrt(sum / width + epsilon);
    if (residual) {
#pragma omp simd
        for (i = 0; i < width; ++i) to[i] = residual[i] + weight[i] * (from[i] * scale);
    } else {
#pragma omp simd
        for (i = 0; i < width; ++i) to[i] = weight[i] * (from[i] * scale);
    }
}

}  // namespace
