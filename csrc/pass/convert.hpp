// One element between its storage type and its compute type. Widening is exact, narrowing rounds once to nearest even.
// Integer arithmetic throughout: GCC 12 does not vectorise _Float16, and AVX512_BF16 flushes subnormals.
#pragma once
#include <stdint.h>
#include <string.h>

#include "../rules/vocabulary.hpp"

namespace fastgd {
namespace FASTGD_UNIT {

struct half {
    uint16_t bits;
};
struct bfloat {
    uint16_t bits;
};

FASTGD_FN uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

FASTGD_FN float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

// float64 to float32, rounded to odd: an inexact result takes the neighbour whose last bit is 1, so that a second
// rounding to 16 bits lands where a single one would.
FASTGD_FN float to_odd(double x) {
    float nearest = float(x);
    uint32_t u = bits_of(nearest);
    double a = x < 0 ? -x : x, b = nearest < 0 ? -double(nearest) : double(nearest);
    uint32_t odd = b > a ? u - 1 : u + 1;
    return float_of(a == b || (u & 1) ? u : odd);
}

// Comparisons are signed: AVX2 has no others.
FASTGD_FN uint16_t round_half(float x) {
    constexpr int32_t inf = 0x7f800000, overflow = 0x47800000 /* 2^16 */, smallest_normal = 0x38800000 /* 2^-14 */;
    uint32_t u = bits_of(x), a = u & 0x7fffffff;
    uint32_t normal = (a + 0xfff + ((a >> 13) & 1) - (112u << 23)) >> 13;
    uint32_t subnormal = bits_of(float_of(a) + 0.5f) - 0x3f000000;  // adding 0.5 leaves 2^-24 as the last bit
    uint32_t r = int32_t(a) < smallest_normal ? subnormal : normal;
    r = int32_t(a) >= overflow ? 0x7c00 : r;
    r = int32_t(a) > inf ? 0x7e00 : r;
    return uint16_t(r | ((u >> 16) & 0x8000));
}

FASTGD_FN uint16_t round_bfloat(float x) {
    uint32_t u = bits_of(x), even = u + 0x7fff + ((u >> 16) & 1), quiet = u | 0x00400000;
    return uint16_t((x != x ? quiet : even) >> 16);
}

FASTGD_FN float widen(half x) {
    uint32_t u = x.bits, sign = (u << 16) & 0x80000000, a = (u << 13) & 0x0fffe000;
    uint32_t normal = a + (112u << 23);
    uint32_t subnormal = bits_of(float_of(a + (113u << 23)) - float_of(113u << 23));
    uint32_t r = int32_t(a) >= 0x7c00 << 13 ? a | 0x7f800000 : normal;
    r = int32_t(a) < 0x0400 << 13 ? subnormal : r;
    return float_of(r | sign);
}

FASTGD_FN float widen(bfloat x) { return float_of(uint32_t(x.bits) << 16); }

// load<T>: storage to compute type.
template <class T, class S> FASTGD_FN T load(S x) { return T(x); }
template <class T> FASTGD_FN T load(half x) { return T(widen(x)); }
template <class T> FASTGD_FN T load(bfloat x) { return T(widen(x)); }

// store: compute type to storage.
template <class T, class S> FASTGD_FN void store(T x, S& to) { to = S(x); }
FASTGD_FN void store(float x, half& to) { to.bits = round_half(x); }
FASTGD_FN void store(double x, half& to) { to.bits = round_half(to_odd(x)); }
FASTGD_FN void store(float x, bfloat& to) { to.bits = round_bfloat(x); }
FASTGD_FN void store(double x, bfloat& to) { to.bits = round_bfloat(to_odd(x)); }

}  // namespace FASTGD_UNIT
}  // namespace fastgd
