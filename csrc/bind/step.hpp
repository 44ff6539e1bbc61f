// One call: `step` over lists of arrays, and `Prepared`, which an optimizer class keeps between steps. Both return
// False, with nothing changed, for whatever is not plainly right; Python then looks closer and finds the words.
#pragma once
#include <pybind11/pybind11.h>

#include <optional>

#include "../cpu/pass.hpp"
#include "arrays.hpp"

namespace fastgd {

void register_step(pybind11::module_& m);
void register_prepared(pybind11::module_& m);

// What stands for one role of a call: a list or tuple of arrays, a dict of them, or one array alone. Owns a snapshot.
class Items {
  public:
    explicit Items(pybind11::handle x);
    // The same form, length and keys, these in the same order.
    bool alike(const Items& other) const;
    bool named() const { return bool(keys); }
    Py_ssize_t size() const { return many ? PyTuple_GET_SIZE(held.ptr()) : 1; }
    pybind11::object arrays() const { return held; }
    PyObject* operator[](Py_ssize_t i) const { return many ? PyTuple_GET_ITEM(held.ptr(), i) : held.ptr(); }

  private:
    pybind11::object held, keys;
    bool many;
};

// What a call asks for beside the step, as Python's tuple has it; None asks for nothing.
struct Extras {
    explicit Extras(pybind11::handle tuple);
    // Reads parameter i's average and copy behind its other views. False where they do not fit it.
    bool read(Py_ssize_t i, const View& param, View* views, int& operands, bool checked) const;
    std::vector<pybind11::object> arrays() const;
    bool has_ema(Py_ssize_t i) const { return ema && (!partial() || (*ema)[i] != Py_None); }
    // Whether some parameters may have no average, and other tensors may have one.
    bool partial() const { return tracked.has_value(); }

    OnePass ask;
    std::optional<Items> ema, copies;
    std::optional<std::pair<Items, Items>> tracked;  // tensors that are not stepped, and their averages
    pybind11::object reduce;                         // none: the call has the whole model
    std::optional<uintptr_t> stream;                 // of a device; none: the one that is current for the arrays
};

}  // namespace fastgd
