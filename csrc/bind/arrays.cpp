#include "arrays.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "backend.hpp"

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

// A type whose tensors are read through its DLPack exchange API.
struct Learned {
    PyTypeObject* type;
    PyObject* lazy;
    const dlpack::ExchangeApi* api;
};
constexpr int most_learned = 16;
Learned learned_types[most_learned];  // only ever grows
std::atomic<int> learned_count{0};

const Learned* learned(PyTypeObject* type) {
    const int count = learned_count.load(std::memory_order_acquire);
    for (int i = 0; i < count; ++i)
        if (learned_types[i].type == type) return &learned_types[i];
    return nullptr;
}

bool dtype_of(const dlpack::DataType& type, Dtype& dtype) {
    if (type.lanes != 1) return false;
    if (type.code == dlpack::bfloat) {
        dtype = Dtype::bfloat16;
        return type.bits == 16;
    }
    dtype = type.bits == 64 ? Dtype::float64 : type.bits == 32 ? Dtype::float32 : Dtype::float16;
    return type.code == dlpack::floating && type.bits >= 16;
}

bool read_tensor(PyObject* array, const Learned& type, View& view, bool settled) {
    static_assert(sizeof(Py_ssize_t) == sizeof(int64_t));
    dlpack::Tensor t;
    if (type.api->dltensor_from_py_object_no_sync(array, &t) != 0) {
        PyErr_Clear();
        return false;
    }
    if (!holds(t.device.type)) return false;
    view.device = t.device.id;
    if (!dtype_of(t.dtype, view.dtype) || t.ndim > max_ndim || (t.ndim && !t.strides)) return false;
    view.data = static_cast<char*>(t.data) + t.byte_offset;
    view.ndim = t.ndim;
    view.shape = reinterpret_cast<const Py_ssize_t*>(t.shape);
    view.strides = reinterpret_cast<const Py_ssize_t*>(t.strides);
    view.stride_unit = itemsize(view.dtype);
    view.writeable = view.foreign = true;
    view.c_order = view.f_order = true;
    int64_t n = 1;
    for (int d = view.ndim - 1; d >= 0; --d) {
        if (view.shape[d] != 1 && view.strides[d] != n) view.c_order = false;
        n *= view.shape[d];
    }
    const int64_t size = n;
    n = 1;
    for (int d = 0; d < view.ndim; ++d) {
        if (view.shape[d] != 1 && view.strides[d] != n) view.f_order = false;
        n *= view.shape[d];
    }
    if (size == 0) return view.c_order = view.f_order = true;
    if (!t.data) return false;  // what only stands for a tensor, or lost its storage
    if (settled || (size > 1 && (view.c_order || view.f_order))) return true;
    PyObject* lazy = PyObject_CallMethodNoArgs(array, type.lazy);
    if (!lazy) PyErr_Clear();
    Py_XDECREF(lazy);
    return lazy == Py_False;
}

std::atomic<PyObject*> written_call{nullptr};

// Brings the views to the fewest dimensions in common.
void arrange(Operand* operand, const View* views, int operands, bool free_order, Storage& storage) {
    Layout layout;
    layout.ndim = views[0].ndim;
    char* data[max_operands];
    for (int d = 0; d < layout.ndim; ++d) layout.shape[d] = views[0].shape[d];
    for (int k = 0; k < operands; ++k) {
        data[k] = views[k].data;
        for (int d = 0; d < layout.ndim; ++d) layout.strides[k][d] = views[k].stride(d);
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

bool read(PyObject* array, View& view, bool any_subclass, bool settled) {
    PyTypeObject* ndarray = py::detail::npy_api::get().PyArray_Type_;
    view.object = array;
    if (Py_TYPE(array) != ndarray) {
        if (const Learned* type = learned(Py_TYPE(array))) return read_tensor(array, *type, view, settled);
        if (!any_subclass || !PyObject_TypeCheck(array, ndarray)) return false;
    } else if (!holds_ndarrays()) {
        return false;
    }
    const auto* a = py::detail::array_proxy(array);
    view.data = a->data;
    view.ndim = a->nd;
    view.shape = a->dimensions;
    view.strides = a->strides;
    view.stride_unit = 1;
    view.foreign = false;
    view.device = unknown_device;
    view.writeable = a->flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
    view.c_order = a->flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_;
    view.f_order = a->flags & py::detail::npy_api::NPY_ARRAY_F_CONTIGUOUS_;
    return dtype_of(a->descr, view.dtype);
}

bool learn(py::type type, py::str lazy) {
    auto* t = reinterpret_cast<PyTypeObject*>(type.ptr());
    if (learned(t)) return true;
    if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return false;
    const py::object capsule = type.attr("__dlpack_c_exchange_api__");
    const auto* api =
        static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::exchange_api_name));
    if (!api) throw py::error_already_set();
    if (api->header.version.major != 1 || !api->dltensor_from_py_object_no_sync) return false;
    static std::mutex growing;
    std::lock_guard<std::mutex> hold(growing);
    const int count = learned_count.load();
    if (count == most_learned || learned(t)) return count < most_learned;
    learned_types[count] = {t, lazy.inc_ref().ptr(), api};
    type.inc_ref();
    learned_count.store(count + 1, std::memory_order_release);
    return true;
}

std::optional<uintptr_t> current_stream(const View& view) {
    const Learned* type = learned(Py_TYPE(view.object));
    void* stream;
    if (!type || !type->api->current_work_stream) return std::nullopt;
    if (type->api->current_work_stream(dlpack::cuda, view.device, &stream) != 0) throw py::error_already_set();
    return reinterpret_cast<uintptr_t>(stream);
}

void Touched::call(py::function written) { Py_XDECREF(written_call.exchange(written.release().ptr())); }

void Touched::tell() const {
    const py::handle told(written_call);
    if (arrays.empty() || !told) return;
    py::list all(arrays.size());
    for (size_t i = 0; i < arrays.size(); ++i) all[i] = py::reinterpret_borrow<py::object>(arrays[i]);
    told(all);
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
        int64_t reach = view.stride(d) * (view.shape[d] - 1);
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
        int64_t stride = std::abs(view.stride(order[i]));
        if (stride < reach) return false;
        reach += stride * (view.shape[order[i]] - 1);
    }
    return true;
}

void describe(Job& job, RuleId rule, const Row* row, const View* views, int operands, const OnePass& ask,
              Storage& storage) {
    job.n = views[0].size();
    job.rule = rule;
    job.row = row;
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
    if (row && ask.reads_first()) arrange(&job.gradient, views + 1, 1, false, storage);
}

}  // namespace fastgd
