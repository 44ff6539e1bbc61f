// Reading arrays: one C++ call for the whole list, a few nanoseconds an array. A reader either has everything it needs
// at once or says no; Python's arrays.py then finds the words for what is wrong.
#pragma once
#include <pybind11/pybind11.h>

#include <optional>

#include "../cpu/pass.hpp"

namespace fastgd {

constexpr int unknown_device = -1;

// An array as its owner describes it. shape and strides belong to the array object.
struct View {
    PyObject* object;
    char* data;
    int ndim;
    const Py_ssize_t* shape;
    const Py_ssize_t* strides;
    int stride_unit;  // bytes: 1 in NumPy, the itemsize in DLPack
    Dtype dtype;
    bool writeable, c_order, f_order;
    bool foreign;  // not NumPy's: its owner is told what was written
    int device;    // of the tensor; unknown_device for ndarrays

    int64_t stride(int d) const { return strides[d] * stride_unit; }
    int64_t size() const;
    // Whether two arrays are known to lie on different devices.
    bool apart(const View& other) const {
        return device != other.device && device != unknown_device && other.device != unknown_device;
    }
};

// Reads a numpy.ndarray, or a tensor of a type that was learned; with `any_subclass` (Python has looked at it) also an
// instance of a subclass of ndarray. `settled`: one of our own making, which is not asked whether it is lazy.
bool read(PyObject* array, View& view, bool any_subclass, bool settled = false);

// Makes `read` take tensors of exactly this type through its DLPack exchange API; false where it has none that fits.
// `lazy` names a method that tells whether a tensor's memory does not hold its values yet, as torch's negative views.
bool learn(pybind11::type type, pybind11::str lazy);

// The stream of a GPU that is current for the tensors of this type; none where its library does not tell.
std::optional<uintptr_t> current_stream(const View& view);

// Arrays that were written, whose owners want to know: torch counts a tensor's versions.
class Touched {
  public:
    void add(const View& view) {
        if (view.foreign) arrays.push_back(view.object);
    }
    void tell() const;

    static void call(pybind11::function written);  // what is told

  private:
    std::vector<PyObject*> arrays;  // borrowed
};

bool same_shape(const View& a, const View& b);

// The bytes an array spans, from the first to one past the last.
struct Span {
    const char *begin, *end;
    bool written;

    bool operator==(const Span& other) const { return begin == other.begin && end == other.end; }
};
Span span(const View& view, bool written);

// False where two spans meet and one of them is written: they may overlap, or only be interleaved. Sorts the spans.
bool disjoint(std::vector<Span>& spans);

// False where the strides of one array may bring two of its indices to one address.
bool injective(const View& view);

// The operands of one parameter's job, or without a row those of a tensor and its average. The storage takes shapes and
// strides where the job needs them.
using Storage = std::vector<std::vector<int64_t>>;
void describe(Job& job, RuleId rule, const Row* row, const View* views, int operands, const OnePass& ask,
              Storage& storage);

}  // namespace fastgd
