// Rows of x rounded to 8 bits, and their products with weights of 8 bits.
//
// GROUP inputs (k) of a row share a scale. Within a group sums are whole numbers, so they are exact whatever the CPU adds
// up at once, and only they are scaled and added up in float32: what comes of it doesn't depend on the CPU.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "simd.h"

namespace {

constexpr int GROUP = 64;
constexpr int QUAD = 4;             // k of a column that share a word, from its low byte up
constexpr int QUADS = GROUP / QUAD;
constexpr int ZERO = 128;           // is added to weights, so that they are unsigned
constexpr int64_t FEW = 1 << 12;    // inputs that aren't worth waking other threads for
constexpr int SPARE_ROWS = 15;      // after the last one, which those who take several rows at once may read
constexpr float MOST = 127;         // what the largest input of a group becomes
constexpr float LEAST = 1e-30f;     // or what it counts as: the inverse of a scale must be finite

// add_products: sum += x * weights for R rows of x that lie `stride` apart, one quad and two vectors of columns. Where pairs are
// multiplied, x holds of each quad the even k before the odd ones.

#if defined(__AVX512VNNI__)

typedef int8_t Rounded;
constexpr bool EVEN_FIRST = false;

template <int R>
void add_products(const Rounded *x, int64_t stride, const U (&weights)[2], I (&sum)[R][2]) {
    for (int r = 0; r < R; ++r) {
        int32_t quad;
        std::memcpy(&quad, x + r * stride, sizeof quad);
        for (int i = 0; i < 2; ++i) {
            sum[r][i] = (I)_mm512_dpbusd_epi32((__m512i)sum[r][i], (__m512i)weights[i], _mm512_set1_epi32(quad));
        }
    }
}

#elif defined(__AVX2__)

typedef int16_t Rounded;
constexpr bool EVEN_FIRST = true;

#ifdef __AVX512BW__
inline I multiply_pairs(I a, I b) { return (I)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#else
inline I multiply_pairs(I a, I b) { return (I)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#endif

template <int R>
void add_products(const Rounded *x, int64_t stride, const U (&weights)[2], I (&sum)[R][2]) {
    for (int s = 0; s < 2; ++s) {
        I columns[2];
        for (int i = 0; i < 2; ++i) columns[i] = (I)(weights[i] >> (8 * s) & 0x00ff00ffu);
        for (int r = 0; r < R; ++r) {
            int32_t pair;
            std::memcpy(&pair, x + r * stride + 2 * s, sizeof pair);
            for (int i = 0; i < 2; ++i) sum[r][i] += multiply_pairs(columns[i], I{} + pair);
        }
    }
}

#else

typedef int8_t Rounded;
constexpr bool EVEN_FIRST = false;

template <int R>
void add_products(const Rounded *x, int64_t stride, const U (&weights)[2], I (&sum)[R][2]) {
    for (int s = 0; s < QUAD; ++s) {
        I columns[2];
        for (int i = 0; i < 2; ++i) columns[i] = (I)(weights[i] >> (8 * s) & 0xff);
        for (int r = 0; r < R; ++r) {
            for (int i = 0; i < 2; ++i) sum[r][i] += int32_t{x[r * stride + s]} * columns[i];
        }
    }
}

#endif

// x: [rows][quads of k], `scale` and `start`: [groups][rows].
struct RoundedRows {
    const Rounded *x;
    const float *scale;
    const int32_t *start;  // what sums begin with, because of ZERO
    int64_t pieces, groups, rows;

    RoundedRows from(int64_t row) const { return {x + row * pieces * QUAD, scale + row, start + row, pieces, groups, rows}; }
};

// Inputs of one group, which may be the last of a row and smaller: whole quads at `to` are zeros.
inline void round_group(const float *x, int64_t size, Rounded *to, float &scale, int32_t &start) {
    // Compared as integers: then a NaN is the largest, and the scale.
    int32_t largest = 0;
    for (int64_t k = 0; k < size; ++k) {
        int32_t bits;
        std::memcpy(&bits, x + k, sizeof bits);
        largest = std::max(largest, bits & 0x7fffffff);
    }
    float peak;
    std::memcpy(&peak, &largest, sizeof peak);
    peak = std::max(peak, LEAST);
    const float inverse = MOST / peak;
    int32_t sum = 0;
    for (int64_t k = 0; k < size; ++k) {
        const auto nearest = static_cast<int32_t>(__builtin_rintf(x[k] * inverse));
        to[k] = static_cast<Rounded>(nearest);
        sum += nearest;
    }
    for (int64_t k = 0; EVEN_FIRST && k < size; k += QUAD) std::swap(to[k + 1], to[k + 2]);
    scale = peak / MOST;
    start = -ZERO * sum;
}

// Valid until this thread's next call.
inline RoundedRows round_rows(const float *x, int64_t rows, int64_t in, int64_t threads) {
    const int64_t quads = (in + QUAD - 1) / QUAD, groups = (quads + QUADS - 1) / QUADS;
    static thread_local std::vector<Rounded> rounded;
    static thread_local std::vector<float> scales;
    static thread_local std::vector<int32_t> starts;
    if (rows * in <= FEW) threads = 1;
    rounded.resize((rows + SPARE_ROWS) * quads * QUAD);
    scales.resize(rows * groups);
    starts.resize(rows * groups);
    // By their names each thread would find its own.
    Rounded *to = rounded.data();
    float *scale = scales.data();
    int32_t *start = starts.data();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        Rounded *row = to + r * quads * QUAD;
        std::fill_n(row + (quads - 1) * QUAD, QUAD, Rounded{});
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t k = g * GROUP, size = std::min<int64_t>(GROUP, in - k);
            round_group(x + r * in + k, size, row + k, scale[g * rows + r], start[g * rows + r]);
        }
    }
    return {to, scale, start, quads, groups, rows};
}

}  // namespace
