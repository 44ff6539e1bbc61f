#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <map>
#include <mutex>

#include "../cpu/pool.hpp"
#include "arrays.hpp"
#include "backend.hpp"
#include "collected.hpp"
#include "registry.hpp"
#include "step.hpp"

namespace py = pybind11;

namespace fastgd {
namespace {

class Prepared {
  public:
    Prepared(py::handle name, bool steady, bool capturable)
        : id(find_rule(name)), steady(steady), capturable(capturable) {}

    void add(int group, py::handle params) {
        Exclusive alone(*this);
        settle();
        const Items items(params);
        View view;
        for (Py_ssize_t i = 0; i < items.size(); ++i)
            if (!read(items[i], view, true)) throw py::type_error("params: expected arrays that can be read");
        std::lock_guard<std::mutex> hold(counting);
        for (Py_ssize_t i = 0; i < items.size(); ++i)
            entries.push_back({py::reinterpret_borrow<py::object>(items[i]), {}, {}, -1, group, 0, {}, {}});
        stale = true;
    }

    py::object step(py::handle grads, py::handle coefficients, py::handle initialise, bool checked,
                    py::handle one_pass) {
        const py::bool_ refused(false);
        Exclusive alone(*this);
        const Items g(grads);
        const Extras extras(one_pass);
        const OnePass& ask = extras.ask;
        auto flat = [&](const Items& items) { return !items.named() && items.size() == Py_ssize_t(entries.size()); };
        if (!flat(g) || (ask.ema && !flat(*extras.ema)) || (ask.copies && !flat(*extras.copies))) return refused;

        std::map<std::pair<int, int64_t>, Row> rows;  // nodes stay where they are: jobs point to them
        std::vector<const Row*> row_of;
        row_of.reserve(entries.size());
        auto find_rows = [&](const std::vector<size_t>& indices, bool counted) {
            auto last = rows.end();
            for (size_t i : indices) {
                if (entries[i].steps == std::numeric_limits<int64_t>::max())
                    throw py::value_error("step: expected a count below 2**63 - 1, which a parameter has reached");
                const std::pair<int, int64_t> key{entries[i].group, counted ? 0 : entries[i].steps + 1};
                if (last == rows.end() || last->first != key) last = rows.find(key);
                if (last == rows.end()) {
                    const py::object row = coefficients(key.first, key.second);
                    if (row.is_none()) return false;
                    last = rows.emplace(key, read_row(id, row, counted)).first;
                }
                row_of.push_back(&last->second);
            }
            return true;
        };
        const bool asked = steady && !capturable && !tally;
        if (asked) {  // what is read below then need not be read twice
            std::vector<size_t> indices;
            for (size_t i = 0; i < entries.size(); ++i)
                if (g[i] != Py_None) indices.push_back(i);
            find_rows(indices, false);
        }

        // The gradients first: nobody is asked for states, or a schedule, as long as one may be refused.
        stepping.clear();
        std::vector<Span> spans;  // of what is not the parameters' own
        std::vector<std::array<View, 2>> averages;
        for (size_t i = 0; i < entries.size(); ++i) {
            View param, grad, more[max_operands];
            const bool skip = g[i] == Py_None;
            if (skip && !ask.ema && !ask.copies) continue;
            if (!read(entries[i].param.ptr(), param, true)) return refused;
            int extra = 0;
            if (!extras.read(i, param, more, extra, checked)) return refused;
            for (int k = 0; k < extra; ++k) {
                if (!checked && !injective(more[k])) return refused;
                spans.push_back(span(more[k], true));
            }
            if (skip) {
                if (extras.partial() && extras.has_ema(i)) averages.push_back({param, more[0]});
                continue;
            }
            if (!read(g[i], grad, checked) || !fits(param, grad, checked, ask.zero_grads)) return refused;
            stepping.push_back({i, param, grad, span(param, true), span(grad, ask.zero_grads)});
            if (!(entries[i].mapped == stepping.back().param_span)) stale = true;
        }
        if (extras.partial()) {
            for (Py_ssize_t i = 0; i < extras.tracked->first.size(); ++i) {
                std::array<View, 2> pair;
                auto& [source, average] = pair;
                if (!read(extras.tracked->first[i], source, checked) ||
                    !read(extras.tracked->second[i], average, checked) || !average.writeable ||
                    !same_shape(source, average) || (!checked && !injective(average)))
                    return refused;
                spans.push_back(span(source, false));
                spans.push_back(span(average, true));
                averages.push_back(pair);
            }
        }
        if (!checked && meet(spans, ask.zero_grads)) return refused;

        if (capturable && !tally && !stepping.empty()) {
            std::lock_guard<std::mutex> hold(counting);
            tally = tally_for(extras, known_steps(), stepping[0].param);
        }
        if (!asked) {
            std::vector<size_t> indices;
            for (const Stepping& s : stepping) indices.push_back(s.index);
            if (!tally || !find_rows(indices, true)) {  // a rate that is a function of the step needs to know the step
                settle();
                rows.clear();
                row_of.clear();
                find_rows(indices, false);
            }
        }
        bool renewing = false;
        for (size_t k = 0; k < stepping.size(); ++k)
            renewing = renewing || entries[stepping[k].index].variant != row_of[k]->variant;
        if (renewing) {
            View param, view;
            for (const Stepping& s : stepping)
                for (const py::object& state : entries[s.index].states)
                    if (!read(entries[s.index].param.ptr(), param, true) || !fits_param(state, param, view))
                        return refused;
            for (size_t k = 0; k < stepping.size(); ++k)
                if (entries[stepping[k].index].variant != row_of[k]->variant)
                    renew(stepping[k].index, *row_of[k], initialise);
            if (!checked && meet(spans, ask.zero_grads)) return refused;
        }

        // What was called so far may have changed an array.
        jobs.clear();
        index.clear();
        counts.clear();
        Storage storage;
        Touched touched;
        for (size_t k = 0; k < stepping.size(); ++k) {
            const Stepping& s = stepping[k];
            const Entry& entry = entries[s.index];
            View views[max_operands] = {s.param, s.grad};
            int operands = 2;
            if ((renewing || !asked) &&
                (!read(entry.param.ptr(), views[0], true) || !read(g[s.index], views[1], checked) ||
                 !fits(views[0], views[1], checked, ask.zero_grads) || !(span(views[0], true) == s.param_span) ||
                 !(span(views[1], ask.zero_grads) == s.grad_span)))
                return refused;
            for (const py::object& state : entry.states)
                if (!fits_param(state, views[0], views[operands++])) return refused;
            const int states_end = operands;
            if (!extras.read(s.index, views[0], views, operands, checked)) return refused;
            for (int k = 0; k < operands; ++k)
                if (views[k].apart(stepping[0].param)) return refused;
            if (entry.count && !counts.emplace_back().read(entry.count, entry.steps)) return refused;
            Job& job = jobs.emplace_back();
            job.ema = extras.has_ema(s.index);
            job.copy = ask.copies;
            describe(job, id, row_of[k], views, operands, ask, storage);
            index.push_back(Py_ssize_t(s.index));
            touched.add(views[0]);
            if (ask.zero_grads) touched.add(views[1]);
            for (int e = states_end; e < operands; ++e) touched.add(views[e]);
        }
        for (const auto& pair : averages) {
            describe(jobs.emplace_back(), id, nullptr, pair.data(), 2, ask, storage);
            touched.add(pair[1]);
        }
        Call call{jobs, index, g.size(), nullptr, extras.arrays(), nullptr};
        if (!stepping.empty()) {
            call.first = &stepping[0].param;
            std::lock_guard<std::mutex> hold(counting);
            if (!tally && defers(extras)) tally = tally_for(extras, known_steps(), *call.first);
        } else if (!averages.empty()) {
            call.first = &averages[0][0];
        }
        call.tally = tally.get();
        call.arrays.push_back(g.arrays());
        bool skipped;
        py::object result = run_jobs(call, extras, skipped);
        if (!skipped) {
            if (!tally) {
                std::lock_guard<std::mutex> hold(counting);
                for (Py_ssize_t i : index) ++entries[i].steps;
            }
            for (const Count& count : counts) count.add_one();
            touched.tell();
        }
        return result;
    }

