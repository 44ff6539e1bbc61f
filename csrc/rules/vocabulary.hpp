// What a rule may say: + - * /, and the functions below. Each rounds once, so every backend gives NumPy's bits.
//
// The namespace inside fastgd is anonymous unless a unit names it (FASTGD_UNIT): each instruction set compiles its own
// copy with internal linkage, and the linker can never hand AVX-512 code to a CPU without it.
#pragma once

#if defined(_MSC_VER) && !defined(__clang__)
#include <math.h>
#endif

#ifndef FASTGD_UNIT
#define FASTGD_UNIT
#endif

#if defined(__CUDACC__)
#define FASTGD_FN __host__ __device__ __forceinline__
#elif defined(_MSC_VER) && !defined(__clang__)
#define FASTGD_FN __forceinline
#else
#define FASTGD_FN inline __attribute__((always_inline))
#endif

namespace fastgd {
namespace FASTGD_UNIT {

// Correctly rounded. NaN below zero; sqrt(-0.0) is -0.0.
#if defined(_MSC_VER) && !defined(__clang__)
FASTGD_FN float sqrt(float x) { return ::sqrtf(x); }
FASTGD_FN double sqrt(double x) { return ::sqrt(x); }
#else
FASTGD_FN float sqrt(float x) { return __builtin_sqrtf(x); }
FASTGD_FN double sqrt(double x) { return __builtin_sqrt(x); }
#endif

// A NaN on either side is the result; of equal values (-0.0 and 0.0 among them) it is b.
template <class T> FASTGD_FN T max(T a, T b) { return a > b || a != a ? a : b; }

// 1, -1, or x itself: NaN stays NaN, a zero keeps its sign.
template <class T> FASTGD_FN T sign(T x) { return x > T(0) ? T(1) : (x < T(0) ? T(-1) : x); }

}  // namespace FASTGD_UNIT
}  // namespace fastgd
