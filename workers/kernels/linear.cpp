// y = scale * (x W^T) + bias, and what adapters add to that (lora.h), for float32 x and y, and a weight that lies in panels of
// 2 W columns (output features): a panel holds, for each k (input feature) in turn, the weights of all its columns.
//
// A tile is a few rows of x times one panel. It stays in registers from the first k to the last, so every output is one
// chain of fused multiply-adds, over k or, where the weight has 8 bits and so has x, over groups of k: the same bits whoever
// shares the batch, whatever tile a row falls into and whichever thread computes it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>

#include "int8.h"
#include "int8_tiles.h"
#include "linear.h"
#include "lora.h"
#include "norm.h"
#include "simd.h"
#include "tiles.h"

namespace {

constexpr int64_t LINE = 64;  // bytes that are fetched together

typedef U Words __attribute__((aligned(4), may_alias));

// A format has BYTES for each piece of a panel, TILE_ROWS at most in a tile, and a Session of each thread while it multiplies.
// The piece of a wide one is all columns of one k, which it unpacks into two vectors.
struct Float32 {
    static constexpr int BYTES = COLUMNS * 4, TILE_ROWS = WIDE_ROWS;
    struct Session {};
    static void unpack(const char *p, F (&b)[2]) {
        for (int i = 0; i < 2; ++i) b[i] = load(reinterpret_cast<const float *>(p) + i * W);
    }
};

// Word j holds column j in its low half and j + W in its high half; a bfloat16 is the high half of a float.
struct Bfloat16 {
    static constexpr int BYTES = COLUMNS * 2, TILE_ROWS = WIDE_ROWS;
    struct Session {};
    static void unpack(const char *p, F (&b)[2]) {
        const U word = *reinterpret_cast<const Words *>(p);
        b[0] = (F)(word << 16);
        b[1] = (F)(word & 0xffff0000u);
    }
};

// A quad of k: a word for each of the first W columns, then for each of the others. Sums are held twice, of a group and of all.
struct Int8 {
    static constexpr int BYTES = COLUMNS * QUAD, TILE_ROWS = 4;
    struct Session {};
};

struct Rows {
    const float *x;
    int64_t pieces;
    Rows from(int64_t row) const { return {x + row * pieces, pieces}; }
};

// Rows of a product, and what is added to them where they are written, if anything is.
struct Output {
    float *y;
    const float *residual;
    int64_t width;

    Output from(int64_t row) const { return {y + row * width, residual ? residual + row * width : nullptr, width}; }

    // What `write` of so many rows would wait for, one row after the other.
    void fetch(int64_t rows, int64_t column, int64_t count) const {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < count; i += W) __builtin_prefetch(y + r * width + column + i, 1);
        }
    }

    // The first `count` numbers of two vectors.
    void write(int64_t row, int64_t column, int64_t count, const F (&sums)[2]) const {
        for (int64_t i = 0; i * W < count; ++i) {
            const int64_t at = row * width + column + i * W, left = count - i * W;
            if (left >= W) {
                store(y + at, residual ? load(residual + at) + sums[i] : sums[i]);
            } else {
                for (int64_t j = 0; j < left; ++j) y[at + j] = residual ? residual[at + j] + sums[i][j] : sums[i][j];
            }
        }
    }
};

// Weights are asked for twice. Once is slower where memory is what a product waits for (Zen 4: by 4 to 9%); three times isn't faster.
inline void fetch_weights(const char *p) {
    for (int i = 0; i < 2; ++i) __builtin_prefetch(p);
}

// What is fetched with each piece of a panel: the panel itself, where nobody has,
template <int BYTES>
struct Same {
    void fetch(const char *piece) {
        for (int i = 0; i < 2; ++i) fetch_weights(piece + AHEAD + i * BYTES / 2);
    }
};

// or a share of the next one,
struct Next {
    const char *at;
    int64_t step;

    void fetch(const char *) {
        fetch_weights(at);
        at += step;
    }
};

// or that and what is read after the product: into L2 only, where many more lines can be on their way.
struct NextAndUpcoming {
    Next next;
    const char *upcoming[2];
    int64_t step;

    void fetch(const char *piece) {
        next.fetch(piece);
        for (const char *&at : upcoming) {
            __builtin_prefetch(at, 0, 2);
            at += step;
        }
    }
};