    std::vector<int64_t> steps() const {
        std::lock_guard<std::mutex> hold(counting);
        return tally ? tally->read() : known_steps();
    }

    // Takes new step counts and forgets all states: Python is asked for them again.
    void load(const std::vector<int64_t>& steps) {
        Exclusive alone(*this);
        if (steps.size() != entries.size()) throw py::value_error("steps: expected one a parameter");
        std::lock_guard<std::mutex> hold(counting);
        tally.reset();
        for (size_t i = 0; i < entries.size(); ++i) {
            entries[i].steps = steps[i];
            entries[i].states.clear();
            entries[i].count = {};
            entries[i].variant = -1;
        }
        stale = true;
    }

    // For the garbage collector: a tensor's hook may hold the optimizer that holds this.
    int traverse(visitproc visit, void* arg) const {
        for (const Entry& entry : entries) {
            Py_VISIT(entry.param.ptr());
            Py_VISIT(entry.count.ptr());
            for (const py::object& state : entry.states) Py_VISIT(state.ptr());
        }
        return 0;
    }
    void clear() {
        std::vector<Entry> dropped;
        std::swap(dropped, entries);
    }

  private:
    struct Entry {
        py::object param;
        std::vector<py::object> states;
        py::object count;  // a 0-d array of floats that shows the steps, where Python wants one
        int variant;       // that the states were made for; -1: none were
        int group;
        int64_t steps;
        Span mapped;    // where map_written saw the parameter
        Span harmless;  // of the last gradient that was looked at and met nothing
    };

