// What the modules differ in: where arrays lie, what runs the jobs, and who knows how many steps were taken.
// cpu.cpp is for _core, cuda.cpp for _cuda.
#pragma once
#include <memory>

#include "dlpack.hpp"
#include "step.hpp"

namespace fastgd {

bool holds(dlpack::DeviceType type);  // whether the module steps tensors there
bool holds_ndarrays();                // whether it steps plain ndarrays

// Step counts that the host does not know: a device skips steps, and nobody has looked.
class Tally {
  public:
    virtual ~Tally() = default;
    virtual std::vector<int64_t> read() const = 0;
};

// A call's jobs, and what they belong to.
struct Call {
    const std::vector<Job>& jobs;
    const std::vector<Py_ssize_t>& index;  // the parameter of each job, except of the last, which are averages alone
    Py_ssize_t params;                     // how many there are
    const View* first;                     // an array of the call; null where there is none
    std::vector<pybind11::object> arrays;  // all of them, to be kept for a stream that their owners do not know of
    Tally* tally;                          // counts the steps, by parameter, where it is there
};

// Whether a call leaves the host in the dark on whether its step was skipped: then counts that begin with `steps`.
bool defers(const Extras& extras);
std::unique_ptr<Tally> tally_for(const Extras& extras, const std::vector<int64_t>& steps, const View& first);

// Runs the jobs, without the GIL where that takes long enough to matter. Returns what Python is to know: True, or with
// stats or skip_nonfinite a tuple, or what will give it. `skipped` is false, too, where nobody knows yet.
pybind11::object run_jobs(const Call& call, const Extras& extras, bool& skipped);

// An outcome as Python takes it.
pybind11::object told(const Outcome& outcome, const std::vector<Py_ssize_t>& index, Py_ssize_t params, bool stats);
Reduce reduce_of(const Call& call, const Extras& extras);

}  // namespace fastgd
