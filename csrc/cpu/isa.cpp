// Compiled once for every instruction set, with FASTGD_ISA its name: the loops over a tile, and nothing else.
// Everything here has internal linkage but the one table, and nothing needs a constructor, so loading it runs none of
// it.
#include "../pass/convert.hpp"
#include "../pass/sums.hpp"
#include "../rules.hpp"
#include "kernels.hpp"

#if defined(_MSC_VER)
#pragma fp_contract(off)
#endif

#if defined(__clang__)
#define FASTGD_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define FASTGD_INDEPENDENT _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define FASTGD_INDEPENDENT __pragma(loop(ivdep))
#endif
#if defined(_MSC_VER) && !defined(__clang__)
#define FASTGD_RESTRICT __restrict
#else
#define FASTGD_RESTRICT __restrict__
#endif

namespace fastgd {
namespace {

// The one loop of every rule. Body and tail are the compiler's split of the same operations.
template <class Rule, class T, class C, class... S>
FASTGD_FN void each(int64_t n, T* FASTGD_RESTRICT p, const T* FASTGD_RESTRICT g, T sign, const C& c,
                    S* FASTGD_RESTRICT... s) {
    FASTGD_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
        T x = p[i];
        T state[] = {s[i]..., T(0)};
        Rule::update(x, T(sign * g[i]), state, c);
        p[i] = x;
        int k = 0;
        ((s[i] = state[k++]), ...);
        (void)k;
    }
}

template <class Rule, class T> void update(int64_t n, void* p, const void* g, void* const* s, const Row& row) {
    using C = typename Rule::template Coefficients<T>;
    constexpr int count = sizeof(C) / sizeof(T);
    static_assert(count <= max_coefficients && Rule::states <= max_states);
    T rounded[count];
    for (int i = 0; i < count; ++i) rounded[i] = T(row.coefficients[i]);
    C c;
    memcpy(&c, rounded, sizeof c);
    const T sign = T(row.sign), *y = static_cast<const T*>(g);
    T* x = static_cast<T*>(p);
    if constexpr (Rule::states == 0)
        each<Rule>(n, x, y, sign, c);
    else if constexpr (Rule::states == 1)
        each<Rule>(n, x, y, sign, c, static_cast<T*>(s[0]));
    else if constexpr (Rule::states == 2)
        each<Rule>(n, x, y, sign, c, static_cast<T*>(s[0]), static_cast<T*>(s[1]));
    else
        each<Rule>(n, x, y, sign, c, static_cast<T*>(s[0]), static_cast<T*>(s[1]), static_cast<T*>(s[2]));
}

template <class T, class S> void load_tile(int64_t n, const char* from, int64_t stride, void* to) {
    T* FASTGD_RESTRICT y = static_cast<T*>(to);
    if (stride == sizeof(S) && reinterpret_cast<uintptr_t>(from) % alignof(S) == 0) {
        const S* FASTGD_RESTRICT x = reinterpret_cast<const S*>(from);
        FASTGD_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) y[i] = load<T>(x[i]);
    } else {
        for (int64_t i = 0; i < n; ++i) {
            S x;
            memcpy(&x, from + i * stride, sizeof x);
            y[i] = load<T>(x);
        }
    }
}

template <class T, class S> void store_tile(int64_t n, const void* from, char* to, int64_t stride) {
    const T* FASTGD_RESTRICT x = static_cast<const T*>(from);
    if (stride == sizeof(S) && reinterpret_cast<uintptr_t>(to) % alignof(S) == 0) {
        S* FASTGD_RESTRICT y = reinterpret_cast<S*>(to);
        FASTGD_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) store(x[i], y[i]);
    } else {
        for (int64_t i = 0; i < n; ++i) {
            S y;
            store(x[i], y);
            memcpy(to + i * stride, &y, sizeof y);
        }
    }
}

template <class T> void scale(int64_t n, const void* from, void* to, double divisor, double factor) {
    const T* FASTGD_RESTRICT x = static_cast<const T*>(from);
    T* y = static_cast<T*>(to);  // x itself, or apart from it
    const T d = T(divisor), f = T(factor);
    FASTGD_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] / d * f;
}

template <class T, bool difference> FASTGD_FN void add_squares(int64_t n, const T* x, const T* minus, double* lane) {
    double sum[lanes];
    for (int j = 0; j < lanes; ++j) sum[j] = lane[j];
    auto square = [&](int64_t i) {
        const double d = difference ? T(x[i] - minus[i]) : x[i];
        return d * d;
    };
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes)
        for (int j = 0; j < lanes; ++j) sum[j] += square(i + j);
    for (int j = 0; i < n; ++i, ++j) sum[j] += square(i);
    for (int j = 0; j < lanes; ++j) lane[j] = sum[j];
}

