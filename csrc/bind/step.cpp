#include "step.hpp"

#include <pybind11/stl.h>

#include <limits>
#include <tuple>

#include "backend.hpp"
#include "registry.hpp"

namespace py = pybind11;

namespace fastgd {

Items::Items(py::handle x) : many(true) {
    auto owned = [](PyObject* object) {
        if (!object) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(object);
    };
    if (PyDict_CheckExact(x.ptr())) {
        keys = owned(PyDict_Keys(x.ptr()));
        held = owned(PySequence_Tuple(owned(PyDict_Values(x.ptr())).ptr()));
    } else if (PyList_Check(x.ptr()) || PyTuple_Check(x.ptr())) {
        held = owned(PySequence_Tuple(x.ptr()));
    } else {
        held = py::reinterpret_borrow<py::object>(x);
        many = false;
    }
}

bool Items::alike(const Items& other) const {
    if (many != other.many || size() != other.size() || !keys != !other.keys) return false;
    return !keys || keys.equal(other.keys);
}

Extras::Extras(py::handle tuple) {
    if (tuple.is_none()) return;
    auto [grad_scale, max_norm, skip_nonfinite, ema_, ema_weight, copies_, zero_grads, stats, tracked_, reduce_,
          stream_] = py::cast<std::tuple<double, std::optional<double>, bool, py::object, double, py::object, bool,
                                         bool, py::object, py::object, std::optional<uintptr_t>>>(tuple);
    ask = {grad_scale, max_norm.has_value(), max_norm.value_or(0), skip_nonfinite, !ema_.is_none(),
           ema_weight, !copies_.is_none(),   zero_grads,           stats};
    if (ask.ema) ema.emplace(ema_);
    if (ask.copies) copies.emplace(copies_);
    if (!tracked_.is_none()) {
        const py::tuple pair(tracked_);
        tracked.emplace(Items(pair[0]), Items(pair[1]));
        if (tracked->first.size() != tracked->second.size())
            throw py::value_error("tracked: expected as many averages");
    }
    if (!reduce_.is_none()) reduce = reduce_;
    stream = stream_;
}

std::vector<py::object> Extras::arrays() const {
    std::vector<py::object> all;
    for (const std::optional<Items>* items : {&ema, &copies})
        if (*items) all.push_back((*items)->arrays());
    if (tracked) all.insert(all.end(), {tracked->first.arrays(), tracked->second.arrays()});
    return all;
}

bool Extras::read(Py_ssize_t i, const View& param, View* views, int& operands, bool checked) const {
    for (const std::optional<Items>* items : {&ema, &copies}) {
        if (!*items || (items == &ema && !has_ema(i))) continue;
        View& view = views[operands++];
        if (!fastgd::read((**items)[i], view, checked) || !view.writeable || !same_shape(view, param)) return false;
        if (items == &copies && (view.dtype == Dtype::float64 || itemsize(view.dtype) > itemsize(param.dtype)))
            return false;
    }
    return true;
}

namespace {

std::vector<double> by_param(const std::vector<double>& by_job, const std::vector<Py_ssize_t>& index, Py_ssize_t params,
                             double absent, double otherwise) {
    std::vector<double> all(params, absent);
    for (size_t k = 0; k < index.size(); ++k) all[index[k]] = by_job.empty() ? otherwise : by_job[k];
    return all;
}

}  // namespace

Reduce reduce_of(const Call& call, const Extras& extras) {
    if (!extras.reduce) return nullptr;
    return [&](const std::vector<double>& grads, int64_t nonfinite) {
        py::gil_scoped_acquire hold;
        return py::cast<std::pair<double, int64_t>>(
            extras.reduce(by_param(grads, call.index, call.params, 0, 0), nonfinite));
    };
}

py::object told(const Outcome& outcome, const std::vector<Py_ssize_t>& index, Py_ssize_t params, bool stats) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    auto told = [&](const std::vector<double>& by_job, double otherwise) {
        return stats ? by_param(by_job, index, params, nan, otherwise) : std::vector<double>();
    };
    return py::make_tuple(outcome.skipped, outcome.nonfinite, outcome.clip_factor, told(outcome.grads, nan),
                          told(outcome.updates, 0), told(outcome.params, nan));
}

