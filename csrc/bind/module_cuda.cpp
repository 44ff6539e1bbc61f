// fastgd._cuda: the table of contents.
#include <pybind11/pybind11.h>

#include "arrays.hpp"
#include "cuda.hpp"
#include "registry.hpp"
#include "step.hpp"

#if !defined(FASTGD_MODULE)
#define FASTGD_MODULE _cuda
#endif

PYBIND11_MODULE(FASTGD_MODULE, m, pybind11::mod_gil_not_used()) {
    using namespace fastgd;
    m.doc() = "The steps of fastgd for arrays on a GPU.";
    register_rules(m);
    m.def("learn", &learn, pybind11::arg("type"), pybind11::arg("lazy"));
    m.def("call_with_written", &Touched::call, pybind11::arg("written"));
    register_step(m);
    register_prepared(m);
    register_cuda(m);
}
