// Decoder layers over a ragged batch, for the many models whose layers are
//
//     h = x + norm(output(attention(rotary(norm(qkv(norm(x)))))))
//     y = h + norm(down(gate_up(norm(h))))
//
// where the norms behind the parts, and those of queries and keys, may be missing.
// They call the other files' kernels, by address, in the order in which the layers' own modules would: the same bits, and
// nothing between two kernels but the way back from a function.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "linear.h"
#include "paged_attention.h"
#include "rotary.h"

extern "C" {

struct Kernels {
    decltype(rms_norm) *norm;
    decltype(linear) *multiply;
    decltype(rotary) *rotate;
    decltype(paged_attention) *attend;
};

// `weight`: null where there is none.
struct Norm {
    const float *weight;
    float epsilon;
};

// `attention`: all but the addresses that a step brings. `next` gets what this one gives, and nothing else is done between them;
// null after the last one.
struct DecoderLayer {
    const Linear *qkv, *output, *gate_up, *down;
    Norm before_attention, after_attention, before_mlp, after_mlp;
    int64_t index, head_dim;
    Heads queries, keys;
    Call attention;
    const DecoderLayer *next;
};

// cos, sin: [tokens, head_dim]. `caches`: by the layers' index. `scratch`: of `scratch_width` floats for each token.
// `wanted`: ascending; nobody reads what the last layer gives for other tokens. Where there are none, `runs` is null.
struct Step {
    int64_t tokens;
    const int64_t *wanted;
    int64_t wanted_count;
    const float *cos, *sin;
    const Runs *runs;
    const Layer *caches;
    const Batch *batch;
    float *scratch;
    int64_t threads;
};
}

namespace {

// Of keys and values, at most: more costs products what attention gains.
constexpr int64_t FETCHED_BYTES = 12 << 20;

// The product beside which a block is fetched, the layer's own first or the last of the one before: one of the two alone
// would wait for memory.
enum Beside { DOWN, QKV };

// The blocks that a layer's attention reads for rows of one token, or as many as may be fetched, at even distances: so it doesn't
// first compute without memory and then wait for it. Rows of more tokens keep it busy enough.
class Soon {
public:
    Soon(const DecoderLayer &layer, const Step &step, Beside product) : cache(step.caches[layer.index]) {
        const std::vector<int32_t> read = all(layer, *step.batch);
        const int64_t count = read.size(), most = std::min(count, FETCHED_BYTES / cache.block_bytes);
        for (int64_t i = 0; i < most; ++i) {
            if ((i % 3 ? QKV : DOWN) == product) blocks.push_back(read[i * count / most]);
        }
    }

    Upcoming upcoming() const {
        return {static_cast<const char *>(cache.cache), blocks.data(), static_cast<int64_t>(blocks.size()), cache.block_bytes};
    }

private:
    const Layer &cache;
    std::vector<int32_t> blocks;

    std::vector<int32_t> all(const DecoderLayer &layer, const Batch &batch) const {
        std::vector<int32_t> found;
        for (int64_t row = 0; row < batch.rows; ++row) {
            if (batch.query_start[row + 1] - batch.query_start[row] != 1) continue;
            const int64_t length = batch.context_len[row], window = layer.attention.sliding_window;
            const int64_t unseen = window ? std::max<int64_t>(0, length - window) : 0;
            const int32_t *of_row = batch.block_table + row * batch.max_blocks;
            found.insert(found.end(), of_row + unseen / cache.block_size, of_row + (length - 1) / cache.block_size + 1);
        }
        return found;
    }
};

// Rows of x, by their numbers in ascending order, one after the other in y, which may be x; and back.
void gather(const float *x, const int64_t *rows, int64_t count, int64_t width, float *y) {
    for (int64_t i = 0; i < count; ++i) std::memmove(y + i * width, x + rows[i] * width, width * sizeof(float));
}
void scatter(const int64_t *rows, int64_t count, int64_t width, float *y) {
    for (int64_t i = count - 1; i >= 0; --i) std::memmove(y + rows[i] * width, y + i * width, width * sizeof(float));
}

// x, y: [tokens, width]; they may be the same.
void compute(const DecoderLayer &layer, const Kernels &kernels, const Step &step, const float *x, float *y) {
    const int64_t tokens = step.tokens, width = layer.qkv->in, threads = step.threads;
    int64_t rows = tokens;
    const Layer &cache = step.caches[layer.index];
    float *normed = step.scratch, *qkv = normed + tokens * width, *attended = qkv + tokens * layer.qkv->out;
    const auto norm = [&](const float *from, const Norm &by, const float *residual, float *to) {
        kernels.norm(from, rows, width, by.weight, by.epsilon, residual, to, threads);
    };
    const auto multiply = [&](const Linear *by, const float *from, const float *residual, float *to,
                              const Upcoming &upcoming = {}) {
        kernels.multiply(by, from, rows, residual, to, step.runs, &upcoming, threads);
    };
    const auto add = [&](const Linear *by, const float *from, const Norm &after, const float *residual, float *to,
                         const Upcoming &upcoming = {}) {
        if (!after.weight) return multiply(by, from, residual, to, upcoming);
        multiply(by, from, nullptr, normed, upcoming);
        norm(normed, after, residual, to);
    };

    norm(x, layer.before_attention, nullptr, normed);
    multiply(layer.qkv, normed, nullptr, qkv, Soon(layer, step, QKV).upcoming());
    kernels.rotate(qkv, tokens, layer.qkv->out, &layer.queries, &layer.keys, layer.head_dim, step.cos, step.sin, threads);
    Call call = layer.attention;
    call.query = qkv;
    call.key = qkv + cache.query_heads * layer.head_dim;
    call.value = call.key + cache.kv_heads * layer.head_dim;
    call.output = attended;
    call.threads = threads;
    kernels.attend(&cache, step.batch, &call);
    const bool fewer = !layer.next && step.wanted_count < tokens;
    if (fewer) {
        rows = step.wanted_count;
        gather(attended, step.wanted, rows, layer.output->in, attended);
        gather(x, step.wanted, rows, width, y);
        x = y;
    }
    add(layer.output, attended, layer.after_attention, x, y);

    // Queries, keys and values are done with.
    float *inner = qkv;
    norm(y, layer.before_mlp, nullptr, normed);
    multiply(layer.gate_up, normed, nullptr, inner);
    if (layer.next) {
        add(layer.down, inner, layer.after_mlp, y, y, Soon(*layer.next, step, DOWN).upcoming());
    } else {
        add(layer.down, inner, layer.after_mlp, y, y);
    }
    if (fewer) scatter(step.wanted, rows, width, y);
}
}

extern "C" {

// The most that this layer or one of those after it needs.
int64_t scratch_width(const DecoderLayer *layer) {
    int64_t most = 0;
    for (; layer; layer = layer->next) {
        const int64_t attention = layer->qkv->out + layer->output->in, mlp = layer->down->in;
        most = std::max(most, layer->qkv->in + std::max(attention, mlp));
    }
    return most;
}

// This layer and all those after it. x, y: [tokens, width], dense; rows of y that aren't wanted hold anything.
void decoder_layers(const DecoderLayer *layer, const Kernels *kernels, const Step *step, const float *x, float *y) {
    for (; layer; layer = layer->next, x = y) compute(*layer, *kernels, *step, x, y);
}
}