    // Where a parameter's count is shown.
    struct Count {
        // False where it shows anything but `steps`: Python is to look closer.
        bool read(const py::object& count, int64_t steps) {
            if (!fastgd::read(count.ptr(), view, true, true) || view.ndim != 0) return false;
            if (view.dtype == Dtype::float32) return *reinterpret_cast<float*>(view.data) == float(steps);
            return view.dtype == Dtype::float64 && *reinterpret_cast<double*>(view.data) == double(steps);
        }
        void add_one() const {
            if (view.dtype == Dtype::float32)
                *reinterpret_cast<float*>(view.data) += 1;
            else
                *reinterpret_cast<double*>(view.data) += 1;
        }
        View view;
    };

    struct Stepping {
        size_t index;
        View param, grad;
        Span param_span, grad_span;
    };

    // One caller at a time: the GIL is released within a step, and some Pythons have none.
    struct Exclusive {
        explicit Exclusive(Prepared& p) : busy(p.busy) {
            // A forked child has none of the threads that were stepping: what they left does not count there.
            const uint64_t now = 1 + forks();
            if (busy.exchange(now) == now)
                throw std::runtime_error(
                    "this optimizer is in the middle of a step already; step it from one thread at a time");
        }
        ~Exclusive() { busy = 0; }
        std::atomic<uint64_t>& busy;
    };

    std::vector<int64_t> known_steps() const {
        std::vector<int64_t> all;
        for (const Entry& entry : entries) all.push_back(entry.steps);
        return all;
    }

    // Fetches the counts, where a device has them.
    void settle() {
        std::lock_guard<std::mutex> hold(counting);
        if (!tally) return;
        const std::vector<int64_t> steps = tally->read();
        for (size_t i = 0; i < entries.size(); ++i) entries[i].steps = steps[i];
        tally.reset();
    }

    // Whether a parameter can be stepped with this gradient, which is written too if `zeroed`.
    static bool fits(const View& param, const View& grad, bool checked, bool zeroed) {
        if (!param.writeable || !same_shape(param, grad) || (zeroed && !grad.writeable)) return false;
        return checked || (injective(param) && (!zeroed || injective(grad)));
    }

