// y = scale * (x W^T) + bias for float32 x and y, and a weight that lies in panels of 2 W columns (output features): a panel
// holds, for each k (input feature) in turn, the weights of all its columns.
//
// A tile is a few rows of x times one panel. It stays in registers from the first k to the last, so every output is one
// chain of fused multiply-adds over k: the same bits whoever shares the batch, whatever tile a row falls into and whichever
// thread computes it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "simd.h"

extern "C" {

// Panels are padded with zeros. In a gated layer the first W columns of a panel are gates and the others what they let
// through: the output is silu(gate) * up.
struct Linear {
    const char *weight;
    const float *scale, *bias;
    int64_t in, out, format, gated;
};
}

namespace {

constexpr int COLUMNS = 2 * W;      // of a panel
// So many rows x 2 sums, 2 vectors of weights and one x in the 16 registers of AVX2. AVX-512 has registers for 12, but not x86
// for the addresses of so many rows: 8 are as fast in arithmetic and leave one to fetch with.
constexpr int TILE_ROWS = NATIVE == 16 ? 8 : 6;
constexpr int CHUNK_ROWS = 128;     // rows of x that stay in L2 while the panels go by
constexpr int AHEAD = 2048;         // bytes: panels come from memory, where a page's end stops the hardware's prefetch
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

    // Eight bits fit a bfloat16 exactly.
    static void widen(const char *p, int64_t in, char *wide) {
        for (int64_t k = 0; k < in; k += STEPS, p += BYTES) {
            F b[STEPS][2];
            unpack(p, b);
            __builtin_prefetch(p + AHEAD);
            for (int s = 0; s < STEPS; ++s, wide += Bfloat16::BYTES) {
                *reinterpret_cast<Words *>(wide) = (U)b[s][0] >> 16 | (U)b[s][1];
            }
        }
    }
};

// x / (1 + e^-x)
F silu(F x) {
    const F e = exp2(select(x < 0, x, -x) * LOG2E);
    return x * select(x < 0, e, splat(1)) / (1 + e);
}

// What a tile fetches while it multiplies: `step` bytes for each piece of its panel.
struct Ahead {
    const char *at;
    int64_t step;
};

// R rows of x times panel p, which lies at `panel`, into y.
template <class Format, int R>
void tile(const Linear &linear, const float *x, const char *panel, int64_t p, float *y, Ahead ahead) {
    F sum[R][2] = {};
    for (int64_t k = 0; k < linear.in; k += Format::STEPS, panel += Format::BYTES, ahead.at += ahead.step) {
        F b[Format::STEPS][2];
        Format::unpack(panel, b);
        __builtin_prefetch(ahead.at);
        for (int s = 0; s < Format::STEPS; ++s) {
            for (int r = 0; r < R; ++r) {
                const float a = x[r * linear.in + k + s];
                for (int i = 0; i < 2; ++i) sum[r][i] += a * b[s][i];
            }
        }
    }
    const int64_t width = linear.gated ? W : COLUMNS, column = p * width;
    const int64_t room = std::min(width, linear.out - column);
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < 2; ++i) {
            const int64_t at = p * COLUMNS + i * W;
            sum[r][i] = sum[r][i] * load(linear.scale + at) + load(linear.bias + at);
        }
        if (linear.gated) sum[r][0] = silu(sum[r][0]) * sum[r][1];
        float *to = y + r * linear.out + column;
        if (room < width) {
            std::memcpy(to, sum[r], room * sizeof(float));
        } else {
            for (int64_t i = 0; i * W < width; ++i) store(to + i * W, sum[r][i]);
        }
    }
}

template <class Format, int R = TILE_ROWS>
void tile_of(int64_t rows, const Linear &linear, const float *x, const char *panel, int64_t p, float *y, Ahead ahead) {
    if (rows == R) {
        tile<Format, R>(linear, x, panel, p, y, ahead);
    } else if constexpr (R > 1) {
        tile_of<Format, R - 1>(rows, linear, x, panel, p, y, ahead);
    }
}

