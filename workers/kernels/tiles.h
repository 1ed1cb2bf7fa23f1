// How rows and columns are cut into what fits registers and caches.

#pragma once

#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace {

constexpr int COLUMNS = 2 * W;      // of a panel
constexpr int CHUNK_ROWS = 128;     // rows of x that stay in L2 while the panels go by
constexpr int AHEAD = 2048;         // bytes: weights come from memory, where a page's end stops the hardware's prefetch
constexpr int64_t ALONE = 1 << 18;  // multiply-adds that aren't worth waking other threads for

// So many rows x 2 sums, 2 vectors of weights and one x in the 16 registers of AVX2. AVX-512 has registers for 12, but not x86
// for the addresses of so many rows: 8 are as fast in arithmetic and leave one to fetch with.
constexpr int WIDE_ROWS = NATIVE == 16 ? 8 : 6;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Part `index` of `count` as equal ones as can be: with AVX2 a tile of 4 rows runs at full speed, 6 and then 2 don't.
struct Part {
    int64_t begin, size;
    Part(int64_t whole, int64_t count, int64_t index)
        : begin(whole * index / count), size(whole * (index + 1) / count - begin) {}
};

// Calls f with a number of rows, 1 to MOST, as a constant.
template <int MOST, class Function>
void with_rows(int64_t rows, const Function &f) {
    if (rows == MOST) {
        f(std::integral_constant<int, MOST>{});
    } else if constexpr (MOST > 1) {
        with_rows<MOST - 1>(rows, f);
    }
}

}  // namespace