    static bool fits_param(const py::object& state, const View& param, View& view) {
        return read(state.ptr(), view, true) && view.writeable && same_shape(view, param);
    }

    // Asks Python for the states of parameter i.
    void renew(size_t i, const Row& row, py::handle initialise) {
        Entry& entry = entries[i];
        const int states = registry()[id].states[row.variant];
        entry.variant = -1;  // another variant's states may be as many, and others
        entry.states.clear();
        const Items made(initialise(i, row.variant));
        if (made.size() != states && made.size() != states + 1)
            throw py::value_error("initialise: not as many states as the rule has");
        for (int k = 0; k < states; ++k) entry.states.push_back(py::reinterpret_borrow<py::object>(made[k]));
        entry.count = made.size() > states ? py::reinterpret_borrow<py::object>(made[states]) : py::object();
        entry.variant = row.variant;
        stale = true;
    }

    // The spans of what steps write, sorted, with the furthest end up to each.
    void map_written() {
        written.clear();
        for (Entry& entry : entries) {
            View view;
            entry.harmless = {};
            if (read(entry.param.ptr(), view, true)) written.push_back(entry.mapped = span(view, true));
            for (const py::object& state : entry.states)
                if (read(state.ptr(), view, true)) written.push_back(span(view, true));
        }
        std::sort(written.begin(), written.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
        const char* end = nullptr;
        entangled = false;
        for (Span& s : written) {
            entangled = entangled || (steady && s.begin < end);
            s.end = end = std::max(end, s.end);
        }
        stale = false;
    }

    bool meets_written(const Span& s) const {
        if (s.begin == s.end) return false;
        auto after =
            std::partition_point(written.begin(), written.end(), [&](const Span& w) { return w.begin < s.end; });
        return after != written.begin() && std::prev(after)->end > s.begin;
    }

    // Whether a gradient or another span meets one that steps write, or, where some are written themselves, another.
    bool meet(std::vector<Span> spans, bool zeroed) {
        if (stale) map_written();
        if (entangled) return true;
        for (const Span& s : spans)
            if (meets_written(s)) return true;
        for (const Stepping& s : stepping) {
            Span& harmless = entries[s.index].harmless;
            if (harmless == s.grad_span) continue;
            if (meets_written(s.grad_span)) return true;
            harmless = s.grad_span;
        }
        if (spans.empty() && !zeroed) return false;
        for (const Stepping& s : stepping) spans.push_back(s.grad_span);
        return !disjoint(spans);
    }

    const RuleId id;
    const bool steady;      // coefficients are plain numbers, to be had before anything is read
    const bool capturable;  // a captured step counts each time that it is replayed
    std::vector<Entry> entries;
    std::unique_ptr<Tally> tally;  // the steps of each entry, once they are not known here
    std::vector<Span> written;
    // Of one step; kept, for hundreds of jobs are more than malloc keeps.
    std::vector<Stepping> stepping;
    std::vector<Job> jobs;
    std::vector<Py_ssize_t> index;
    std::vector<Count> counts;
    bool stale = true;
    bool entangled = false;  // some of `written` meet, and nobody has looked closer when they were added
    std::atomic<uint64_t> busy{0};
    mutable std::mutex counting;  // state_dict may read the counts while a step runs
};

}  // namespace

void register_prepared(py::module_& m) {
    py::class_<Prepared>(m, "Prepared", collected<Prepared>())
        .def(py::init<py::handle, bool, bool>(), py::arg("rule"), py::arg("steady") = false,
             py::arg("capturable") = false)
        .def("add", &Prepared::add, py::arg("group"), py::arg("params"))
        .def("step", &Prepared::step, py::arg("grads"), py::arg("coefficients"), py::arg("initialise"),
             py::arg("checked"), py::arg("one_pass") = py::none())
        .def_property_readonly("steps", &Prepared::steps)
        .def("load", &Prepared::load, py::arg("steps"));
}

}  // namespace fastgd