template <class T> void squares(int64_t n, const void* x, const void* minus, double* lane) {
    if (minus)
        add_squares<T, true>(n, static_cast<const T*>(x), static_cast<const T*>(minus), lane);
    else
        add_squares<T, false>(n, static_cast<const T*>(x), nullptr, lane);
}

template <class T> void blend(int64_t n, void* average, const void* value, double weight) {
    T* FASTGD_RESTRICT y = static_cast<T*>(average);
    const T* FASTGD_RESTRICT x = static_cast<const T*>(value);
    const T w = T(weight);
    FASTGD_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) y[i] = y[i] + w * (x[i] - y[i]);
}

template <class T> int64_t nonfinite(int64_t n, const void* values) {
    const T* x = static_cast<const T*>(values);
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += !(x[i] - x[i] == T(0));
    return count;
}

template <class E, class... W>
FASTGD_FN void touch(int64_t n, uint32_t mask, const E* FASTGD_RESTRICT r, E* FASTGD_RESTRICT p,
                     W* FASTGD_RESTRICT... w) {
    FASTGD_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
        const E x = E(r[i] & mask);
        p[i] = E(p[i] ^ x);
        ((w[i] ^= x), ...);
    }
}

template <class E, int writes> void stream(int64_t n, const void* read, void* const* w, uint32_t mask) {
    const E* r = static_cast<const E*>(read);
    E* p = static_cast<E*>(w[0]);
    uint32_t* const* s = reinterpret_cast<uint32_t* const*>(w);
    if constexpr (writes == 1) touch(n, mask, r, p);
    if constexpr (writes == 2) touch(n, mask, r, p, s[1]);
    if constexpr (writes == 3) touch(n, mask, r, p, s[1], s[2]);
    if constexpr (writes == 4) touch(n, mask, r, p, s[1], s[2], s[3]);
}

template <template <bool...> class Rule, int flags, int mask> constexpr void fill(Kernels& k, RuleId id) {
    if constexpr (mask < (1 << flags)) {
        using R = typename variant<Rule, flags, mask>::type;
        k.update[id][mask][int(Compute::float32)] = update<R, float>;
        k.update[id][mask][int(Compute::float64)] = update<R, double>;
        fill<Rule, flags, mask + 1>(k, id);
    }
}

template <class T> constexpr void fill(Kernels& k, Compute c) {
    k.scale[int(c)] = scale<T>;
    k.squares[int(c)] = squares<T>;
    k.blend[int(c)] = blend<T>;
    k.nonfinite[int(c)] = nonfinite<T>;
}

template <class S> constexpr void fill(Kernels& k, Dtype d) {
    k.load[int(d)][int(Compute::float32)] = load_tile<float, S>;
    k.load[int(d)][int(Compute::float64)] = load_tile<double, S>;
    k.store[int(d)][int(Compute::float32)] = store_tile<float, S>;
    k.store[int(d)][int(Compute::float64)] = store_tile<double, S>;
}

constexpr Kernels table() {
    Kernels k{};
#define RULE(name, ...) fill<name, count(__VA_ARGS__), 0>(k, rule_##name);
    FASTGD_RULES(RULE)
#undef RULE
    fill<float>(k, Compute::float32);
    fill<double>(k, Compute::float64);
    fill<double>(k, Dtype::float64);
    fill<float>(k, Dtype::float32);
    fill<half>(k, Dtype::float16);
    fill<bfloat>(k, Dtype::bfloat16);
    k.stream[0][0] = stream<uint32_t, 1>;
    k.stream[0][1] = stream<uint32_t, 2>;
    k.stream[0][2] = stream<uint32_t, 3>;
    k.stream[0][3] = stream<uint32_t, 4>;
    k.stream[1][0] = stream<uint16_t, 1>;
    k.stream[1][1] = stream<uint16_t, 2>;
    k.stream[1][2] = stream<uint16_t, 3>;
    k.stream[1][3] = stream<uint16_t, 4>;
    return k;
}

}  // namespace

#define FASTGD_PASTE(a, b) a##b
#define FASTGD_TABLE(isa) FASTGD_PASTE(kernels_, isa)
extern const Kernels FASTGD_TABLE(FASTGD_ISA);
constinit const Kernels FASTGD_TABLE(FASTGD_ISA) = table();

}  // namespace fastgd
