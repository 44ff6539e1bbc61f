// Sums have a shape: a fixed tree that depends on an array's length alone, so that a norm has the same bits whoever
// computes which part of it. An array is cut into blocks; in a block each lane adds its elements in order, in float64;
// the lanes are combined as a binary tree, the blocks in order.
#pragma once
#include <stdint.h>

namespace fastgd {

constexpr int64_t block = 1024;  // elements
constexpr int lanes = 16;        // lane j of a block has its elements j, j + 16, j + 32, ...

// The sum of a block; the lanes are zero again afterwards.
inline double take(double (&lane)[lanes]) {
    for (int half = lanes / 2; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    const double sum = lane[0];
    for (double& x : lane) x = 0;
    return sum;
}

}  // namespace fastgd
