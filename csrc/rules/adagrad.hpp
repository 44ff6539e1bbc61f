// Adagrad: Duchi, Hazan & Singer (JMLR 12, 2011), diagonal form, with torch.optim.Adagrad's decays.
#pragma once
#include "vocabulary.hpp"

namespace fastgd {
namespace FASTGD_UNIT {

template <bool decay> struct adagrad {
    enum { sum, states };

    template <class T> struct Coefficients {
        T rate, weight_decay, eps;  // rate = lr / (1 + (step - 1) * lr_decay)
    };

    template <class T> FASTGD_FN static void update(T& p, T g, T* s, const Coefficients<T>& c) {
        if constexpr (decay) g = g + c.weight_decay * p;
        s[sum] = s[sum] + g * g;
        p = p - c.rate * (g / (sqrt(s[sum]) + c.eps));
    }
};

}  // namespace FASTGD_UNIT
}  // namespace fastgd
