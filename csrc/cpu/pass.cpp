#include "pass.hpp"

#include <algorithm>

#include "dispatch.hpp"
#include "float_control.hpp"
#include "pool.hpp"

namespace fastgd {
namespace {

constexpr int64_t tile = 256;  // elements: in L1, and short enough that memory is read on while a tile is worked on
constexpr int64_t grain = 64 * 1024;  // bytes a thread must have to do to be worth waking
constexpr int64_t several = 1 << 20;  // bytes a thread must have to do for its share to be cut in four
constexpr int64_t line = 64;          // elements: parts of one array meet on a cache line's edge or beyond
alignas(64) thread_local char tiles[max_operands][tile * sizeof(double)];

int64_t bytes_per_element(const Job& job) {
    int64_t bytes = 0;
    for (int k = 0; k < job.operands; ++k) bytes += itemsize(job.operand[k].dtype);
    return bytes;
}

// An operand's elements [begin, begin + n) in the compute type: in place if they are so already, else widened into a
// tile.
void* widened(const Job& job, int k, int64_t begin, int64_t n, const Kernels& kernels) {
    const Operand& x = job.operand[k];
    if (!x.strides && x.dtype == dtype_of(job.compute)) return x.data + begin * itemsize(x.dtype);
    Load load = kernels.load[int(x.dtype)][int(job.compute)];
    char* to = tiles[k];
    int64_t wide = itemsize(dtype_of(job.compute));
    if (!x.strides)
        load(n, x.data + begin * itemsize(x.dtype), itemsize(x.dtype), to);
    else
        for_runs(job.shape, x.strides, job.ndim, x.data, begin, n,
                 [&](char* from, int64_t stride, int64_t count, int64_t done) {
                     load(count, from, stride, to + done * wide);
                 });
    return to;
}

void stored(const Job& job, int k, int64_t begin, int64_t n, const Kernels& kernels) {
    const Operand& x = job.operand[k];
    if (!x.strides && x.dtype == dtype_of(job.compute)) return;
    Store store = kernels.store[int(x.dtype)][int(job.compute)];
    const char* from = tiles[k];
    int64_t wide = itemsize(dtype_of(job.compute));
    if (!x.strides)
        store(n, from, x.data + begin * itemsize(x.dtype), itemsize(x.dtype));
    else
        for_runs(job.shape, x.strides, job.ndim, x.data, begin, n,
                 [&](char* to, int64_t stride, int64_t count, int64_t done) {
                     store(count, from + done * wide, to, stride);
                 });
}

// Elements [begin, end) of a job: load and widen -> the rule -> round and store.
void step(const Job& job, int64_t begin, int64_t end, const Kernels& kernels) {
    Update update = kernels.update[job.rule][job.row->variant][int(job.compute)];
    bool direct = true;
    for (int k = 0; k < job.operands; ++k)
        direct = direct && !job.operand[k].strides && job.operand[k].dtype == dtype_of(job.compute);
    int64_t length = direct ? end - begin : tile;
    for (; begin < end; begin += length) {
        int64_t n = length < end - begin ? length : end - begin;
        void* x[max_operands];
        for (int k = 0; k < job.operands; ++k) x[k] = widened(job, k, begin, n, kernels);
        update(n, x[0], x[1], x + 2, *job.row);
        for (int k = 0; k < job.operands; ++k)
            if (k != 1) stored(job, k, begin, n, kernels);
    }
}

struct Work {
    const std::vector<Job>* jobs;
    const Kernels* kernels;
    int64_t bytes;
    int parts;
};

// Part p of the list has the bytes from p / parts to (p + 1) / parts of the whole.
void run_part(void* context, int part) {
    const Work& work = *static_cast<Work*>(context);
    FloatControl control;
    int64_t first = work.bytes / work.parts * part;
    int64_t last = part + 1 == work.parts ? work.bytes : work.bytes / work.parts * (part + 1);
    int64_t at = 0;
    for (const Job& job : *work.jobs) {
        if (at >= last) break;
        int64_t width = bytes_per_element(job), bytes = width * job.n;
        // The element where byte `limit` of the list falls in this job, rounded to whole lines.
        auto cut = [&](int64_t limit) {
            if (limit <= at) return int64_t(0);
            if (limit >= at + bytes) return job.n;
            return (limit - at) / width / line * line;
        };
        int64_t begin = cut(first), end = cut(last);
        if (begin < end) step(job, begin, end, *work.kernels);
        at += bytes;
    }
}

}  // namespace

int parts_for(int64_t bytes) {
    const int64_t threads = get_num_threads(), most = bytes / grain;
    if (threads == 1 || most < 2) return 1;
    const int64_t parts = bytes < threads * several ? threads : 4 * threads;
    return int(std::min({most, parts, int64_t(max_parts)}));
}

void run(const std::vector<Job>& jobs) {
    Work work{&jobs, &kernels(), 0, 1};
    for (const Job& job : jobs) work.bytes += bytes_per_element(job) * job.n;
    work.parts = parts_for(work.bytes);
    parallel(work.parts, run_part, &work);
}

}  // namespace fastgd
