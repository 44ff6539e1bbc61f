#include "arrays.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

namespace py = pybind11;

namespace fastgd {
namespace {

// NumPy has no bfloat16 of its own: ml_dtypes registers the type of that name.
bool is_bfloat16(PyTypeObject* scalar) {
    static std::atomic<PyTypeObject*> known{nullptr};
    if (scalar == known.load(std::memory_order_relaxed)) return true;
    const char* dot = std::strrchr(scalar->tp_name, '.');
    if (std::strcmp(dot ? dot + 1 : scalar->tp_name, "bfloat16") != 0) return false;
    Py_INCREF(scalar);
    known.store(scalar, std::memory_order_relaxed);
    return true;
}

bool dtype_of(PyObject* descr, Dtype& dtype) {
    const auto* d = py::detail::array_descriptor1_proxy(descr);  // its first fields are the same in NumPy 1 and 2
    if (d->byteorder == (PY_LITTLE_ENDIAN ? '>' : '<')) return false;
    switch (d->type_num) {
        case py::detail::npy_api::NPY_DOUBLE_: dtype = Dtype::float64; return true;
        case py::detail::npy_api::NPY_FLOAT_: dtype = Dtype::float32; return true;
        case 23: dtype = Dtype::float16; return true;  // NPY_HALF
        default:
            dtype = Dtype::bfloat16;
            return d->type_num >= 256 && is_bfloat16(reinterpret_cast<PyTypeObject*>(d->typeobj));
    }
}

// Brings the views to the fewest dimensions in common.
void arrange(Operand* operand, const View* views, int operands, bool free_order, Storage& storage) {
    Layout layout;
    layout.ndim = views[0].ndim;
    char* data[max_operands];
    for (int d = 0; d < layout.ndim; ++d) layout.shape[d] = views[0].shape[d];
    for (int k = 0; k < operands; ++k) {
        data[k] = views[k].data;
        for (int d = 0; d < layout.ndim; ++d) layout.strides[k][d] = views[k].strides[d];
    }
    layout.simplify(operands, data, free_order);
    storage.emplace_back(layout.shape, layout.shape + layout.ndim);
    const int64_t* shape = storage.back().data();
    for (int k = 0; k < operands; ++k) {
        const int64_t size = itemsize(views[k].dtype);
        operand[k] = {data[k], views[k].dtype, 0, nullptr, nullptr};
        if (layout.dense(k, size) && reinterpret_cast<uintptr_t>(data[k]) % size == 0) continue;
        storage.emplace_back(layout.strides[k], layout.strides[k] + layout.ndim);
        operand[k] = {data[k], views[k].dtype, layout.ndim, shape, storage.back().data()};
    }
}

}  // namespace

int64_t View::size() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
}

bool read(PyObject* array, View& view, bool any_subclass) {
    PyTypeObject* ndarray = py::detail::npy_api::get().PyArray_Type_;
    if (Py_TYPE(array) != ndarray && !(any_subclass && PyObject_TypeCheck(array, ndarray))) return false;
    const auto* a = py::detail::array_proxy(array);
    view.data = a->data;
    view.ndim = a->nd;
    view.shape = a->dimensions;
    view.strides = a->strides;
    view.writeable = a->flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
    view.c_order = a->flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_;
    view.f_order = a->flags & py::detail::npy_api::NPY_ARRAY_F_CONTIGUOUS_;
    return dtype_of(a->descr, view.dtype);
}

bool same_shape(const View& a, const View& b) {
    if (a.ndim != b.ndim) return false;
    for (int d = 0; d < a.ndim; ++d)  // std::equal would call memcmp, for a number or four
        if (a.shape[d] != b.shape[d]) return false;
    return true;
}

Span span(const View& view, bool written) {
    Span s{view.data, view.data, written};
    for (int d = 0; d < view.ndim; ++d) {
        if (view.shape[d] == 0) return {view.data, view.data, written};
        int64_t reach = view.strides[d] * (view.shape[d] - 1);
        (reach < 0 ? s.begin : s.end) += reach;
    }
    s.end += itemsize(view.dtype);
    return s;
}

bool disjoint(std::vector<Span>& spans) {
    std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
    const char *any = nullptr, *written = nullptr;  // the ends reached so far
    for (const Span& s : spans) {
        if (s.begin == s.end) continue;
        if (s.begin < written || (s.written && s.begin < any)) return false;
        any = std::max(any, s.end);
        if (s.written) written = std::max(written, s.end);
    }
    return true;
}

bool injective(const View& view) {
    if (view.c_order || view.f_order) return true;
    int order[max_ndim], kept = 0;
    for (int d = 0; d < view.ndim; ++d) {
        if (view.shape[d] == 0) return true;
        if (view.shape[d] > 1) order[kept++] = d;
    }
    std::sort(order, order + kept, [&](int a, int b) { return std::abs(view.strides[a]) < std::abs(view.strides[b]); });
    int64_t reach = itemsize(view.dtype);  // one past the last byte of what the inner dimensions span
    for (int i = 0; i < kept; ++i) {
        int64_t stride = std::abs(view.strides[order[i]]);
        if (stride < reach) return false;
        reach += stride * (view.shape[order[i]] - 1);
    }
    return true;
}

void describe(Job& job, RuleId rule, const Row& row, const View* views, int operands, const OnePass& ask,
              Storage& storage) {
    job.n = views[0].size();
    job.rule = rule;
    job.row = &row;
    job.compute = compute_of(views[0].dtype);
    job.operands = operands;
    bool c = true, f = !ask.stats, aligned = true;
    for (int k = 0; k < operands; ++k) {
        job.operand[k] = {views[k].data, views[k].dtype, 0, nullptr, nullptr};
        c = c && views[k].c_order;
        f = f && views[k].f_order;
        aligned = aligned && reinterpret_cast<uintptr_t>(views[k].data) % itemsize(views[k].dtype) == 0;
    }
    job.gradient = job.operand[1];
    if ((c && aligned) || job.n == 0) return;
    if (!(f && aligned)) arrange(job.operand, views, operands, !ask.stats, storage);
    if (ask.reads_first()) arrange(&job.gradient, views + 1, 1, false, storage);
}

}  // namespace fastgd
