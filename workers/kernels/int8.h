// Products of rows rounded to 8 bits with weights of 8 bits.
//
// GROUP inputs (k) of a row share a scale. Within a group sums are whole numbers, exact in any order and whether they are
// held as integers or as floats; then they are scaled and added up over the groups in float32. So every CPU computes the
// same bits, those with AVX-512 VNNI four times as fast.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

#include "simd.h"

namespace {

constexpr int QUAD = 4;  // k of a column that share a word, from its low byte up
constexpr int GROUP = 64;
constexpr int QUADS = GROUP / QUAD;
constexpr int MAX = 127;
constexpr int ZERO = 128;  // Weights are stored with this added.
constexpr float SMALLEST = 1e-30f;  // so that the inverse of a scale is finite

typedef U Words __attribute__((aligned(4), may_alias));

#ifdef __AVX512VNNI__

typedef int8_t Rounded;
typedef int32_t Start;
typedef I Sums;

// sum += x * weights, for R rows of x, `stride` apart, QUAD k and two vectors of columns.
template <int R>
inline void multiply_add(const int8_t *x, int64_t stride, const U (&weights)[2], I (&sum)[R][2]) {
    for (int r = 0; r < R; ++r) {
        int32_t quad;
        std::memcpy(&quad, x + r * stride, QUAD);
        for (int i = 0; i < 2; ++i) {
            sum[r][i] = (I)_mm512_dpbusd_epi32((__m512i)sum[r][i], (__m512i)weights[i], _mm512_set1_epi32(quad));
        }
    }
}

#else

typedef float Rounded;
typedef float Start;
typedef F Sums;

template <int R>
inline void multiply_add(const float *x, int64_t stride, const U (&weights)[2], F (&sum)[R][2]) {
    for (int s = 0; s < QUAD; ++s) {
        F b[2];
        for (int i = 0; i < 2; ++i) b[i] = __builtin_convertvector((I)(weights[i] >> (8 * s) & 0xff), F);
        for (int r = 0; r < R; ++r) {
            for (int i = 0; i < 2; ++i) sum[r][i] += x[r * stride + s] * b[i];
        }
    }
}

#endif

// Rows of x, rounded. The rest of the last word is zeros.
class RoundedRows {
  public:
    RoundedRows(const float *x, int64_t rows, int64_t in, int64_t threads)
        : quads((in + QUAD - 1) / QUAD), groups((quads + QUADS - 1) / QUADS) {
        static thread_local std::vector<Rounded> all;
        static thread_local std::vector<float> scales;
        static thread_local std::vector<Start> starts;
        all.resize(rows * quads * QUAD);
        scales.resize(rows * groups);
        starts.resize(rows * groups);
        Rounded *to = all.data();
        float *scale = scales.data();
        Start *start = starts.data();
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            std::fill_n(to + (r + 1) * quads * QUAD - QUAD, QUAD, Rounded(0));
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t k = g * GROUP, size = std::min<int64_t>(GROUP, in - k), at = r * groups + g;
                round(x + r * in + k, size, to + r * quads * QUAD + k, scale[at], start[at]);
            }
        }
        this->x = to, this->scale = scale, this->start = start;
    }

    RoundedRows from(int64_t row) const {
        RoundedRows rows = *this;
        rows.x += row * quads * QUAD, rows.scale += row * groups, rows.start += row * groups;
        return rows;
    }

    const Rounded *x;
    const float *scale;
    const Start *start;  // what a group's sums begin with, because of ZERO
    int64_t quads, groups;

  private:
    static void round(const float *x, int64_t size, Rounded *to, float &scale, Start &start) {
        // As integers, because then a NaN is the greatest of all.
        int32_t greatest = 0;
        for (int64_t k = 0; k < size; ++k) {
            int32_t bits;
            std::memcpy(&bits, x + k, sizeof bits);
            greatest = std::max(greatest, bits & 0x7fffffff);
        }
        float most;
        std::memcpy(&most, &greatest, sizeof most);
        most = std::max(most, SMALLEST);
        const float inverse = MAX / most;
        int32_t sum = 0;
        for (int64_t k = 0; k < size; ++k) {
            const auto nearest = static_cast<int32_t>(__builtin_rintf(x[k] * inverse));
            to[k] = static_cast<Rounded>(nearest);
            sum += nearest;
        }
        scale = most / MAX;
        start = static_cast<Start>(-ZERO * sum);
    }
};

}  // namespace
