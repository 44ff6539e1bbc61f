// Lion: Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675), algorithm 2.
#pragma once
#include "vocabulary.hpp"

namespace fastgd {
namespace FASTGD_UNIT {

template <bool...> struct lion {
    enum { exp_avg, states };

    template <class T> struct Coefficients {
        T shrink, lr, beta1, w1, beta2, w2;  // shrink = 1 - lr * weight_decay; w = 1 - beta
    };

    template <class T> FASTGD_FN static void update(T& p, T g, T* s, const Coefficients<T>& c) {
        T u = sign(c.beta1 * s[exp_avg] + c.w1 * g);
        p = p * c.shrink - c.lr * u;
        s[exp_avg] = c.beta2 * s[exp_avg] + c.w2 * g;
    }
};

}  // namespace FASTGD_UNIT
}  // namespace fastgd
