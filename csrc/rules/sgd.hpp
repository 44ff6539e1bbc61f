// SGD with momentum: Sutskever et al., "On the importance of initialization and momentum in deep learning" (ICML 2013),
// in the form of torch.optim.SGD: the buffer holds gradients, not steps.
#pragma once
#include "vocabulary.hpp"

namespace fastgd {
namespace FASTGD_UNIT {

template <bool decay, bool momentum, bool nesterov> struct sgd {
    enum { momentum_buffer, states = momentum ? 1 : 0 };

    template <class T> struct Coefficients {
        T lr, momentum_, gain, weight_decay;  // gain: 1 - dampening, but 1 at the first step
    };

    template <class T> FASTGD_FN static void update(T& p, T g, T* s, const Coefficients<T>& c) {
        if constexpr (decay) g = g + c.weight_decay * p;
        if constexpr (momentum) {
            T b = c.momentum_ * s[momentum_buffer] + c.gain * g;
            s[momentum_buffer] = b;
            g = nesterov ? g + c.momentum_ * b : b;
        }
        p = p - c.lr * g;
    }
};

}  // namespace FASTGD_UNIT
}  // namespace fastgd
