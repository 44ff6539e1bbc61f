#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <map>

#include "arrays.hpp"
#include "registry.hpp"
#include "step.hpp"

namespace py = pybind11;

namespace fastgd {
namespace {

class Prepared {
  public:
    explicit Prepared(py::handle name) : id(find_rule(name)) {}

    void add(int group, py::handle params) {
        Exclusive alone(*this);
        Items items(params);
        for (Py_ssize_t i = 0; i < items.size(); ++i) {
            View view;
            if (!read(items[i], view, true)) throw py::type_error("params: expected NumPy arrays");
            entries.push_back({py::reinterpret_borrow<py::object>(items[i]), {}, -1, group, 0});
        }
        stale = true;
    }

    py::object step(py::handle grads, py::handle coefficients, py::handle initialise, bool checked,
                    py::handle one_pass) {
        const py::bool_ refused(false);
        Exclusive alone(*this);
        const Items g(grads);
        const Extras extras(one_pass);
        const OnePass& ask = extras.ask;
        auto fits = [&](const Items& items) { return !items.named() && items.size() == Py_ssize_t(entries.size()); };
        if (!fits(g) || (ask.ema && !fits(*extras.ema)) || (ask.copies && !fits(*extras.copies))) return refused;

        std::map<std::pair<int, int64_t>, Row> rows;  // nodes stay where they are: jobs point to them
        std::pair<int, int64_t> last{-1, -1};
        const Row* row = nullptr;
        std::vector<Job> jobs;
        std::vector<Py_ssize_t> index;
        Storage storage;
        std::vector<Span> spans;
        jobs.reserve(entries.size());
        index.reserve(entries.size());
        spans.reserve(entries.size());
        for (size_t i = 0; i < entries.size(); ++i) {
            const bool skip = g[i] == Py_None;
            if (skip && !ask.ema && !ask.copies) continue;
            Entry& entry = entries[i];
            View views[max_operands];
            if (!read(entry.param.ptr(), views[0], true)) return refused;
            int operands = 2;
            if (!skip) {
                if (!read(g[i], views[1], checked) || !views[0].writeable || !same_shape(views[0], views[1]))
                    return refused;
                const std::pair<int, int64_t> key{entry.group, entry.steps + 1};
                if (key != last) {
                    auto found = rows.find(key);
                    if (found == rows.end())
                        found = rows.emplace(key, read_row(id, coefficients(key.first, key.second))).first;
                    row = &found->second;
                    last = key;
                }
                if (entry.variant != row->variant) renew(i, *row, initialise);
                for (const py::object& state : entry.states) {
                    View& view = views[operands++];
                    if (!read(state.ptr(), view, true) || !view.writeable || !same_shape(view, views[0]))
                        return refused;
                }
            }
            const int extra = operands;
            if (!extras.read(i, views[0], views, operands, checked)) return refused;
            if (!checked) {
                if (!skip) spans.push_back(span(views[1], ask.zero_grads));
                for (int k = extra; k < operands; ++k) spans.push_back(span(views[k], true));
                if (!skip && ask.zero_grads && !(views[1].writeable && injective(views[1]))) return refused;
                for (int k = extra; k < operands; ++k)
                    if (!injective(views[k])) return refused;
            }
            if (skip) continue;
            jobs.push_back(describe(id, *row, views, operands, ask, storage));
            index.push_back(Py_ssize_t(i));
        }
        if (!checked) {
            if (stale) map_written();
            for (const Span& s : spans)
                if (meets_written(s)) return refused;
            if ((ask.ema || ask.copies || ask.zero_grads) && !disjoint(spans)) return refused;
        }
        bool skipped;
        py::object result = run_jobs(jobs, ask, index, g.size(), skipped);
        if (!skipped)
            for (Py_ssize_t i : index) ++entries[i].steps;
        return result;
    }

    std::vector<int64_t> steps() const {
        std::vector<int64_t> all;
        for (const Entry& entry : entries) all.push_back(entry.steps);
        return all;
    }

    void set_step(size_t index, int64_t n) {
        Exclusive alone(*this);
        entries.at(index).steps = n;
    }

    void reset(size_t index) {
        Exclusive alone(*this);
        entries.at(index).states.clear();
        entries.at(index).variant = -1;
        stale = true;
    }

  private:
    struct Entry {
        py::object param;
        std::vector<py::object> states;
        int variant;  // that the states were made for; -1: none were
        int group;
        int64_t steps;
    };

    // One caller at a time: the GIL is released within a step, and some Pythons have none.
    struct Exclusive {
        explicit Exclusive(Prepared& p) : busy(p.busy) {
            if (busy.exchange(true)) throw std::runtime_error("this optimizer is in the middle of a step already");
        }
        ~Exclusive() { busy = false; }
        std::atomic<bool>& busy;
    };

    // Asks Python for the states of parameter i.
    void renew(size_t i, const Row& row, py::handle initialise) {
        Entry& entry = entries[i];
        const int states = registry()[id].states[row.variant];
        entry.variant = -1;  // another variant's states may be as many, and others
        entry.states.clear();
        const Items made(initialise(i, row.variant));
        if (made.size() != states) throw py::value_error("initialise: not as many states as the rule has");
        for (int k = 0; k < states; ++k) entry.states.push_back(py::reinterpret_borrow<py::object>(made[k]));
        entry.variant = row.variant;
        stale = true;
    }

    // The spans of what steps write, sorted, with the furthest end up to each.
    void map_written() {
        written.clear();
        for (const Entry& entry : entries) {
            View view;
            if (read(entry.param.ptr(), view, true)) written.push_back(span(view, true));
            for (const py::object& state : entry.states)
                if (read(state.ptr(), view, true)) written.push_back(span(view, true));
        }
        std::sort(written.begin(), written.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
        const char* end = nullptr;
        for (Span& s : written) s.end = end = std::max(end, s.end);
        stale = false;
    }

    bool meets_written(const Span& s) const {
        if (s.begin == s.end) return false;
        auto after =
            std::partition_point(written.begin(), written.end(), [&](const Span& w) { return w.begin < s.end; });
        return after != written.begin() && std::prev(after)->end > s.begin;
    }

    const RuleId id;
    std::vector<Entry> entries;
    std::vector<Span> written;
    bool stale = true;
    std::atomic<bool> busy{false};
};

}  // namespace

void register_prepared(py::module_& m) {
    py::class_<Prepared>(m, "Prepared")
        .def(py::init<py::handle>(), py::arg("rule"))
        .def("add", &Prepared::add, py::arg("group"), py::arg("params"))
        .def("step", &Prepared::step, py::arg("grads"), py::arg("coefficients"), py::arg("initialise"),
             py::arg("checked"), py::arg("one_pass") = py::none())
        .def_property_readonly("steps", &Prepared::steps)
        .def("set_step", &Prepared::set_step, py::arg("index"), py::arg("n"))
        .def("reset", &Prepared::reset, py::arg("index"));
}

}  // namespace fastgd
