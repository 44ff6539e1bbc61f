// What _cuda has beside the names that it shares with _core.
#pragma once
#include <pybind11/pybind11.h>

namespace fastgd {

void register_cuda(pybind11::module_& m);

}  // namespace fastgd
