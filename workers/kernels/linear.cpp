// y = scale * (x W^T) + bias for float32 x and y, and a weight that lies in panels of 2 W columns (output features): a panel
// holds, for each k (input feature) in turn, the weights of all its columns.
//
// A tile is a few rows of x times one panel. It stays in registers from the first k to the last, so every output is one
// chain of fused multiply-adds over k: the same bits whoever shares the batch, whatever tile a row falls into and whichever
// thread computes it.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

extern "C" {

// Columns in all are `out` rounded up to whole panels, padded with zeros.
struct Linear {
    const char *weight;
    const float *scale, *bias;
    int64_t in, out, format;
};
}

namespace {

constexpr int COLUMNS = 2 * W;      // of a panel
constexpr int TILE_ROWS = 6;        // 6 x 2 sums, 2 vectors of weights and one x: the 16 registers of AVX2
constexpr int CHUNK_ROWS = 132;     // rows of x that stay in L2 while the panels go by
constexpr int AHEAD = 2048;         // bytes: a panel's first pass reads memory, where a page's end stops the hardware's prefetch
constexpr int64_t ALONE = 1 << 18;  // multiply-adds that aren't worth waking other threads for

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

typedef U Words __attribute__((aligned(4), may_alias));

// A format packs STEPS k of a panel into one piece of BYTES, and unpacks it into two vectors of weights for each k.

struct Float32 {
    static constexpr int STEPS = 1, BYTES = COLUMNS * 4;
    static void unpack(const char *p, F (&b)[STEPS][2]) {
        for (int i = 0; i < 2; ++i) b[0][i] = load(reinterpret_cast<const float *>(p) + i * W);
    }
};

// Word j holds column j in its low half and j + W in its high half; a bfloat16 is the high half of a float.
struct Bfloat16 {
    static constexpr int STEPS = 1, BYTES = COLUMNS * 2;
    static void unpack(const char *p, F (&b)[STEPS][2]) {
        const U word = *reinterpret_cast<const Words *>(p);
        b[0][0] = (F)(word << 16);
        b[0][1] = (F)(word & 0xffff0000u);
    }
};

// Word j holds, from its low byte up, columns j and j + W of one k, then of the next.
struct Int8 {
    static constexpr int STEPS = 2, BYTES = COLUMNS * 2;
    static void unpack(const char *p, F (&b)[STEPS][2]) {
        const U word = *reinterpret_cast<const Words *>(p);
        for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = __builtin_convertvector((I)(word << (24 - 8 * i)) >> 24, F);
    }
};

// R rows of x times one panel, into `column` and on of y.
template <class Format, int R, bool COLD>
void tile(const Linear &linear, const float *x, const char *panel, int64_t column, float *y) {
    F sum[R][2] = {};
    for (int64_t k = 0; k < linear.in; k += Format::STEPS, panel += Format::BYTES) {
        F b[Format::STEPS][2];
        Format::unpack(panel, b);
        if (COLD) __builtin_prefetch(panel + AHEAD);
        for (int s = 0; s < Format::STEPS; ++s) {
            for (int r = 0; r < R; ++r) {
                const float a = x[r * linear.in + k + s];
                for (int i = 0; i < 2; ++i) sum[r][i] += a * b[s][i];
            }
        }
    }
    const int64_t room = std::min<int64_t>(COLUMNS, linear.out - column);
    for (int r = 0; r < R; ++r) {
        float last[COLUMNS], *row = y + r * linear.out + column, *to = room < COLUMNS ? last : row;
        for (int i = 0; i < 2; ++i) {
            const int64_t at = column + i * W;
            store(to + i * W, sum[r][i] * load(linear.scale + at) + load(linear.bias + at));
        }
        if (room < COLUMNS) std::memcpy(row, last, room * sizeof(float));
    }
}

template <class Format, bool COLD, int R = TILE_ROWS>
void tile_of(int64_t rows, const Linear &linear, const float *x, const char *panel, int64_t column, float *y) {
    if (rows == R) {
        tile<Format, R, COLD>(linear, x, panel, column, y);
    } else if constexpr (R > 1) {
        tile_of<Format, COLD, R - 1>(rows, linear, x, panel, column, y);
    }
}

// Part `index` of `count` as equal ones as can be: a tile of 4 rows runs at full speed, 6 and then 2 don't.
struct Part {
    int64_t begin, size;
    Part(int64_t whole, int64_t count, int64_t index)
        : begin(whole * index / count), size(whole * (index + 1) / count - begin) {}
};

template <class Format>
void multiply(const Linear &linear, const float *x, int64_t rows, float *y, int64_t threads) {
    if (rows * linear.in * linear.out <= ALONE) threads = 1;
    const int64_t panels = ceil_div(linear.out, COLUMNS), panel_bytes = linear.in / Format::STEPS * Format::BYTES;
    const int64_t chunks = ceil_div(rows, CHUNK_ROWS);
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t c = 0; c < chunks; ++c) {
        for (int64_t p = 0; p < panels; ++p) {
            const Part chunk(rows, chunks, c);
            const int64_t tiles = ceil_div(chunk.size, TILE_ROWS);
            for (int64_t t = 0; t < tiles; ++t) {
                const Part part(chunk.size, tiles, t);
                const int64_t row = chunk.begin + part.begin;
                const auto run = t ? tile_of<Format, false> : tile_of<Format, true>;
                run(part.size, linear, x + row * linear.in, linear.weight + p * panel_bytes, p * COLUMNS,
                    y + row * linear.out);
            }
        }
    }
}
}

extern "C" int64_t panel_columns() { return COLUMNS; }

// x: [rows, in], y: [rows, out], dense.
extern "C" void linear(const Linear *linear, const float *x, int64_t rows, float *y, int64_t threads) {
    constexpr void (*FORMATS[])(const Linear &, const float *, int64_t, float *, int64_t) = {
        multiply<Float32>, multiply<Bfloat16>, multiply<Int8>};
    FORMATS[linear->format](*linear, x, rows, y, threads);
}
