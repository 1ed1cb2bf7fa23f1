// Causal attention over a paged KV cache, in float32: nothing is gathered, padded or expanded. Built with -DHALF, keys and values
// are kept in half precision.
//
// A block holds, KV head by KV head, its keys as [key_dim, block_size] and then its values as [block_size, value_dim].
// One vector holds one dimension of several keys, so a dot product needs no horizontal sum. Decoding is bound by memory,
// and memory likes long runs: a decoding row visits all heads of a block together.
//
// A tile is a few query tokens of one row, and with one KV head and all its query heads (when decoding, all KV heads) it
// is one piece of work. The context is taken in chunks of about CHUNK keys that start at fixed positions. Each chunk
// yields its own softmax state (maximum, sum, weighted values) and the states are folded in order (the online softmax).
// Because neither the chunks nor the order depend on the tile, the batch or the thread, a query's result is the same
// bits whoever shares the batch, however its prompt was cut, and whether or not the chunks were spread over threads.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#ifdef HALF
#include "half.h"
#endif
#include "paged_attention.h"
#include "simd.h"

namespace {

constexpr int CHUNK = 64;            // keys per softmax state, rounded to whole blocks
constexpr int MAX_CHUNK_BLOCKS = 8;  // CHUNK over the smallest block
constexpr int TILE_ROWS = 48;        // (token, head) rows of a tile: its queries and outputs stay in L2
constexpr int PANEL = 6;             // rows held in registers: 6 x 2 accumulators of the 16 that AVX2 has
constexpr int CACHE_LINE = 64;
constexpr float LOWEST = -1e30f;  // a finite stand-in for -inf: differences of two stay numbers

#ifdef HALF
typedef Half Stored;
#else
typedef float Stored;
inline Stored narrowed(float x) { return x; }
#endif

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
    void operator()(void *p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer allocate(int64_t floats) {
    return Buffer(static_cast<float *>(std::aligned_alloc(CACHE_LINE, ceil_div(floats * 4, CACHE_LINE) * CACHE_LINE)));
}

// What is wanted next goes to L2 only: many more lines can be on their way there than to L1.
inline void fetch(const void *p) { __builtin_prefetch(p, 0, 2); }

// Tokens [first, first + count) of the batch, all of one row; the first sits at `position` in its sequence.
struct Tile {
    int64_t row, first, count, position;
};

// Chunks [chunk, chunk_end) of one tile's context for some KV heads. `state` is where a split piece leaves its result.
struct Piece {
    Tile tile;
    int64_t head, head_end, chunk, chunk_end;
    float *state;
};

// The blocks of one chunk that a tile sees; `first` is the chunk-relative position of the first one, `ahead` how far behind
// a block's values the keys lie that a tile of all heads reads next.
struct Span {
    int64_t first = 0;
    int count = 0;
    const Stored *keys[MAX_CHUNK_BLOCKS], *values[MAX_CHUNK_BLOCKS];
    int64_t ahead[MAX_CHUNK_BLOCKS];
};

struct Kernel {
    const Layer &layer;
    const Batch &batch;
    const Call &call;
    const int64_t group = layer.query_heads / layer.kv_heads;
    const int64_t block_size = layer.block_size;
    const int64_t chunk_size = block_size * std::max<int64_t>(1, CHUNK / block_size);
    const int64_t window = call.sliding_window > 0 ? call.sliding_window : std::numeric_limits<int32_t>::max();
    const int64_t tile_tokens = std::max<int64_t>(1, TILE_ROWS / group);
    const int64_t state_stride = layer.value_dim + W;  // a row's values, then its maximum and sum
    // Scores are kept in units of log 2.
    const float query_scale = call.scaling * (call.softcap > 0 ? 1 / call.softcap : LOG2E);
    const float cap = call.softcap * LOG2E;

    int64_t first_visible(int64_t position) const { return std::max<int64_t>(0, position - window + 1); }

    // ---- the cache ----

    Stored *keys(int64_t block, int64_t head) const {
        return static_cast<Stored *>(layer.cache) + (block * layer.kv_heads + head) * block_size * (layer.key_dim + layer.value_dim);
    }
    Stored *values(int64_t block, int64_t head) const { return keys(block, head) + block_size * layer.key_dim; }

    void write(int64_t token) const {
        const int64_t block = batch.cache_slots[token] / block_size, offset = batch.cache_slots[token] % block_size;
        for (int64_t h = 0; h < layer.kv_heads; ++h) {
            const float *key = call.key + token * call.key_token + h * call.key_head;
            const float *value = call.value + token * call.value_token + h * call.value_head;
            Stored *column = keys(block, h) + offset, *row = values(block, h) + offset * layer.value_dim;
            for (int64_t d = 0; d < layer.key_dim; ++d) column[d * block_size] = narrowed(key[d]);
            for (int64_t d = 0; d < layer.value_dim; ++d) row[d] = narrowed(value[d]);
        }
    }

    Span span(const Tile &tile, int64_t head, int64_t chunk) const {
        const int64_t first = std::max(chunk * chunk_size, first_visible(tile.position)) / block_size;
        const int64_t end = std::min((chunk + 1) * chunk_size, tile.position + tile.count);
        const int32_t *blocks = batch.block_table + tile.row * batch.max_blocks;
        const int64_t per_chunk = chunk_size / block_size, all = ceil_div(tile.position + tile.count, block_size);
        Span s;
        s.first = first * block_size - chunk * chunk_size;
        for (int64_t i = first; i * block_size < end; ++i, ++s.count) {
            const Stored *read = values(blocks[i], head);
            s.keys[s.count] = keys(blocks[i], head);
            s.values[s.count] = read;
            s.ahead[s.count] = head + 1 < layer.kv_heads ? block_size * layer.value_dim
                               : i + per_chunk < all     ? keys(blocks[i + per_chunk], 0) - read
                                                         : 0;
        }
        return s;
    }

    // ---- one panel of rows against one chunk ----

    // Scores of N vectors of keys from `key` on, chunk-relative.
    template <int R, int N>
    void dot(const float *const (&queries)[R], const Span &s, int64_t key, float *scores) const {
        const Stored *keys[N];
        for (int n = 0; n < N; ++n) {
            const int64_t at = key + n * W - s.first;
            keys[n] = s.keys[at / block_size] + at % block_size;
        }
        F sum[R][N] = {};
        for (int64_t d = 0; d < layer.key_dim; ++d) {
            F k[N];
            for (int n = 0; n < N; ++n) {
                const Stored *key = keys[n] + d * block_size;
                k[n] = load(key);
                fetch(key + block_size * layer.key_dim);  // its values
            }
            for (int r = 0; r < R; ++r)
                for (int n = 0; n < N; ++n) sum[r][n] += k[n] * queries[r][d];
        }
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) store(scores + r * chunk_size + key + n * W, sum[r][n] * query_scale);
    }

    // Turns scores [first, end) into weights in place; keys outside [visible, visible_end) get 0.
    void softmax(float *scores, int64_t first, int64_t end, int64_t visible, int64_t visible_end, float &maximum,
                 float &sum) const {
        I lane;
        for (int i = 0; i < W; ++i) lane[i] = i;
        const bool masked = first < visible || visible_end < end;
        F best = splat(LOWEST);
        for (int64_t c = first; c < end; c += W) {
            F s = load(scores + c);
            if (cap > 0) s = tanh(s) * cap;
            if (masked) {
                const I at = lane + (int32_t)c;
                s = select((at >= (int32_t)visible) & (at < (int32_t)visible_end), s,
                           splat(-std::numeric_limits<float>::infinity()));
            }
            best = max(best, s);
            store(scores + c, s);
        }
        maximum = reduce_max(best);
        F total{};
        for (int64_t c = first; c < end; c += W) {
            const F p = exp2(load(scores + c) - maximum);
            total += p;
            store(scores + c, p);
        }
        sum = reduce_add(total);
    }

    static F folded(F state, float keep, F chunk, float take) { return state * keep + chunk * take; }

    template <int R, int N>
    void weigh(const Span &s, int64_t visible, int64_t visible_end, const float *weights, int64_t column, float *states,
               const float *keep, const float *take) const {
        F sum[R][N] = {};
        for (int b = 0; b < s.count; ++b) {
            const int64_t start = s.first + b * block_size;
            const int64_t end = std::min(visible_end, start + block_size);
            for (int64_t c = std::max(visible, start); c < end; ++c) {
                F v[N];
                for (int n = 0; n < N; ++n) {
                    const Stored *value = s.values[b] + (c - start) * layer.value_dim + column + n * W;
                    v[n] = load(value);
                    fetch(value + s.ahead[b]);
                }
                for (int r = 0; r < R; ++r)
                    for (int n = 0; n < N; ++n) sum[r][n] += v[n] * weights[r * chunk_size + c];
            }
        }
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) {
                float *state = states + r * state_stride + column + n * W;
                store(state, folded(load(state), keep[r], sum[r][n], take[r]));
            }
    }

