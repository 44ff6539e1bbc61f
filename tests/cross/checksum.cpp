// Runs every loop of one instruction set (isa.cpp compiled with FASTGD_ISA=checked) on the same pseudo-random bits,
// special values among them, and prints a checksum of the results: float32, then float64. NaNs count as one.
#include <stdio.h>
#include <string.h>

#include <vector>

#include "cpu/kernels.hpp"

namespace fastgd {
extern const Kernels kernels_checked;
}
using namespace fastgd;

namespace {

uint64_t state = 1;
uint32_t random_bits() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return uint32_t(state >> 32);
}

template <class T> T random_value() {
    switch (random_bits() % 16) {
        case 0: return T(0);
        case 1: return -T(0);
        case 2: return sizeof(T) == 4 ? T(1e-42) : T(5e-320);
        case 3: return sizeof(T) == 4 ? T(3e38) : T(1e308);
        case 4: return T(1) / T(0);
        case 5: return T(0) / T(0);
        default: return T(int32_t(random_bits())) / T(1u << 31) * T(random_bits() % 7);
    }
}

// Any bits; every second float64 near the range of float16, whose rounding would else be hit too rarely.
template <class T> T random_pattern(int i) {
    T x;
    if (sizeof(T) == 4) {
        uint32_t u = random_bits();
        memcpy(&x, &u, sizeof u);
    } else {
        uint64_t u = uint64_t(random_bits()) << 32 | random_bits();
        if (i % 2) u = (u & 0x800fffffffffffff) | uint64_t(1023 - 30 + random_bits() % 60) << 52;
        memcpy(&x, &u, sizeof u);
    }
    return x;
}

template <class T> void mix(uint64_t& sum, const std::vector<T>& values) {
    for (T x : values) {
        uint64_t bits = 0x7ff;
        if (x == x) memcpy(&bits, &x, sizeof x);
        sum = (sum ^ bits) * 1099511628211ull;
    }
}

template <class T> uint64_t checksum(Compute compute) {
    uint64_t sum = 14695981039346656037ull;
    const Kernels& kernels = kernels_checked;
    for (int rule = 0; rule < rules; ++rule)
        for (int variant = 0; variant < max_variants; ++variant) {
            Update update = kernels.update[rule][variant][int(compute)];
            if (!update) continue;
            std::vector<T> p(1003), g = p, a = p, b = p, c = p;
            for (auto* x : {&p, &g, &a, &b, &c})
                for (T& y : *x) y = random_value<T>();
            void* states[] = {a.data(), b.data(), c.data()};
            update(int64_t(p.size()), p.data(), g.data(), states, {variant, -1, {.013, .91, .88, .07, .3, 1.7, 1e-3}});
            for (auto* x : {&p, &a, &b, &c}) mix(sum, *x);
        }
    for (int d = 0; d < dtypes; ++d) {
        const int size = itemsize(Dtype(d));
        std::vector<T> x(1 << 18), back(x.size());
        std::vector<char> stored(x.size() * size);
        for (size_t i = 0; i < x.size(); ++i) x[i] = random_pattern<T>(int(i));
        kernels.store[d][int(compute)](int64_t(x.size()), x.data(), stored.data(), size);
        kernels.load[d][int(compute)](int64_t(x.size()), stored.data(), size, back.data());
        mix(sum, back);
    }
    return sum;
}

}  // namespace

int main() {
    printf("%016llx ", (unsigned long long)checksum<float>(Compute::float32));
    printf("%016llx\n", (unsigned long long)checksum<double>(Compute::float64));
}
