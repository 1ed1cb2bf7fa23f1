// Vectors of W floats in GCC's vector extensions, and the functions that attention needs on them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr float LOG2E = 1.44269504088896341f;

#if defined(__AVX512F__)
constexpr int NATIVE = 16;
#elif defined(__AVX__)
constexpr int NATIVE = 8;
#else
constexpr int NATIVE = 4;
#endif
// Built with -DLANES=8 for block sizes or head dims that 16 does not divide.
#ifndef LANES
#define LANES 16
#endif
constexpr int W = std::min(NATIVE, LANES);  // floats per vector

typedef float F __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));
typedef uint32_t U __attribute__((vector_size(W * 4)));
typedef float Unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));

inline F load(const float *p) { return *reinterpret_cast<const Unaligned *>(p); }
inline void store(float *p, F x) { *reinterpret_cast<Unaligned *>(p) = x; }
inline F splat(float x) { return F{} + x; }
inline F select(I mask, F yes, F no) { return (F)(((I)yes & mask) | ((I)no & ~mask)); }
inline F max(F a, F b) { return select(a > b, a, b); }

template <int N>
struct Lanes {
    typedef float Vector __attribute__((vector_size(N * 4)));
};

// The halves of a vector joined until one number is left.
template <int N, class Join>
float reduce(typename Lanes<N>::Vector x, const Join &join) {
    if constexpr (N == 1) {
        return x[0];
    } else {
        typename Lanes<N / 2>::Vector halves[2];
        std::memcpy(halves, &x, sizeof x);
        return reduce<N / 2>(join(halves[0], halves[1]), join);
    }
}

inline float reduce_max(F x) {
    return reduce<W>(x, [](auto a, auto b) { return a > b ? a : b; });
}

inline float reduce_add(F x) {
    return reduce<W>(x, [](auto a, auto b) { return a + b; });
}

// 2^x for x <= 0, exactly 1 at 0 and exactly 0 below 2^-126; relative error under 2e-7 (Cephes' polynomial).
inline F exp2(F x) {
    const F round = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    F shifted = x + round;
    F f = x - (shifted - round);
    F p = splat(1.535336188319500e-4f);
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    return (F)((I)((U)p + ((U)shifted << 23)) & (x >= splat(-126.0f)));
}

inline float exp2(float x) { return exp2(splat(x))[0]; }

// Eigen's rational approximation: a few units in the last place, where 1 - 2 / (e^2x + 1) would cancel.
inline F tanh(F x) {
    x = max(select(x < splat(7.90531110763549805f), x, splat(7.90531110763549805f)), splat(-7.90531110763549805f));
    F y = x * x;
    F p = splat(-2.76076847742355e-16f);
    p = p * y + 2.00018790482477e-13f;
    p = p * y + -8.60467152213735e-11f;
    p = p * y + 5.12229709037114e-08f;
    p = p * y + 1.48572235717979e-05f;
    p = p * y + 6.37261928875436e-04f;
    p = p * y + 4.89352455891786e-03f;
    F q = splat(1.19825839466702e-06f);
    q = q * y + 1.18534705686654e-04f;
    q = q * y + 2.26843463243900e-03f;
    q = q * y + 4.89352518554385e-03f;
    return x * p / q;
}

}  // namespace
