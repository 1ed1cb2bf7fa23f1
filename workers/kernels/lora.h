// What low-rank adapters add to the rows of a product: (x A^T) B^T, by the adapter that a row has, if it has one.
//
// Rows of one adapter are computed together, wherever they lie, so that its weights are read once for all of them. Each sum
// is one chain of fused multiply-adds: the same bits in whatever company.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "simd.h"
#include "tiles.h"

extern "C" {

// order[begin .. begin + size): rows of a chunk whose adapter lies in the same place.
struct Run {
    int64_t place, begin, size;
};

// Those of all rows of a step that have an adapter, `order` is of so many rows. Runs are sorted by chunk.
struct Runs {
    const int64_t *order;
    const Run *runs;
    int64_t rows, count;
};

// A panel's first W columns are sums over `count` columns of x A^T from first[0] on, its others from first[1] on: B has more
// rows only where a product of several layers has zeros. `begin`: the first of B's rows of the panel, all panels' counted.
struct Span {
    int64_t first[2], count, begin;
};

// Of all places. `down` [places][vectors][in][W] is A, a vector of its rows at a time, and `up` [places][up_rows][COLUMNS] B,
// panel by panel.
struct Adapters {
    const float *down, *up;
    const Span *spans;
    int64_t vectors, up_rows;
};
}

namespace {

// What is added to one product of a step, once its rows went through A.
class LowRank {
   public:
    LowRank(const Adapters &adapters, const Runs &runs, const float *x, int64_t in, int64_t threads)
        : adapters_(adapters), runs_(runs), inner_(inner(runs.rows * stride())) {
        if (runs.rows * stride() * in <= ALONE) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
        for (int64_t n = 0; n < runs_.count; ++n) {
            for (int64_t v = 0; v < adapters_.vectors; ++v) {
                with_rows<WIDE_ROWS>(runs_.runs[n].size, [&](auto rows) { narrow<rows>(x, in, runs_.runs[n], v); });
            }
        }
    }

    // to: [chunk's rows][COLUMNS], of panel p.
    void widen(const Part &chunk, int64_t p, float *to) const {
        std::fill_n(to, chunk.size * COLUMNS, 0.0f);
        const auto before = [&](int64_t row) { return [=](const Run &run) { return runs_.order[run.begin] < row; }; };
        const Run *end = runs_.runs + runs_.count;
        const Run *run = std::partition_point(runs_.runs, end, before(chunk.begin));
        for (end = std::partition_point(run, end, before(chunk.begin + chunk.size)); run < end; ++run) {
            with_rows<WIDE_ROWS>(run->size, [&](auto rows) { widen<rows>(*run, adapters_.spans[p], to, chunk.begin); });
        }
    }

   private:
    int64_t stride() const { return adapters_.vectors * W; }

    // Valid until this thread's next call.
    static float *inner(int64_t size) {
        static thread_local std::vector<float> buffer;
        buffer.resize(size);
        return buffer.data();
    }

    // Vector v of x A^T, for R rows.
    template <int R>
    void narrow(const float *x, int64_t in, const Run &run, int64_t v) const {
        const float *down = adapters_.down + (run.place * adapters_.vectors + v) * in * W, *from[R];
        for (int r = 0; r < R; ++r) from[r] = x + runs_.order[run.begin + r] * in;
        F sum[R] = {};
        for (int64_t k = 0; k < in; ++k, down += W) {
            const F a = load(down);
            __builtin_prefetch(down + AHEAD / sizeof *down);
            for (int r = 0; r < R; ++r) sum[r] += from[r][k] * a;
        }
        for (int r = 0; r < R; ++r) store(inner_ + (run.begin + r) * stride() + v * W, sum[r]);
    }

    // While a panel of B is read the next one is fetched.
    template <int R>
    void widen(const Run &run, const Span &span, float *to, int64_t first_row) const {
        const float *up = adapters_.up + (run.place * adapters_.up_rows + span.begin) * COLUMNS;
        const float *from = inner_ + run.begin * stride();
        const int64_t step = stride(), next = span.count * COLUMNS;
        F sum[R][2] = {};
        for (int64_t k = 0; k < span.count; ++k, up += COLUMNS) {
            for (int i = 0; i < 2; ++i) {
                const F b = load(up + i * W);
                __builtin_prefetch(up + next + i * W);
                for (int r = 0; r < R; ++r) sum[r][i] += from[r * step + span.first[i] + k] * b;
            }
        }
        for (int r = 0; r < R; ++r) {
            float *row = to + (runs_.order[run.begin + r] - first_row) * COLUMNS;
            for (int i = 0; i < 2; ++i) store(row + i * W, sum[r][i]);
        }
    }

    const Adapters &adapters_;
    const Runs &runs_;
    float *inner_;
};

}  // namespace

// Groups rows by place, -1 where a row has no adapter. `order` and `runs` have room for one of each row; returns how many runs
// there are.
extern "C" int64_t group_rows(const int64_t *place, int64_t rows, int64_t *order, Run *runs) {
    const int64_t chunks = ceil_div(rows, CHUNK_ROWS);
    int64_t grouped = 0, count = 0;
    for (int64_t c = 0; c < chunks; ++c) {
        const Part chunk(rows, chunks, c);
        const int64_t first = grouped;
        for (int64_t row = chunk.begin; row < chunk.begin + chunk.size; ++row) {
            if (place[row] >= 0) order[grouped++] = row;
        }
        std::stable_sort(order + first, order + grouped, [&](int64_t a, int64_t b) { return place[a] < place[b]; });
        for (int64_t begin = first, end; begin < grouped; begin = end) {
            const int64_t here = place[order[begin]];
            for (end = begin; end < grouped && place[order[end]] == here;) ++end;
            const int64_t parts = ceil_div(end - begin, WIDE_ROWS);
            for (int64_t n = 0; n < parts; ++n) {
                const Part part(end - begin, parts, n);
                runs[count++] = {here, begin + part.begin, part.size};
            }
        }
    }
    return count;
}
