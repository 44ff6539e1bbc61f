// Whether an optimizer still holds the objects that it held before: looked at in each step, so in C++.
#pragma once
#include "collected.hpp"

namespace fastgd {

void register_snapshot(pybind11::module_& m);

}  // namespace fastgd
