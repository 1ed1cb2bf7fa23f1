// Rotary position embeddings in place, in transformers' layout: dimension i turns with dimension i + dim / 2.

#pragma once

#include <cstdint>

// x: [tokens, stride], of which the first heads * dim floats of each token are turned; cos, sin: [tokens, dim], dense.
extern "C" void rotary(float *x, int64_t tokens, int64_t stride, int64_t heads, int64_t dim, const float *cos,
                       const float *sin, int64_t threads);
