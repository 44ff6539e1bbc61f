// Reading arrays: one C++ call for the whole list, a few nanoseconds an array. A reader either has everything it needs
// at once or says no; Python's arrays.py then finds the words for what is wrong.
#pragma once
#include <pybind11/pybind11.h>

#include "../cpu/pass.hpp"

namespace fastgd {

// An array as its owner describes it. shape and strides (bytes) belong to the array object.
struct View {
    char* data;
    int ndim;
    const Py_ssize_t* shape;
    const Py_ssize_t* strides;
    Dtype dtype;
    bool writeable, c_order, f_order;

    int64_t size() const;
};

// Reads a numpy.ndarray; with `any_subclass` (Python has looked at it) also an instance of a subclass.
bool read(PyObject* array, View& view, bool any_subclass);

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

// The job of one parameter: views are its operands. The storage takes shapes and strides where the job needs them.
using Storage = std::vector<std::vector<int64_t>>;
void describe(Job& job, RuleId rule, const Row& row, const View* views, int operands, const OnePass& ask,
              Storage& storage);

}  // namespace fastgd
