// Sums have a shape: a fixed tree that depends on an array's length alone, so that a norm has the same bits whoever
// computes which part of it. An array is cut into blocks; in a block each lane adds its elements in order, in float64;
// the lanes are combined as a binary tree, the blocks in order by groups, the groups in order.
#pragma once
#include <stdint.h>

#include "../rules/vocabulary.hpp"

namespace fastgd {

constexpr int64_t block = 1024;  // elements
constexpr int lanes = 16;        // lane j of a block has its elements j, j + 16, j + 32, ...
constexpr int64_t group = 256;   // blocks: short enough chains for a processor that adds many at once

namespace FASTGD_UNIT {

// The sum of a block; the lanes are zero again afterwards.
FASTGD_FN double take(double (&lane)[lanes]) {
    for (int half = lanes / 2; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    const double sum = lane[0];
    for (double& x : lane) x = 0;
    return sum;
}

// In order. volatile: on a GPU others may just have written them, and a cache would not know.
FASTGD_FN double add(const volatile double* x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += x[i];
    return sum;
}

// By what gradients of this sum of squares are multiplied to have at most this norm; NaN stays.
FASTGD_FN double clip_factor(double max_norm, double total) {
    const double factor = max_norm / (sqrt(total) + 1e-6);
    return factor > 1 ? 1 : factor;
}

}  // namespace FASTGD_UNIT
}  // namespace fastgd
