// The rules: the only registry. A line is a rule and its compile-time flags, in the order of its template arguments.
#pragma once
#include "rules/adagrad.hpp"
#include "rules/adam.hpp"
#include "rules/adamw.hpp"
#include "rules/lion.hpp"
#include "rules/rmsprop.hpp"
#include "rules/sgd.hpp"

#define FASTGD_RULES(RULE)                         \
    RULE(sgd, "decay", "momentum", "nesterov")     \
    RULE(adam, "decay", "amsgrad")                 \
    RULE(adamw, "amsgrad")                         \
    RULE(adagrad, "decay")                         \
    RULE(rmsprop, "decay", "centered", "momentum") \
    RULE(lion)

namespace fastgd {
namespace FASTGD_UNIT {

// Rule with its flags set from the bits of `mask`.
template <template <bool...> class Rule, int flags, int mask> struct variant;
template <template <bool...> class Rule, int mask> struct variant<Rule, 0, mask> {
    using type = Rule<>;
};
template <template <bool...> class Rule, int mask> struct variant<Rule, 1, mask> {
    using type = Rule<(mask & 1) != 0>;
};
template <template <bool...> class Rule, int mask> struct variant<Rule, 2, mask> {
    using type = Rule<(mask & 1) != 0, (mask & 2) != 0>;
};
template <template <bool...> class Rule, int mask> struct variant<Rule, 3, mask> {
    using type = Rule<(mask & 1) != 0, (mask & 2) != 0, (mask & 4) != 0>;
};

// How many flags a line of the list names.
template <class... Names> constexpr int count(Names...) { return sizeof...(Names); }

}  // namespace FASTGD_UNIT
}  // namespace fastgd
