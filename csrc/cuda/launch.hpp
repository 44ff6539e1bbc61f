// What a kernel is told: one launch is a plain value, passed as the kernel's argument, so that a captured graph keeps
// it and no table has to reach the device first. Jobs that do not fit go to a further launch.
#pragma once
#include <stdint.h>

#include "../pass/dtype.hpp"

namespace fastgd {

constexpr int threads = 256;           // of a thread block, which has one block of the sums (1024 elements) at a time
constexpr int argument_bytes = 32764;  // what CUDA 12.1 lets a kernel take

// How an operand's elements are reached: four at once, one by one in a row, by strides, or byte by byte, for addresses
// that are no multiple of the itemsize; or there is no such operand.
enum class Path : uint8_t { quads, dense, strided, bytes, absent };

struct Access {
    uint8_t code;

    Access() = default;
    constexpr Access(Dtype dtype, Path path) : code(uint8_t(uint8_t(dtype) | uint8_t(path) << 2)) {}
    constexpr Dtype dtype() const { return Dtype(code & 3); }
    constexpr Path path() const { return Path(code >> 2); }
};

// One parameter with its operands, in the arena. Words are those of the arena.
struct PackedJob {
    int64_t n;
    uint32_t first;    // of its blocks of elements among those of the launch
    uint32_t index;    // in the call
    uint32_t counter;  // of its steps, among the launch's counters
    uint16_t row;      // word
    uint16_t layout;   // word of ndim, the shape, and the strides of each operand; 0: all are dense
    Access access[8];
    char* data[1];  // as many as the launch has operands: parameter, gradient, states, average, copy
};

// A rule's numbers: its coefficients; or, where the device counts the steps, the hyperparameters they come from.
struct PackedRow {
    double sign;
    double numbers[8];
    const void* lr;  // of one element on the device, instead of numbers[0]
    int32_t lr_dtype;
    int32_t counted;
};

// What the read of the gradients tells the step, and both tell the last thread block to be done. On the device; zero
// between calls.
struct Verdict {
    uint64_t nonfinite;
    double clip_factor;
    uint32_t skipped;
    uint32_t done;  // thread blocks
};

// A result as it lies on the device: this, then the sums of squares by job of gradients, updates, parameters.
struct ResultHead {
    double clip_factor;
    int64_t nonfinite;
    int64_t skipped;
};

enum Sum { of_grads, of_updates, of_params, sums };

struct Launch {
    Verdict* verdict;
    double* partials;    // [sum][block]: of this launch's blocks
    double* groups;      // [sum][group]
    double* totals;      // [sum][job of the call]
    ResultHead* result;  // null: nobody asked
    int64_t* counters;   // null: the host counts

    double grad_scale, max_norm, ema_weight;
    uint32_t blocks;        // of elements
    uint32_t jobs, stride;  // in this launch; words of each
    uint32_t call_jobs;     // in the whole call
    uint32_t group_count;   // room for that many in `groups`
    uint8_t rule, states;   // as in kernels.hpp; how many states
    bool clip, skip;        // whether the gradients are clipped; whether a step may be skipped
    bool read;              // whether a read of the gradients came before the step
    bool count;             // whether this launch counts what is not finite
    bool sum[sums];         // which sums it makes
    bool zero_grads;
    bool finish, last;  // whether its last thread block has anything to do; whether it ends its phase

    static constexpr int words = (argument_bytes - 144) / 8;
    uint64_t arena[words];

    uint16_t operands() const { return uint16_t(2 + states + 2); }
};
static_assert(sizeof(Launch) <= argument_bytes);

}  // namespace fastgd
