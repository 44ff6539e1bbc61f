// The one pass: what is to be done with each array, cut into tiles and run.
#pragma once
#include <functional>
#include <utility>
#include <vector>

#include "../pass/layout.hpp"
#include "../pass/sums.hpp"
#include "kernels.hpp"

namespace fastgd {

// One array of a job. ndim is 0 where the elements are dense and aligned: a kernel may then have the pointer.
struct Operand {
    char* data;
    Dtype dtype;
    int ndim;
    const int64_t *shape, *strides;
};

// One parameter with its gradient and states, operands in that order, and what else the call has for it. Without a row
// it is not stepped: the operands are a tensor and its average.
struct Job {
    Job() {}  // leaves all of it to be filled: zeroing it first would be felt over hundreds of small arrays

    int64_t n;
    RuleId rule;
    const Row* row;
    Compute compute;
    int operands;
    Operand operand[max_operands];  // after the states its average and its copy, where it has them
    bool ema, copy;
    Operand gradient;  // in C order, for a norm that is read beforehand
};

// What a call asks for beside the step.
struct OnePass {
    double grad_scale = 1;
    bool clip = false;
    double max_norm = 0;
    bool skip_nonfinite = false;
    bool ema = false;
    double ema_weight = 0;
    bool copies = false;
    bool zero_grads = false;
    bool stats = false;

    // Whether anything depends on all gradients, so that they are read once before the pass.
    bool reads_first() const { return clip || skip_nonfinite; }
    // Whether anything is asked for beside the step.
    bool plain() const {
        return grad_scale == 1 && !clip && !skip_nonfinite && !ema && !copies && !zero_grads && !stats;
    }
};

struct Outcome {
    bool skipped = false;
    int64_t nonfinite = 0;
    double clip_factor = 1;
    std::vector<double> grads, updates, params;  // sums of squares by job; those that were asked for
};

// Where a call has one part of the model only: from the sums of squares by job and the count of what is not finite to
// the sum and the count of the whole.
using Reduce = std::function<std::pair<double, int64_t>(const std::vector<double>&, int64_t)>;

// Steps all jobs, on several threads where that pays. Touches nothing of Python, unless `reduce` does.
Outcome run(const std::vector<Job>& jobs, const OnePass& one_pass, const Reduce& reduce = nullptr);

// Into how many parts work of so many bytes is cut.
int parts_for(int64_t bytes);

// How many elements the calling thread may step while it keeps the GIL: about 10 microseconds of work.
constexpr int64_t short_work = 1 << 14;

}  // namespace fastgd
