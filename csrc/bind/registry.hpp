// The rules as Python sees them: names, flags, numbers; and their rows, read.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

#include "../cpu/kernels.hpp"

namespace fastgd {

struct Rule {
    const char* name;
    std::vector<const char*> flags;
    int coefficients;
    int states[max_variants];  // how many, by variant
};

const std::vector<Rule>& registry();
RuleId find_rule(pybind11::handle name);

// (variant, sign, c0, c1, ...) as coefficients.py makes it.
Row read_row(RuleId id, pybind11::handle row);

}  // namespace fastgd
