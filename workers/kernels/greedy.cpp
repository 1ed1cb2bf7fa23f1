// Where each row has its maximum, as torch's argmax has it: the first of equals, and no number is greater than all.

#include <cstdint>

#include "simd.h"

namespace {

constexpr int64_t ALONE = 1 << 16;  // floats that aren't worth waking other threads for
constexpr int64_t PART = 256;       // of which only the maximum is kept at first: places are dear to keep track of

int64_t first_in(const float *x, int64_t count, bool (*wanted)(float, float), float value) {
    int64_t i = 0;
    while (i < count && !wanted(x[i], value)) ++i;
    return i;
}

// count is at least 1.
int64_t greatest(const float *x, int64_t count) {
    float best = x[0];
    int64_t start = 0;
    bool numbers = best == best;
    for (int64_t part = 0; part < count; part += PART) {
        const int64_t end = std::min(part + PART, count);
        float highest = x[part];
        int64_t i = part;
        I unordered{};
        if (end - part >= W) {
            F most = load(x + part);
            for (; i + W <= end; i += W) {
                const F next = load(x + i);
                unordered |= next != next;
                most = max(next, most);
            }
            highest = reduce_max(most);
        }
        for (; i < end; ++i) {
            numbers &= x[i] == x[i];
            highest = std::max(highest, x[i]);
        }
        for (int lane = 0; lane < W; ++lane) numbers &= !unordered[lane];
        if (highest > best) best = highest, start = part;
    }
    if (!numbers) return first_in(x, count, [](float a, float) { return a != a; }, 0);
    return start + first_in(x + start, count - start, [](float a, float b) { return a == b; }, best);
}

}  // namespace

// x: [rows, stride], of which the first `width` of each row, at least 1, are looked at; found: [rows].
extern "C" void greedy(const float *x, int64_t rows, int64_t stride, int64_t width, int64_t *found, int64_t threads) {
    if (rows * width <= ALONE) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) found[r] = greatest(x + r * stride, width);
}
