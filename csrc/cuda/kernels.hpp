// The kernels, as the CUDA runtime takes them.
#pragma once
#include "../cpu/kernels.hpp"

namespace fastgd {

const void* read_kernel();
const void* average_kernel(Compute compute);
#define RULE(name, ...) const void* step_kernel_##name(int variant, Compute compute);
FASTGD_RULES(RULE)
#undef RULE

}  // namespace fastgd
