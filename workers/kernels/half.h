// Numbers in half precision: vectors of them widened to floats, exactly, and floats rounded to the nearest one.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__F16C__)

// Before GCC 12 no type of C++ stands for them on x86.
typedef uint16_t Half;

inline F load(const Half *p) {
#if defined(__AVX512F__) && LANES == 16
    return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
#else
    return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
#endif
}

inline Half half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

#elif defined(__aarch64__)

typedef __fp16 Half;

inline F load(const Half *p) { return (F)vcvt_f32_f16(vld1_f16(p)); }
inline Half half(float x) { return static_cast<Half>(x); }

#else

typedef _Float16 Half;

inline F load(const Half *p) {
    typedef Half Halves __attribute__((vector_size(W * 2)));
    Halves x;
    std::memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, F);
}

inline Half half(float x) { return static_cast<Half>(x); }

#endif

// What is too large becomes the largest number: infinity would make a softmax NaN.
inline Half narrowed(float x) { return half(std::clamp(x, -65504.0f, 65504.0f)); }

}  // namespace