namespace {

py::object step(py::handle name, py::handle rows, py::handle row_of, py::handle params, py::handle grads,
                py::handle states, bool checked, py::handle one_pass) {
    const py::bool_ refused(false);
    const RuleId id = find_rule(name);
    const Items given_rows(rows), s(states), p(params), g(grads);
    const Extras extras(one_pass);
    std::vector<Row> table;
    table.reserve(given_rows.size());
    for (Py_ssize_t i = 0; i < given_rows.size(); ++i) table.push_back(read_row(id, given_rows[i]));
    if (table.empty()) throw py::value_error("rows: expected at least one");
    const int count = int(s.size());
    for (const Row& row : table)
        if (count != registry()[id].states[row.variant]) throw py::value_error("states: not as many as the rule has");

    if (!g.alike(p) || (extras.ema && !extras.ema->alike(p)) || (extras.copies && !extras.copies->alike(p)))
        return refused;
    std::vector<Items> state;
    state.reserve(count);
    for (int k = 0; k < count; ++k)
        if (!state.emplace_back(py::handle(s[k])).alike(p)) return refused;

    std::vector<Job> jobs;
    std::vector<Py_ssize_t> index;
    std::optional<View> first;
    Storage storage;
    std::vector<Span> spans;
    Touched touched;
    jobs.reserve(p.size());
    if (!checked) spans.reserve(p.size() * (2 + count));
    for (Py_ssize_t i = 0; i < p.size(); ++i) {
        const bool skip = g[i] == Py_None;
        View views[max_operands];
        int operands = 2 + count;
        for (int k = 0; k < operands; ++k) {
            if (k == 1 && skip) continue;
            if (!read(k == 0 ? p[i] : k == 1 ? g[i] : state[k - 2][i], views[k], checked)) return refused;
            if (!same_shape(views[k], views[0])) return refused;
        }
        if (!first) first = views[0];
        if (!extras.read(i, views[0], views, operands, checked)) return refused;
        for (int k = 0; k < operands; ++k) {
            if (k == 1 && skip) continue;
            const bool written = k != 1 || extras.ask.zero_grads;
            if ((written && !views[k].writeable) || views[k].apart(*first)) return refused;
            if (written && !skip) touched.add(views[k]);
            if (checked) continue;
            if (written && !injective(views[k])) return refused;
            spans.push_back(span(views[k], written));
        }
        if (skip) continue;
        Py_ssize_t row = 0;
        if (!row_of.is_none()) row = PyLong_AsSsize_t(py::object(row_of[py::int_(i)]).ptr());
        if (row < 0 || row >= Py_ssize_t(table.size())) throw py::value_error("row_of: no such row");
        Job& job = jobs.emplace_back();
        job.ema = extras.ask.ema;
        job.copy = extras.ask.copies;
        describe(job, id, &table[row], views, operands, extras.ask, storage);
        index.push_back(i);
    }
    if (!checked && !disjoint(spans)) return refused;
    Call call{jobs, index, p.size(), first ? &*first : nullptr, extras.arrays(), nullptr};
    for (const Items* items : {&p, &g}) call.arrays.push_back(items->arrays());
    for (const Items& items : state) call.arrays.push_back(items.arrays());
    bool skipped;
    const py::object result = run_jobs(call, extras, skipped);
    if (!skipped) touched.tell();
    return result;
}

}  // namespace

void register_step(py::module_& m) {
    m.def("step", &step, py::arg("rule"), py::arg("rows"), py::arg("row_of"), py::arg("params"), py::arg("grads"),
          py::arg("states"), py::arg("checked"), py::arg("one_pass") = py::none());
}

}  // namespace fastgd
