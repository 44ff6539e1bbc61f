// fastgd._core: the table of contents.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>

#include "../cpu/dispatch.hpp"
#include "../cpu/pool.hpp"
#include "registry.hpp"
#include "snapshot.hpp"
#include "step.hpp"
#include "stream.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
    using namespace fastgd;
    m.doc() = "The compiled half of fastgd: fused update kernels for every instruction set, and their dispatch.";

    const char* forced = std::getenv("FASTGD_ISA");
    try {
        choose_isa(forced && *forced ? forced : nullptr);
    } catch (const std::runtime_error& error) {
        throw py::import_error(error.what());
    }
    start_anew_in_forked_children();
    m.def("isa", [] { return isa(); });
    m.def("available_isas", &available_isas);
    m.def("get_num_threads", &get_num_threads);
    m.def("set_num_threads", &set_num_threads, py::arg("n"));

    register_rules(m);
    m.def("learn", &learn, py::arg("type"), py::arg("lazy"));
    m.def("call_with_written", &Touched::call, py::arg("written"));
    register_step(m);
    register_prepared(m);
    register_snapshot(m);
    register_stream(m);
}
