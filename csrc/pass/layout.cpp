#include "layout.hpp"

#include <utility>

namespace fastgd {

void Layout::simplify(int operands, char** data, bool free_order) {
    auto swap = [&](int a, int b) {
        std::swap(shape[a], shape[b]);
        for (int k = 0; k < operands; ++k) std::swap(strides[k][a], strides[k][b]);
    };
    auto copy = [&](int from, int to) {
        shape[to] = shape[from];
        for (int k = 0; k < operands; ++k) strides[k][to] = strides[k][from];
    };
    int kept = 0;
    for (int d = 0; d < ndim; ++d)
        if (shape[d] != 1) copy(d, kept++);
    ndim = kept;
    for (int d = 0; free_order && d < ndim; ++d) {
        if (strides[0][d] >= 0) continue;
        for (int k = 0; k < operands; ++k) {
            data[k] += strides[k][d] * (shape[d] - 1);
            strides[k][d] = -strides[k][d];
        }
    }
    for (int a = 1; free_order && a < ndim; ++a)
        for (int b = a; b > 0 && strides[0][b - 1] < strides[0][b]; --b) swap(b - 1, b);
    auto runs_on = [&](int outer, int inner) {
        for (int k = 0; k < operands; ++k)
            if (strides[k][outer] != strides[k][inner] * shape[inner]) return false;
        return true;
    };
    kept = 0;
    for (int d = 1; d < ndim; ++d) {
        int64_t outer = shape[kept];
        bool merged = runs_on(kept, d);
        if (!merged) ++kept;
        copy(d, kept);
        if (merged) shape[kept] *= outer;
    }
    if (ndim > 0) ndim = kept + 1;
    if (ndim == 0) {  // one element
        ndim = 1;
        shape[0] = 1;
        for (int k = 0; k < operands; ++k) strides[k][0] = 0;
    }
}

bool Layout::dense(int operand, int64_t itemsize) const {
    int64_t expected = itemsize;
    for (int d = ndim - 1; d >= 0; --d) {
        if (shape[d] != 1 && strides[operand][d] != expected) return false;
        expected *= shape[d];
    }
    return true;
}

}  // namespace fastgd
