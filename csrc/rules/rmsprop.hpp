// RMSprop: Hinton, "Neural Networks for Machine Learning", lecture 6e (2012); centred: Graves (arXiv 1308.0850),
// equations 38 to 45. eps stands outside the root, as in torch.optim.RMSprop.
#pragma once
#include "vocabulary.hpp"

namespace fastgd {
namespace FASTGD_UNIT {

template <bool decay, bool centered, bool momentum> struct rmsprop {
    enum { square_avg, grad_avg = 1, momentum_buffer = centered ? 2 : 1, states = 1 + centered + momentum };

    template <class T> struct Coefficients {
        T lr, alpha, w, weight_decay, momentum_, eps;  // w = 1 - alpha
    };

    template <class T> FASTGD_FN static void update(T& p, T g, T* s, const Coefficients<T>& c) {
        if constexpr (decay) g = g + c.weight_decay * p;
        T v = s[square_avg] = c.alpha * s[square_avg] + c.w * (g * g);
        if constexpr (centered) {
            T m = s[grad_avg] = s[grad_avg] + c.w * (g - s[grad_avg]);
            v = v - m * m;
        }
        T u = g / (sqrt(v) + c.eps);
        if constexpr (momentum) u = s[momentum_buffer] = c.momentum_ * s[momentum_buffer] + u;
        p = p - c.lr * u;
    }
};

}  // namespace FASTGD_UNIT
}  // namespace fastgd
