#include "registry.hpp"

#include <pybind11/stl.h>

#include <cstring>
#include <string>

#include "../cuda/coefficients.hpp"

namespace py = pybind11;

namespace fastgd {
namespace {

template <template <bool...> class R, int flags, int mask> void count_states(Rule& rule) {
    if constexpr (mask < (1 << flags)) {
        rule.states[mask] = variant<R, flags, mask>::type::states;
        count_states<R, flags, mask + 1>(rule);
    }
}

template <template <bool...> class R, int flags>
Rule make(const char* name, std::vector<const char*> names, int hyperparameters) {
    using C = typename variant<R, flags, 0>::type::template Coefficients<double>;
    Rule rule{name, names, sizeof(C) / sizeof(double), hyperparameters, {}};
    count_states<R, flags, 0>(rule);
    return rule;
}

}  // namespace

const std::vector<Rule>& registry() {
    static const std::vector<Rule> all = {
#define RULE(name, ...) make<name, count(__VA_ARGS__)>(#name, {__VA_ARGS__}, name##_hyperparameters),
        FASTGD_RULES(RULE)
#undef RULE
    };
    return all;
}

RuleId find_rule(py::handle name) {
    const char* wanted = PyUnicode_AsUTF8(name.ptr());
    if (!wanted) throw py::error_already_set();
    const std::vector<Rule>& all = registry();
    for (size_t i = 0; i < all.size(); ++i)
        if (!std::strcmp(wanted, all[i].name)) return RuleId(i);
    throw py::value_error(std::string("rule: unknown name '") + wanted + "'");
}

Row read_row(RuleId id, py::handle row, bool counted) {
    const Rule& rule = registry()[id];
    const int numbers = counted ? rule.hyperparameters : rule.coefficients;
    if (!PyTuple_Check(row.ptr()) || PyTuple_GET_SIZE(row.ptr()) != 2 + numbers)
        throw py::value_error(std::string("row: expected a tuple of 2 + ") + std::to_string(numbers) + " numbers for " +
                              rule.name);
    auto number = [&](int i) {
        double x = PyFloat_AsDouble(PyTuple_GET_ITEM(row.ptr(), i));
        if (x == -1.0 && PyErr_Occurred()) throw py::error_already_set();
        return x;
    };
    Row r;
    r.variant = int(number(0));
    if (r.variant < 0 || r.variant >= 1 << rule.flags.size()) throw py::value_error("row: no such variant");
    r.sign = number(1);
    const py::handle lr = counted ? PyTuple_GET_ITEM(row.ptr(), 2) : nullptr;
    if (lr && PyTuple_Check(lr.ptr())) {  // on the device
        const auto [address, wide] = py::cast<std::pair<uintptr_t, bool>>(lr);
        r.lr = reinterpret_cast<const void*>(address);
        r.lr_dtype = wide ? Dtype::float64 : Dtype::float32;
    }
    for (int i = r.lr ? 1 : 0; i < numbers; ++i) r.coefficients[i] = number(2 + i);
    r.counted = counted;
    return r;
}

void register_rules(py::module_& m) {
    py::dict rules;
    for (const Rule& rule : registry()) {
        py::dict entry;
        entry["flags"] = py::tuple(py::cast(rule.flags));
        entry["coefficients"] = rule.coefficients;
        entry["states"] = py::tuple(py::cast(std::vector<int>(rule.states, rule.states + (1 << rule.flags.size()))));
        rules[rule.name] = entry;
    }
    m.attr("RULES") = rules;
}

}  // namespace fastgd
