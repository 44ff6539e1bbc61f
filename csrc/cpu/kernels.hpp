// What one instruction set provides: plain loops over one tile, as function pointers.
#pragma once
#include <stdint.h>

#include "../pass/dtype.hpp"
#include "../rules.hpp"

namespace fastgd {

constexpr int max_states = 3;
constexpr int max_variants = 8;
constexpr int max_coefficients = 8;

enum RuleId {
#define RULE(name, ...) rule_##name,
    FASTGD_RULES(RULE)
#undef RULE
        rules
};

// A rule's numbers for one step, in float64; a kernel rounds them once to its compute type.
struct Row {
    int variant;
    double sign;  // -1 maximizes
    double coefficients[max_coefficients];
    // For a device that counts the steps itself: the coefficients are hyperparameters, lr first
    // (cuda/coefficients.hpp), or elsewhere on the device.
    bool counted = false;
    const void* lr = nullptr;
    Dtype lr_dtype = Dtype::float64;
};

// n elements in the compute type: p and states in place.
using Update = void (*)(int64_t n, void* p, const void* g, void* const* states, const Row& row);
// n elements that stand `stride` bytes apart, to or from a dense buffer in the compute type.
using Load = void (*)(int64_t n, const char* from, int64_t stride, void* to);
using Store = void (*)(int64_t n, const void* from, char* to, int64_t stride);
// The stages of the one pass beside the rule, over n elements in the compute type; lanes as in pass/sums.hpp.
using Scale = void (*)(int64_t n, const void* from, void* to, double divisor, double factor);  // x / divisor * factor
using Squares = void (*)(int64_t n, const void* x, const void* minus, double* lanes);  // adds (x - minus)^2 or x^2
using Blend = void (*)(int64_t n, void* average, const void* x, double weight);  // average += weight (x - average)
using Nonfinite = int64_t (*)(int64_t n, const void* x);
// n elements of each stream: one is read, the others are read and rewritten, unchanged where `mask` is 0, which no
// compiler knows. The memory's limit for an update.
using Stream = void (*)(int64_t n, const void* read, void* const* writes, uint32_t mask);

struct Kernels {
    Update update[rules][max_variants][computes];
    Load load[dtypes][computes];
    Store store[dtypes][computes];
    Scale scale[computes];
    Squares squares[computes];
    Blend blend[computes];
    Nonfinite nonfinite[computes];
    Stream stream[2][1 + max_states];  // [first two streams of 4 or of 2 bytes][streams written - 1]
};

}  // namespace fastgd