    // Folds chunk `chunk` into the states of rows [row, row + R) of the tile and one KV head.
    template <int R>
    void panel(const Tile &tile, int64_t kv_head, int64_t row, int64_t chunk, const Span &s, float *scores,
               float *states) const {
        const int64_t base = chunk * chunk_size;
        const float *queries[R];
        int64_t positions[R];  // chunk-relative
        for (int64_t r = 0, token = row / group, head = row % group; r < R; ++r, ++head) {
            if (head == group) head = 0, ++token;
            queries[r] = call.query + (tile.first + token) * call.query_token + (kv_head * group + head) * call.query_head;
            positions[r] = tile.position + token - base;
        }
        // The rows of a panel see keys [visible, visible_end) between them, chunk-relative.
        const int64_t visible = std::max(s.first, first_visible(positions[0] + base) - base);
        const int64_t visible_end = std::min(s.first + s.count * block_size, positions[R - 1] + 1);
        if (visible >= visible_end) return;

        constexpr int N = R <= 3 ? 4 : 2;  // up to 12 accumulators
        const int64_t end = s.first + ceil_div(visible_end - s.first, block_size) * block_size;
        int64_t key = s.first;
        for (; key + N * W <= end; key += N * W) dot<R, N>(queries, s, key, scores);
        for (; key < end; key += W) dot<R, 1>(queries, s, key, scores);

        float keep[R], take[R];
        for (int r = 0; r < R; ++r) {
            float maximum, sum;
            softmax(scores + r * chunk_size, s.first, end, first_visible(positions[r] + base) - base, positions[r] + 1,
                    maximum, sum);
            fold(states + r * state_stride + layer.value_dim, maximum, sum, keep[r], take[r]);
        }

        int64_t column = 0;
        for (; column + N * W <= layer.value_dim; column += N * W)
            weigh<R, N>(s, visible, visible_end, scores, column, states, keep, take);
        for (; column < layer.value_dim; column += W)
            weigh<R, 1>(s, visible, visible_end, scores, column, states, keep, take);
    }

