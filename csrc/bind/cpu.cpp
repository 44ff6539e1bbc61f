#include "backend.hpp"

namespace py = pybind11;

namespace fastgd {

bool holds(dlpack::DeviceType type) { return type == dlpack::cpu || type == dlpack::cuda_host; }
bool holds_ndarrays() { return true; }

bool defers(const Extras&) { return false; }
std::unique_ptr<Tally> tally_for(const Extras&, const std::vector<int64_t>&, const View&) { return nullptr; }

py::object run_jobs(const Call& call, const Extras& extras, bool& skipped) {
    const OnePass& ask = extras.ask;
    const Reduce reduce = reduce_of(call, extras);
    int64_t n = 0;
    for (const Job& job : call.jobs) n += job.n;
    Outcome outcome;
    if (n <= short_work) {
        outcome = run(call.jobs, ask, reduce);
    } else {
        py::gil_scoped_release release;
        outcome = run(call.jobs, ask, reduce);
    }
    skipped = outcome.skipped;
    if (!ask.stats && !ask.skip_nonfinite) return py::bool_(true);
    return told(outcome, call.index, call.params, ask.stats);
}

}  // namespace fastgd
