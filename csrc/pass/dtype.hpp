// The dtypes of arrays, and the compute types: float64 for a float64 parameter, float32 for every other.
#pragma once
#include <stdint.h>

namespace fastgd {

enum class Dtype : uint8_t { float64, float32, float16, bfloat16 };
constexpr int dtypes = 4;
constexpr int itemsize(Dtype d) { return d == Dtype::float64 ? 8 : d == Dtype::float32 ? 4 : 2; }

enum class Compute : uint8_t { float32, float64 };
constexpr int computes = 2;
constexpr Compute compute_of(Dtype parameter) {
    return parameter == Dtype::float64 ? Compute::float64 : Compute::float32;
}
constexpr Dtype dtype_of(Compute c) { return c == Compute::float64 ? Dtype::float64 : Dtype::float32; }

}  // namespace fastgd
