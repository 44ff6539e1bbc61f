// A rule alone in a kernel: without the division that unscales a gradient there is nothing whose machine code has a
// fused multiply-add of its own.
#include "rules.hpp"

namespace fastgd {
namespace {

using Rule = sgd<true, true, true>;

template <class T> __global__ void step(T* p, const T* g, T* s, Rule::Coefficients<T> c) {
    const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    Rule::update(p[i], g[i], s + i, c);
}

template __global__ void step<float>(float*, const float*, float*, Rule::Coefficients<float>);
template __global__ void step<double>(double*, const double*, double*, Rule::Coefficients<double>);

}  // namespace
}  // namespace fastgd
