// Compiled once for every rule, with FASTGD_RULE its name: the kernels of its variants. And once without, for those of
// no rule.
#include "body.hpp"
#include "kernels.hpp"

namespace fastgd {
namespace {

struct Each {
    template <class F> __device__ __forceinline__ void operator()(F f) const {
        f(int(threadIdx.x));
        __syncthreads();
    }
    template <class F> __device__ __forceinline__ void alone(F f) const { f(int(threadIdx.x)); }
};

__device__ __forceinline__ Place place() {
    extern __shared__ __align__(16) char shared[];
    return {blockIdx.x, gridDim.x, shared};
}

// Thread blocks an SM is to hold at once: enough loads on their way, and few enough that registers do not spill much.
template <class T> constexpr int residents = sizeof(T) == 4 ? 4 : 2;

#if defined(FASTGD_RULE)

template <class Rule, class T>
__global__ void __launch_bounds__(threads, residents<T>) step(const __grid_constant__ Launch l) {
    step_body<Rule, T>(l, place(), Each());
}

enum {
#define RULE(name, ...) flags_of_##name = count(__VA_ARGS__),
    FASTGD_RULES(RULE)
#undef RULE
};

template <template <bool...> class Rule, int flags, int mask = 0> const void* find(int variant, Compute compute) {
    if constexpr (mask < (1 << flags)) {
        using R = typename fastgd::variant<Rule, flags, mask>::type;
        if (variant != mask) return find<Rule, flags, mask + 1>(variant, compute);
        return compute == Compute::float32 ? reinterpret_cast<const void*>(step<R, float>)
                                           : reinterpret_cast<const void*>(step<R, double>);
    }
    return nullptr;
}

}  // namespace

#define FASTGD_PASTE(a, b) a##b
#define FASTGD_NAME(a, b) FASTGD_PASTE(a, b)
const void* FASTGD_NAME(step_kernel_, FASTGD_RULE)(int variant, Compute compute) {
    return find<FASTGD_RULE, FASTGD_NAME(flags_of_, FASTGD_RULE)>(variant, compute);
}

#else

__global__ void __launch_bounds__(threads) read(const __grid_constant__ Launch l) { read_body(l, place(), Each()); }

template <class T> __global__ void __launch_bounds__(threads, residents<T>) average(const __grid_constant__ Launch l) {
    average_body<T>(l, place(), Each());
}

}  // namespace

const void* read_kernel() { return reinterpret_cast<const void*>(read); }
const void* average_kernel(Compute compute) {
    return compute == Compute::float32 ? reinterpret_cast<const void*>(average<float>)
                                       : reinterpret_cast<const void*>(average<double>);
}

#endif

}  // namespace fastgd
