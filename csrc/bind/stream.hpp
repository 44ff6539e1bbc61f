// The memory's own limit, for the benchmark: what an update must read and write, and nothing else.
#pragma once
#include <pybind11/pybind11.h>

namespace fastgd {

void register_stream(pybind11::module_& m);

}  // namespace fastgd
