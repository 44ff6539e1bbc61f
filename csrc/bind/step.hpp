// One call: `step` over lists of arrays, and `Prepared`, which an optimizer class keeps between steps. Both return
// False, with nothing changed, for whatever is not plainly right; Python then looks closer and finds the words.
#pragma once
#include <pybind11/pybind11.h>

#include "../cpu/pass.hpp"

namespace fastgd {

void register_step(pybind11::module_& m);
void register_prepared(pybind11::module_& m);

// What stands for one role of a call: a list or tuple of arrays, or one array alone. Owns a snapshot of the list.
class Items {
  public:
    explicit Items(pybind11::handle x);
    bool many() const { return many_; }
    Py_ssize_t size() const { return many_ ? PyTuple_GET_SIZE(held.ptr()) : 1; }
    PyObject* operator[](Py_ssize_t i) const { return many_ ? PyTuple_GET_ITEM(held.ptr(), i) : held.ptr(); }

  private:
    pybind11::object held;
    bool many_;
};

// Runs the jobs, without the GIL where that takes long enough to matter.
void run_jobs(const std::vector<Job>& jobs);

}  // namespace fastgd
