// python/fastgd/coefficients.py once more, for step counts that only the device knows: from a rule's hyperparameters,
// lr first, and the 1-based step to its coefficients, in float64, with the same bits.
#pragma once
#include "../cpu/kernels.hpp"

namespace fastgd {
namespace FASTGD_UNIT {

FASTGD_FN double power(double base, int64_t exponent) {
    double result = 1;
    for (;; base *= base) {
        if (exponent & 1) result *= base;
        exponent >>= 1;
        if (!exponent) return result;
    }
}

// How many hyperparameters; each function below names them.
enum {
    sgd_hyperparameters = 4,
    adam_hyperparameters = 5,
    adamw_hyperparameters = 5,
    adagrad_hyperparameters = 4,
    rmsprop_hyperparameters = 5,
    lion_hyperparameters = 4,
};

// h: lr, momentum, dampening, weight_decay
FASTGD_FN void sgd_coefficients(const double* h, int64_t step, double* c) {
    c[0] = h[0];
    c[1] = h[1];
    c[2] = step == 1 ? 1 : 1 - h[2];
    c[3] = h[3];
}

// w1, beta2, w2, step_size, inv_bias2
FASTGD_FN void moments(double lr, double beta1, double beta2, int64_t step, double* c) {
    c[0] = 1 - beta1;
    c[1] = beta2;
    c[2] = 1 - beta2;
    c[3] = lr / (1 - power(beta1, step));
    c[4] = 1 / sqrt(1 - power(beta2, step));
}

// h: lr, beta1, beta2, eps, weight_decay
FASTGD_FN void adam_coefficients(const double* h, int64_t step, double* c) {
    c[0] = h[4];
    moments(h[0], h[1], h[2], step, c + 1);
    c[6] = h[3];
}

FASTGD_FN void adamw_coefficients(const double* h, int64_t step, double* c) {
    adam_coefficients(h, step, c);
    c[0] = 1 - h[0] * h[4];
}

// h: lr, lr_decay, weight_decay, eps
FASTGD_FN void adagrad_coefficients(const double* h, int64_t step, double* c) {
    c[0] = h[0] / (1 + double(step - 1) * h[1]);
    c[1] = h[2];
    c[2] = h[3];
}

// h: lr, alpha, weight_decay, momentum, eps
FASTGD_FN void rmsprop_coefficients(const double* h, int64_t, double* c) {
    c[0] = h[0];
    c[1] = h[1];
    c[2] = 1 - h[1];
    c[3] = h[2];
    c[4] = h[3];
    c[5] = h[4];
}

// h: lr, beta1, beta2, weight_decay
FASTGD_FN void lion_coefficients(const double* h, int64_t, double* c) {
    c[0] = 1 - h[0] * h[3];
    c[1] = h[0];
    c[2] = h[1];
    c[3] = 1 - h[1];
    c[4] = h[2];
    c[5] = 1 - h[2];
}

FASTGD_FN void coefficients(int rule, const double* h, int64_t step, double* c) {
    switch (rule) {
#define RULE(name, ...) \
    case rule_##name: return name##_coefficients(h, step, c);
        FASTGD_RULES(RULE)
#undef RULE
    }
}

}  // namespace FASTGD_UNIT
}  // namespace fastgd
