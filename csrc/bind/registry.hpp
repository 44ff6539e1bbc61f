// The rules as Python sees them: names, flags, numbers; and their rows, read.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

#include "../cpu/kernels.hpp"

namespace fastgd {

struct Rule {
    const char* name;
    std::vector<const char*> flags;
    int coefficients, hyperparameters;
    int states[max_variants];  // how many, by variant
};

const std::vector<Rule>& registry();
RuleId find_rule(pybind11::handle name);

// (variant, sign, c0, c1, ...) as coefficients.py makes it; with `counted`, hyperparameters in their place, where lr
// may be on the device: a tuple of its address and whether it is float64, else float32.
Row read_row(RuleId id, pybind11::handle row, bool counted = false);

// RULES, as Python sees it.
void register_rules(pybind11::module_& m);

}  // namespace fastgd
