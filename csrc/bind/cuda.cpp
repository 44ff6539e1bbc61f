#include "cuda.hpp"

#include <pybind11/stl.h>

#include "../cuda/call.hpp"
#include "../cuda/coefficients.hpp"
#include "backend.hpp"
#include "registry.hpp"

namespace py = pybind11;

namespace fastgd {
namespace {

device::Stream stream_of(const Extras& extras, const View& first) {
    const int device = first.device == unknown_device ? device::of(first.data) : first.device;
    const std::optional<uintptr_t> handle = extras.stream ? extras.stream : current_stream(first);
    return {device, reinterpret_cast<void*>(handle.value_or(0))};
}

class DeviceTally : public Tally {
  public:
    DeviceTally(const std::vector<int64_t>& steps, device::Stream stream) : counters(steps, stream) {}
    std::vector<int64_t> read() const override { return counters.read(); }

    Counters counters;
};

// What a call tells, fetched when someone looks.
class Result {
  public:
    Result(std::shared_ptr<Pending> pending, const Call& call, bool stats)
        : pending(std::move(pending)), index(call.index), params(call.params), stats(stats) {}

    Result(Result&&) = default;
    ~Result() {  // gives a buffer back, for which another thread may have to finish, which may want the GIL
        py::gil_scoped_release release;
        pending.reset();
    }

    py::object fetch() const {
        Outcome outcome;
        {
            py::gil_scoped_release release;
            outcome = pending->outcome();
        }
        return told(outcome, index, params, stats);
    }

  private:
    std::shared_ptr<Pending> pending;
    std::vector<Py_ssize_t> index;
    Py_ssize_t params;
    bool stats;
};

// Arrays in a stream that was named: whoever allocated them may not know that it uses them, and give their memory away.
class Kept {
  public:
    static void keep(std::vector<py::object> arrays, device::Stream stream) {
        static auto* all = new std::vector<Kept>;  // never destroyed: there may be no Python then
        std::erase_if(*all, [](const Kept& kept) { return kept.used->passed(); });
        all->push_back({std::move(arrays), std::make_unique<device::Event>(stream)});
    }

    std::vector<py::object> arrays;
    std::unique_ptr<device::Event> used;
};

}  // namespace

bool holds(dlpack::DeviceType type) { return device::holds(type); }
bool holds_ndarrays() { return device::is_host; }

bool defers(const Extras& extras) { return extras.ask.skip_nonfinite; }

std::unique_ptr<Tally> tally_for(const Extras& extras, const std::vector<int64_t>& steps, const View& first) {
    return std::make_unique<DeviceTally>(steps, stream_of(extras, first));
}

py::object run_jobs(const Call& call, const Extras& extras, bool& skipped) {
    skipped = false;
    const OnePass& ask = extras.ask;
    const bool asked = ask.stats || ask.skip_nonfinite;
    if (call.jobs.empty()) return asked ? told({}, call.index, call.params, ask.stats) : py::bool_(true);
    Into into{stream_of(extras, *call.first), nullptr, {}, reduce_of(call, extras)};
    if (call.tally) {
        into.counters = &static_cast<DeviceTally*>(call.tally)->counters;
        into.counter.assign(call.index.begin(), call.index.end());
    }
    std::shared_ptr<Pending> pending;
    {
        py::gil_scoped_release release;
        pending = submit(call.jobs, ask, into);
    }
    if (extras.stream) Kept::keep(call.arrays, into.stream);
    return pending ? py::cast(Result(std::move(pending), call, ask.stats)) : py::bool_(true);
}

void register_cuda(py::module_& m) {
    py::class_<Result>(m, "Result").def("fetch", &Result::fetch);
    m.def(
        "device_of", [](uintptr_t address) { return device::of(reinterpret_cast<const void*>(address)); },
        py::arg("address"));
    m.def("architectures", &device::architectures);
    m.def("devices", [] {
        const device::Devices found = device::devices();
        return py::make_tuple(found.names, found.why_none);
    });
    m.def(
        "coefficients",
        [](py::handle name, const std::vector<double>& hyperparameters, int64_t step) {
            const RuleId id = find_rule(name);
            double h[max_coefficients] = {}, c[max_coefficients];
            if (int(hyperparameters.size()) != registry()[id].hyperparameters)
                throw py::value_error("hyperparameters: not as many as the rule has");
            std::copy(hyperparameters.begin(), hyperparameters.end(), h);
            coefficients(id, h, step, c);
            return std::vector<double>(c, c + registry()[id].coefficients);
        },
        py::arg("rule"), py::arg("hyperparameters"), py::arg("step"));
}

}  // namespace fastgd
