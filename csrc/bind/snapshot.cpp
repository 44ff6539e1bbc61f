#include "snapshot.hpp"

#include <vector>

namespace py = pybind11;

namespace fastgd {
namespace {

// What an optimizer of torch's holds, by identity: the parameters of its groups, and its state with the states of each
// parameter. Its owner may change any of it between two steps.
class Snapshot {
  public:
    Snapshot(py::handle state, py::handle groups) {
        walk(state, groups, [this](PyObject* x) {
            seen.push_back(py::reinterpret_borrow<py::object>(x));
            return true;
        });
    }

    bool same(py::handle state, py::handle groups) const {
        size_t at = 0;
        auto is_next = [&](PyObject* x) { return at < seen.size() && seen[at++].ptr() == x; };
        return walk(state, groups, is_next) && at == seen.size();
    }

    int traverse(visitproc visit, void* arg) const {
        for (const py::object& x : seen) Py_VISIT(x.ptr());
        return 0;
    }
    void clear() {
        std::vector<py::object> dropped;
        std::swap(dropped, seen);
    }

  private:
    // Calls see(object) for one object after the other as long as it returns true. What has another form than torch
    // gives it is never the same.
    template <class See> static bool walk(py::handle state, py::handle groups, See see) {
        static PyObject* const params = PyUnicode_InternFromString("params");
        if (!PyDict_Check(state.ptr()) || !PyList_Check(groups.ptr())) return false;
        PyObject *key, *value, *name, *array;
        for (Py_ssize_t i = 0; PyDict_Next(state.ptr(), &i, &key, &value);) {
            if (!see(key) || !see(value)) return false;
            if (PyDict_Check(value))
                for (Py_ssize_t k = 0; PyDict_Next(value, &k, &name, &array);)
                    if (!see(name) || !see(array)) return false;
        }
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups.ptr()); ++i) {
            PyObject* group = PyList_GET_ITEM(groups.ptr(), i);
            PyObject* list = PyDict_Check(group) ? PyDict_GetItem(group, params) : nullptr;
            if (!list || !PyList_Check(list)) return false;
            if (!see(list)) return false;
            for (Py_ssize_t k = 0; k < PyList_GET_SIZE(list); ++k)
                if (!see(PyList_GET_ITEM(list, k))) return false;
        }
        return true;
    }

    std::vector<py::object> seen;
};

}  // namespace

void register_snapshot(py::module_& m) {
    py::class_<Snapshot>(m, "Snapshot", collected<Snapshot>())
        .def(py::init<py::handle, py::handle>(), py::arg("state"), py::arg("groups"))
        .def("same", &Snapshot::same, py::arg("state"), py::arg("groups"));
}

}  // namespace fastgd