// Part `index` of `count` as equal ones as can be: with AVX2 a tile of 4 rows runs at full speed, 6 and then 2 don't.
struct Part {
    int64_t begin, size;
    Part(int64_t whole, int64_t count, int64_t index)
        : begin(whole * index / count), size(whole * (index + 1) / count - begin) {}
};

// All of a chunk's rows times panel p, and the next panel fetched meanwhile, a share by each tile: memory and arithmetic
// are both busy all the time. Who comes to a panel that nobody has `fetched` fetches it just ahead of its first tile.
template <class Format>
void pass(const Linear &linear, const float *x, int64_t rows, const char *panel, int64_t p, float *y, bool fetched) {
    const int64_t tiles = ceil_div(rows, TILE_ROWS), pieces = linear.in / Format::STEPS;
    if constexpr (std::is_same_v<Format, Int8>) {
        if (tiles > 2) {
            static thread_local std::vector<char> wide;
            wide.resize(linear.in * Bfloat16::BYTES);
            Int8::widen(panel, linear.in, wide.data());
            return pass<Bfloat16>(linear, x, rows, wide.data(), p, y, true);
        }
    }
    const int64_t share = Format::BYTES / tiles;
    for (int64_t t = 0; t < tiles; ++t) {
        const Part part(rows, tiles, t);
        const bool in_time = tiles > 1 && (fetched || t);
        const Ahead ahead = in_time ? Ahead{panel + pieces * (Format::BYTES + t * share), share}
                                    : Ahead{panel + AHEAD, Format::BYTES};
        tile_of<Format>(part.size, linear, x + part.begin * linear.in, panel, p, y + part.begin * linear.out, ahead);
    }
}

template <class Format>
void multiply(const Linear &linear, const float *x, int64_t rows, float *y, int64_t threads) {
    if (rows * linear.in * linear.out <= ALONE) threads = 1;
    const int64_t panels = ceil_div(linear.out, linear.gated ? W : COLUMNS), chunks = ceil_div(rows, CHUNK_ROWS);
    const int64_t bytes = linear.in / Format::STEPS * Format::BYTES;
#pragma omp parallel num_threads(threads)
    {
        const char *next = nullptr;
#pragma omp for schedule(static) collapse(2)
        for (int64_t c = 0; c < chunks; ++c) {
            for (int64_t p = 0; p < panels; ++p) {
                const Part chunk(rows, chunks, c);
                const char *panel = linear.weight + p * bytes;
                pass<Format>(linear, x + chunk.begin * linear.in, chunk.size, panel, p, y + chunk.begin * linear.out,
                             panel == next);
                next = panel + bytes;
            }
        }
    }
}
}

extern "C" int64_t panel_columns() { return COLUMNS; }

// y = weight * x / sqrt(mean(x^2) + epsilon) for each of `rows` rows of x.
extern "C" void rms_norm(const float *x, int64_t rows, int64_t width, const float *weight, float epsilon, float *y,
                         int64_t threads) {
    if (rows * width <= ALONE / 8) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const float *from = x + r * width;
        float *to = y + r * width;
        F squares[4] = {};
        int64_t i = 0;
        for (; i + 4 * W <= width; i += 4 * W) {
            for (int n = 0; n < 4; ++n) squares[n] += load(from + i + n * W) * load(from + i + n * W);
        }
        float sum = reduce_add(squares[0] + squares[1] + squares[2] + squares[3]);
        for (; i < width; ++i) sum += from[i] * from[i];
        const float scale = 1 / std::sqrt(sum / width + epsilon);
        for (i = 0; i < width; ++i) to[i] = weight[i] * (from[i] * scale);
    }
}

// x: [rows, in], y: [rows, out], dense.
extern "C" void linear(const Linear *linear, const float *x, int64_t rows, float *y, int64_t threads) {
    constexpr void (*FORMATS[])(const Linear &, const float *, int64_t, float *, int64_t) = {
        multiply<Float32>, multiply<Bfloat16>, multiply<Int8>};
    FORMATS[linear->format](*linear, x, rows, y, threads);
}