    // `state` holds a maximum and a sum; keep and take are what its values and the chunk's are to be scaled by.
    static void fold(float *state, float maximum, float sum, float &keep, float &take) {
        const float joint = std::max(state[0], maximum);
        keep = exp2(state[0] - joint);
        take = exp2(maximum - joint);
        state[0] = joint;
        state[1] = state[1] * keep + sum * take;
    }

    // ---- pieces ----

    void clear(float *states, int64_t rows) const {
        for (int64_t r = 0; r < rows; ++r) {
            std::fill_n(states + r * state_stride, layer.value_dim, 0.0f);
            states[r * state_stride + layer.value_dim] = LOWEST;
            states[r * state_stride + layer.value_dim + 1] = 0;
        }
    }

    // Rows go in panels of even size.
    void visit(const Tile &tile, int64_t head, int64_t chunk, float *scores, float *states) const {
        using Panel = void (Kernel::*)(const Tile &, int64_t, int64_t, int64_t, const Span &, float *, float *) const;
        static constexpr Panel by_size[PANEL + 1] = {nullptr,           &Kernel::panel<1>, &Kernel::panel<2>,
                                                     &Kernel::panel<3>, &Kernel::panel<4>, &Kernel::panel<5>,
                                                     &Kernel::panel<6>};
        const int64_t rows = tile.count * group, panels = ceil_div(rows, PANEL);
        const Span s = span(tile, head, chunk);
        for (int64_t p = 0, start = 0; p < panels; ++p) {
            const int64_t end = rows * (p + 1) / panels;
            (this->*by_size[end - start])(tile, head, start, chunk, s, scores, states + start * state_stride);
            start = end;
        }
    }

    void run(const Piece &piece, float *scores, float *states) const {
        const int64_t rows = piece.tile.count * group;
        clear(states, rows * (piece.head_end - piece.head));
        for (int64_t chunk = piece.chunk; chunk < piece.chunk_end; ++chunk)
            for (int64_t head = piece.head; head < piece.head_end; ++head)
                visit(piece.tile, head, chunk, scores, states + (head - piece.head) * rows * state_stride);
    }