// sum += x W^T for R rows of x and one panel.
//
// Every third row has an address of its own, and x86 finds the others by a stride and its double: one for each row, which is
// what the compiler would choose, are more than it has registers for.
template <class Format, int R, class Ahead>
void multiply_panel(const Rows &x, const char *panel, Ahead ahead, F (&sum)[R][2]) {
    static_assert(R <= 9);
    int64_t stride = x.pieces;
    const float *low = x.x, *middle = low + 3 * stride, *high = middle + 3 * stride;
    for (int64_t k = x.pieces; k; --k, panel += Format::BYTES) {
        F b[2];
        Format::unpack(panel, b);
        ahead.fetch(panel);
        asm("" : "+r"(low), "+r"(middle), "+r"(high), "+r"(stride));  // as if they could have changed
        for (int r = 0; r < R; ++r) {
            const float a = (r < 3 ? low : r < 6 ? middle : high)[r % 3 * stride];
            for (int i = 0; i < 2; ++i) sum[r][i] += a * b[i];
        }
        ++low, ++middle, ++high;
    }
}

template <class Format, int R, class Ahead>
void multiply_panel(const RoundedRows &x, const char *panel, Ahead ahead, F (&sum)[R][2]) {
    for (int64_t g = 0, quad = 0; g < x.groups; ++g) {
        I whole[R][2];
        for (int r = 0; r < R; ++r) {
            for (int i = 0; i < 2; ++i) whole[r][i] = I{} + x.start[g * x.rows + r];
        }
        for (const int64_t end = std::min(x.pieces, quad + QUADS); quad < end; ++quad, panel += Format::BYTES) {
            U weights[2];
            for (int i = 0; i < 2; ++i) weights[i] = reinterpret_cast<const Words *>(panel)[i];
            ahead.fetch(panel);
            add_products(x.x + quad * QUAD, x.pieces * QUAD, weights, whole);
        }
        for (int r = 0; r < R; ++r) {
            const float scale = x.scale[g * x.rows + r];
            for (int i = 0; i < 2; ++i) sum[r][i] += scale * __builtin_convertvector(whole[r][i], F);
        }
    }
}

// x / (1 + e^-z), where z is x for SiLU, and for the GELU that is made with tanh twice what that is of.
F through(F x, Gate gate) {
    const F z = gate == GELU_TANH ? x * (1.5957691216f + 0.0713548163f * x * x) : x;
    const F e = exp2(select(z < 0, z, -z) * LOG2E);
    return x * select(z < 0, e, splat(1)) / (1 + e);
}

// R rows of x times panel p, which lies at `panel`, and what is `added` [R][COLUMNS], if anything is, into y.
template <class Format, int R, class X, class Ahead>
void tile(const Linear &linear, const X &x, const char *panel, int64_t p, const float *added, const Output &y, Ahead ahead) {
    const int64_t width = linear.gate ? W : COLUMNS, column = p * width;
    const int64_t room = std::min(width, linear.out - column);
    y.fetch(R, column, room);
    F sum[R][2] = {};
    multiply_panel<Format>(x, panel, ahead, sum);
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < 2; ++i) {
            const int64_t at = p * COLUMNS + i * W;
            sum[r][i] = sum[r][i] * load(linear.scale + at) + load(linear.bias + at);
            if (added) sum[r][i] += load(added + r * COLUMNS + i * W);
        }
        if (linear.gate) sum[r][0] = through(sum[r][0], linear.gate) * sum[r][1];
        y.write(r, column, room, sum[r]);
    }
}

// Two blocks, or the halves of one, with each of so many pieces.
NextAndUpcoming joined(const Next &next, const Upcoming &upcoming, int64_t pieces) {
    const auto block = [&](int64_t i) { return upcoming.base + upcoming.blocks[i] * upcoming.bytes; };
    const bool two = upcoming.count > 1;
    const int64_t bytes = two ? upcoming.bytes : upcoming.bytes / 2;
    return {next, {block(0), two ? block(1) : block(0) + bytes}, std::min(LINE, ceil_div(bytes, pieces))};
}

