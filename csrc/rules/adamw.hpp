// AdamW: Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), algorithm 2, as
// torch.optim.AdamW: the parameter shrinks by lr * weight_decay, then takes Adam's step.
#pragma once
#include "adam.hpp"

namespace fastgd {
namespace FASTGD_UNIT {

template <bool amsgrad> struct adamw {
    using step = adam<false, amsgrad>;
    enum { states = step::states };

    template <class T> struct Coefficients {
        T shrink;  // 1 - lr * weight_decay
        T w1, beta2, w2, step_size, inv_bias2, eps;
    };

    template <class T> FASTGD_FN static void update(T& p, T g, T* s, const Coefficients<T>& c) {
        p = p * c.shrink;
        step::update(p, g, s, {T(0), c.w1, c.beta2, c.w2, c.step_size, c.inv_bias2, c.eps});
    }
};

}  // namespace FASTGD_UNIT
}  // namespace fastgd
