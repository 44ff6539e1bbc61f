// The one pass: what is to be done with each array, cut into tiles and run.
#pragma once
#include <vector>

#include "../pass/layout.hpp"
#include "kernels.hpp"

namespace fastgd {

// One array of a job. strides is null where the elements are dense and aligned: a kernel may then have the pointer.
struct Operand {
    char* data;
    const int64_t* strides;
    Dtype dtype;
};

// One parameter with its gradient and states: operands in that order.
struct Job {
    int64_t n;
    RuleId rule;
    const Row* row;
    Compute compute;
    int operands;
    int ndim;              // of shape and of every operand's strides
    const int64_t* shape;  // null where every operand is dense
    Operand operand[max_operands];
};

// Steps all jobs, on several threads where that pays. Touches nothing of Python.
void run(const std::vector<Job>& jobs);

// Into how many parts, one a thread, work of so many bytes is cut.
int parts_for(int64_t bytes);

// How many elements the calling thread may step while it keeps the GIL: about 10 microseconds of work.
constexpr int64_t short_work = 1 << 14;

}  // namespace fastgd