    // Joins `count` states of one piece, which lie `apart` floats from each other, and writes the output.
    void finish(const Piece &piece, const float *states, int64_t count, int64_t apart) const {
        const int64_t per_head = piece.tile.count * group;
        for (int64_t r = 0; r < rows(piece); ++r) {
            const int64_t head = (piece.head + r / per_head) * group + r % group;
            float *output = call.output + ((piece.tile.first + r % per_head / group) * layer.query_heads + head) * layer.value_dim;
            float total[2];
            std::copy_n(states + r * state_stride, layer.value_dim, output);
            std::copy_n(states + r * state_stride + layer.value_dim, 2, total);
            for (int64_t i = 1; i < count; ++i) {
                const float *state = states + i * apart + r * state_stride;
                float keep, take;
                fold(total, state[layer.value_dim], state[layer.value_dim + 1], keep, take);
                for (int64_t c = 0; c < layer.value_dim; c += W)
                    store(output + c, folded(load(output + c), keep, load(state + c), take));
            }
            float keep = 1, take;
            if (call.sinks) fold(total, call.sinks[head] * LOG2E, 1, keep, take);
            for (int64_t c = 0; c < layer.value_dim; c += W) store(output + c, load(output + c) * keep / total[1]);
        }
    }

    std::vector<Piece> pieces() const {
        std::vector<Piece> found;
        for (int64_t row = 0; row < batch.rows; ++row) {
            const int64_t start = batch.query_start[row], end = batch.query_start[row + 1];
            for (int64_t first = start; first < end; first += tile_tokens) {
                const int64_t position = batch.context_len[row] - (end - first);
                const Tile tile{row, first, std::min(tile_tokens, end - first), position};
                const int64_t chunk = first_visible(position) / chunk_size;
                const int64_t chunk_end = ceil_div(position + tile.count, chunk_size);
                const int64_t heads = tile.count == 1 ? layer.kv_heads : 1;
                for (int64_t head = 0; head < layer.kv_heads; head += heads)
                    found.push_back({tile, head, head + heads, chunk, chunk_end, nullptr});
            }
        }
        return found;
    }

    int64_t rows(const Piece &piece) const { return piece.tile.count * group * (piece.head_end - piece.head); }
    int64_t state_floats(const Piece &piece) const { return rows(piece) * state_stride; }

    void attend() const {
        std::vector<Piece> whole = pieces();
        std::vector<Piece> split;
        Buffer states;
        // Too few pieces to keep the threads evenly busy: every chunk becomes a piece, and `finish` joins them.
        const bool splitting = call.threads > 1 && (int64_t)whole.size() < 2 * call.threads;
        if (splitting) {
            int64_t floats = 0;
            for (const Piece &piece : whole) floats += state_floats(piece) * (piece.chunk_end - piece.chunk);
            states = allocate(floats);
            float *state = states.get();
            for (Piece &piece : whole) {
                piece.state = state;
                for (int64_t chunk = piece.chunk; chunk < piece.chunk_end; ++chunk, state += state_floats(piece))
                    split.push_back({piece.tile, piece.head, piece.head_end, chunk, chunk + 1, state});
            }
        }
        const std::vector<Piece> &work = splitting ? split : whole;
        int64_t most_rows = 0;
        for (const Piece &piece : whole) most_rows = std::max(most_rows, rows(piece));

#pragma omp parallel num_threads(call.threads)
        {
#pragma omp for schedule(static)
            for (int64_t token = 0; token < batch.tokens; ++token) write(token);

            Buffer scores = allocate(PANEL * chunk_size), own = allocate(most_rows * state_stride);
// Barriers are dear where other programs compete for the cores, so there is none but those needed.
#pragma omp for schedule(dynamic) nowait
            for (int64_t i = 0; i < (int64_t)work.size(); ++i) {
                run(work[i], scores.get(), splitting ? work[i].state : own.get());
                if (!splitting) finish(work[i], own.get(), 1, 0);
            }
            if (splitting) {
#pragma omp barrier
#pragma omp for schedule(dynamic) nowait
                for (int64_t i = 0; i < (int64_t)whole.size(); ++i)
                    finish(whole[i], whole[i].state, whole[i].chunk_end - whole[i].chunk, state_floats(whole[i]));
            }
        }
    }
};

}  // namespace

extern "C" {

void paged_attention(const Layer *layer, const Batch *batch, const Call *call) {
    Kernel{*layer, *batch, *call}.attend();
}
}