// All of a chunk's rows times panel p, and the next panel and upcoming blocks fetched meanwhile, as many as there is time for:
// memory and arithmetic are both busy all the time. Who comes to a panel that nobody has `fetched` fetches it just ahead of
// its first tile.
template <class Format, class X>
void pass(const Linear &linear, const X &x, int64_t rows, const char *panel, int64_t p, const float *added, const Output &y,
          bool fetched, const Upcoming &upcoming) {
    const int64_t tiles = ceil_div(rows, Format::TILE_ROWS), share = Format::BYTES / tiles;
    for (int64_t t = 0; t < tiles; ++t) {
        const Part part(rows, tiles, t), soon(upcoming.count, tiles, t);
        const Next next{panel + x.pieces * (Format::BYTES + t * share), share};
        const float *more = added ? added + part.begin * COLUMNS : nullptr;
        const auto compute = [&](auto ahead) {
            with_rows<Format::TILE_ROWS>(part.size, [&](auto size) {
                tile<Format, size>(linear, x.from(part.begin), panel, p, more, y.from(part.begin), ahead);
            });
        };
        if (tiles == 1 || (t == 0 && !fetched)) {
            compute(Same<Format::BYTES>{});
        } else if (soon.size == 0) {
            compute(next);
        } else {
            compute(joined(next, upcoming.part(soon.begin, soon.size), x.pieces));
        }
    }
}

template <class Format, class X>
void multiply(const Linear &linear, const X &x, int64_t rows, const LowRank *adapted, const Output &y,
              const Upcoming &upcoming, int64_t threads) {
    const int64_t panels = ceil_div(linear.out, linear.gate ? W : COLUMNS), chunks = ceil_div(rows, CHUNK_ROWS);
    const int64_t bytes = x.pieces * Format::BYTES;
#pragma omp parallel num_threads(threads)
    {
        [[maybe_unused]] const typename Format::Session session;
        const char *next = nullptr;
        float added[CHUNK_ROWS * COLUMNS];
#pragma omp for schedule(static) collapse(2)
        for (int64_t c = 0; c < chunks; ++c) {
            for (int64_t p = 0; p < panels; ++p) {
                const Part chunk(rows, chunks, c), share(upcoming.count, chunks * panels, c * panels + p);
                const char *panel = linear.weight + p * bytes;
                if (adapted) adapted->widen(chunk, p, added);
                pass<Format>(linear, x.from(chunk.begin), chunk.size, panel, p, adapted ? added : nullptr,
                             y.from(chunk.begin), panel == next,
                             upcoming.part(share.begin, share.size));
                next = panel + bytes;
            }
        }
    }
}

void multiply_rounded(const Linear &linear, const RoundedRows &x, int64_t rows, const LowRank *adapted, const Output &y,
                      const Upcoming &upcoming, int64_t threads) {
#ifdef AMX
    // What a single tile does is wait for memory.
    if (rows > TiledInt8::TILE_ROWS && linear.in % GROUP == 0 && has_tiles()) {
        return multiply<TiledInt8>(linear, TiledRows{x}, rows, adapted, y, upcoming, threads);
    }
#endif
    multiply<Int8>(linear, x, rows, adapted, y, upcoming, threads);
}
}

extern "C" int64_t panel_columns() { return COLUMNS; }

extern "C" void rms_norm(const float *x, int64_t rows, int64_t width, const float *weight, float epsilon,
                         const float *residual, float *y, int64_t threads) {
    if (rows * width <= ALONE / 8) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r)
        normalise(x + r * width, width, weight, epsilon, residual ? residual + r * width : nullptr, y + r * width);
}

extern "C" void linear(const Linear *linear, const float *x, int64_t rows, const float *residual, float *y,
                       const Runs *runs, const Upcoming *upcoming, int64_t threads) {
    if (rows * linear->in * linear->out <= ALONE) threads = 1;
    std::optional<LowRank> low;
    if (runs && linear->adapters) low.emplace(*linear->adapters, *runs, x, linear->in, threads);
    const LowRank *adapted = low ? &*low : nullptr;
    const Output to{y, residual, linear->out};
    const Upcoming soon = upcoming ? *upcoming : Upcoming{};
    const Rows plain{x, linear->in};
    switch (linear->format) {
        case 0: return multiply<Float32>(*linear, plain, rows, adapted, to, soon, threads);
        case 1: return multiply<Bfloat16>(*linear, plain, rows, adapted, to, soon, threads);
        case 2: return multiply_rounded(*linear, round_rows(x, rows, linear->in, threads), rows, adapted, to, soon, threads);
    }
}
