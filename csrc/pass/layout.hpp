// How the arrays that step together (a parameter, its gradient, its states) lie in memory, brought to the fewest
// dimensions: the order of iteration is the parameter's own memory order, so that a transposed pair runs as fast as a
// plain one; or C order, where a sum depends on it.
#pragma once
#include <stdint.h>

namespace fastgd {

constexpr int max_operands = 7;  // parameter, gradient, three states, average, copy
constexpr int max_ndim = 64;     // NumPy's

struct Layout {
    int ndim = 0;
    int64_t shape[max_ndim];
    int64_t strides[max_operands][max_ndim];  // bytes

    // Drops dimensions of one element and merges what runs on in every operand. Where the order of iteration is free,
    // turns reversed dimensions round first (moving data) and sorts by the parameter's strides.
    void simplify(int operands, char** data, bool free_order);

    // Whether the operand's elements follow each other without a gap in the order of iteration.
    bool dense(int operand, int64_t itemsize) const;
};

// Calls run(pointer, stride, count, done) for the pieces of [begin, begin + count) that have one stride.
template <class Run>
void for_runs(const int64_t* shape, const int64_t* strides, int ndim, char* data, int64_t begin, int64_t count,
              Run run) {
    int64_t at[max_ndim];
    char* outer = data;
    int64_t rest = begin;
    for (int d = ndim - 1; d >= 0; --d) {
        at[d] = rest % shape[d];
        rest /= shape[d];
        if (d < ndim - 1) outer += at[d] * strides[d];
    }
    int64_t inner = shape[ndim - 1], step = strides[ndim - 1], i = at[ndim - 1];
    for (int64_t done = 0; done < count; i = 0) {
        int64_t length = inner - i < count - done ? inner - i : count - done;
        run(outer + i * step, step, length, done);
        done += length;
        for (int d = ndim - 2; d >= 0; --d) {
            outer += strides[d];
            if (++at[d] < shape[d]) break;
            outer -= strides[d] * shape[d];
            at[d] = 0;
        }
    }
}

}  // namespace fastgd
