// The instruction sets this module was built for, and the one in use.
#pragma once
#include <string>
#include <vector>

#include "kernels.hpp"

namespace fastgd {

std::vector<std::string> available_isas();  // those this CPU has, best first
const std::string& isa();
const Kernels& kernels();
void choose_isa(const char* name);  // null: the best; a name that is not available throws std::runtime_error

}  // namespace fastgd
