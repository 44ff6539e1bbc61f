// Adam: Kingma & Ba (arXiv 1412.6980), algorithm 1, with L2 decay as torch.optim.Adam; amsgrad: Reddi et al.
// (arXiv 1904.09237), algorithm 2, the maximum taken before the bias correction as torch does.
#pragma once
#include "vocabulary.hpp"

namespace fastgd {
namespace FASTGD_UNIT {

template <bool decay, bool amsgrad> struct adam {
    enum { exp_avg, exp_avg_sq, max_exp_avg_sq, states = amsgrad ? 3 : 2 };

    template <class T> struct Coefficients {
        T weight_decay, w1, beta2, w2, step_size, inv_bias2, eps;  // w = 1 - beta; inv_bias2 = 1 / sqrt(1 - beta2^t)
    };

    template <class T> FASTGD_FN static void update(T& p, T g, T* s, const Coefficients<T>& c) {
        if constexpr (decay) g = g + c.weight_decay * p;
        s[exp_avg] = s[exp_avg] + c.w1 * (g - s[exp_avg]);
        s[exp_avg_sq] = c.beta2 * s[exp_avg_sq] + c.w2 * (g * g);
        T d = s[exp_avg_sq];
        if constexpr (amsgrad) d = s[max_exp_avg_sq] = max(s[max_exp_avg_sq], d);
        p = p - c.step_size * (s[exp_avg] / (sqrt(d) * c.inv_bias2 + c.eps));
    }
};

}  // namespace FASTGD_UNIT
}  // namespace fastgd
