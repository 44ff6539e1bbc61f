#include "step.hpp"

#include "arrays.hpp"
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

void run_jobs(const std::vector<Job>& jobs) {
    int64_t n = 0;
    for (const Job& job : jobs) n += job.n;
    if (n <= short_work) return run(jobs);
    py::gil_scoped_release release;
    run(jobs);
}

namespace {

bool step(py::handle name, py::handle rows, py::handle row_of, py::handle params, py::handle grads, py::handle states,
          bool checked) {
    const RuleId id = find_rule(name);
    const Items given_rows(rows), s(states), p(params), g(grads);
    std::vector<Row> table;
    table.reserve(given_rows.size());
    for (Py_ssize_t i = 0; i < given_rows.size(); ++i) table.push_back(read_row(id, given_rows[i]));
    if (table.empty()) throw py::value_error("rows: expected at least one");
    const int count = int(s.size()), operands = 2 + count;
    if (count != registry()[id].states[table[0].variant]) throw py::value_error("states: not as many as the rule has");

    if (!g.alike(p)) return false;
    std::vector<Items> state;
    state.reserve(count);
    for (int k = 0; k < count; ++k)
        if (!state.emplace_back(py::handle(s[k])).alike(p)) return false;

    std::vector<Job> jobs;
    std::vector<std::vector<int64_t>> storage;
    std::vector<Span> spans;
    jobs.reserve(p.size());
    if (!checked) spans.reserve(p.size() * operands);
    for (Py_ssize_t i = 0; i < p.size(); ++i) {
        const bool skip = g[i] == Py_None;
        View views[max_operands];
        for (int k = 0; k < operands; ++k) {
            if (k == 1 && skip) continue;
            if (!read(k == 0 ? p[i] : k == 1 ? g[i] : state[k - 2][i], views[k], checked)) return false;
            if (!same_shape(views[k], views[0])) return false;
            if (k != 1 && !views[k].writeable) return false;
            if (checked) continue;
            if (k != 1 && !injective(views[k])) return false;
            spans.push_back(span(views[k], k != 1));
        }
        if (skip) continue;
        Py_ssize_t row = 0;
        if (!row_of.is_none()) row = PyLong_AsSsize_t(py::object(row_of[py::int_(i)]).ptr());
        if (row < 0 || row >= Py_ssize_t(table.size())) throw py::value_error("row_of: no such row");
        jobs.push_back(describe(id, table[row], views, operands, storage));
    }
    if (!checked && !disjoint(spans)) return false;
    run_jobs(jobs);
    return true;
}

}  // namespace

void register_step(py::module_& m) {
    m.def("step", &step, py::arg("rule"), py::arg("rows"), py::arg("row_of"), py::arg("params"), py::arg("grads"),
          py::arg("states"), py::arg("checked"));
}

}  // namespace fastgd
