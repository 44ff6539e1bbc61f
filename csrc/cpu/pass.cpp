#include "pass.hpp"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>

#include "dispatch.hpp"
#include "float_control.hpp"
#include "pool.hpp"

#if defined(__GNUC__)
#define FASTGD_PREFETCH(address) __builtin_prefetch(address)
#elif defined(_M_X64)
#include <immintrin.h>
#define FASTGD_PREFETCH(address) _mm_prefetch(address, _MM_HINT_T0)
#else
#define FASTGD_PREFETCH(address) ((void)(address))
#endif

namespace fastgd {
namespace {

constexpr int64_t tile = 256;  // elements: in L1, and short enough that memory is read on while a tile is worked on
constexpr int64_t grain = 64 * 1024;  // bytes a thread must have to do to be worth waking
constexpr int64_t several = 1 << 20;  // bytes a thread must have to do for its share to be cut in four
static_assert(block % tile == 0 && tile % lanes == 0);

// A tile of each operand, and of the parameter before the step; where a gradient is counted, of it as it came.
struct alignas(64) Tiles {
    char operand[max_operands][tile * sizeof(double)];
    char before[tile * sizeof(double)];
};
thread_local Tiles tiles;

bool in_place(const Operand& x, Compute compute) { return !x.ndim && x.dtype == dtype_of(compute); }

// An operand's elements [begin, begin + n) in the compute type: where they lie if they are so already, else widened
// into `to`.
void* load(const Operand& x, Compute compute, int64_t begin, int64_t n, char* to, const Kernels& kernels) {
    const int64_t size = itemsize(x.dtype), wide = itemsize(dtype_of(compute));
    if (in_place(x, compute)) return x.data + begin * size;
    const Load widen = kernels.load[int(x.dtype)][int(compute)];
    if (!x.ndim)
        widen(n, x.data + begin * size, size, to);
    else
        for_runs(x.shape, x.strides, x.ndim, x.data, begin, n,
                 [&](char* from, int64_t stride, int64_t count, int64_t done) {
                     widen(count, from, stride, to + done * wide);
                 });
    return to;
}

void store(const Operand& x, Compute compute, int64_t begin, int64_t n, const void* from, const Kernels& kernels) {
    const int64_t size = itemsize(x.dtype), wide = itemsize(dtype_of(compute));
    const Store narrow = kernels.store[int(x.dtype)][int(compute)];
    if (!x.ndim)
        narrow(n, from, x.data + begin * size, size);
    else
        for_runs(x.shape, x.strides, x.ndim, x.data, begin, n,
                 [&](char* to, int64_t stride, int64_t count, int64_t done) {
                     narrow(count, static_cast<const char*>(from) + done * wide, to, stride);
                 });
}

// Asks for the elements two tiles on: with more to do on a tile than the rule, the memory would wait for it.
void prefetch(const Job& job, int64_t begin) {
    for (int k = 0; k < job.operands; ++k) {
        const Operand& x = job.operand[k];
        if (x.ndim) continue;
        const int64_t size = itemsize(x.dtype);
        const char* from = x.data + (begin + 2 * tile) * size;
        for (int64_t i = 0; i < tile * size; i += 64) FASTGD_PREFETCH(from + i);
    }
}

void zero(const Operand& x, int64_t begin, int64_t n) {
    const int64_t size = itemsize(x.dtype);
    if (!x.ndim)
        memset(x.data + begin * size, 0, n * size);
    else
        for_runs(x.shape, x.strides, x.ndim, x.data, begin, n, [&](char* to, int64_t stride, int64_t count, int64_t) {
            for (int64_t i = 0; i < count; ++i) memset(to + i * stride, 0, size);
        });
}

// What the parts of a call share.
struct Call {
    Call(const std::vector<Job>& jobs, const OnePass& ask) : jobs(jobs), ask(ask), kernels(fastgd::kernels()) {}

    const std::vector<Job>& jobs;
    const OnePass& ask;
    const Kernels& kernels;
    bool reading = false;  // the read of the gradients before the pass
    int64_t bytes = 0;     // of the whole list
    int parts = 1;
    double clip_factor = 1;
    std::vector<int64_t> first_block;            // of each job, in the sums
    std::vector<double> grads, updates, params;  // sums of squares by block; empty where nobody asks
    std::atomic<int64_t> nonfinite{0};

    int64_t width(const Job& job) const {
        if (reading) return job.row ? itemsize(job.gradient.dtype) : 0;
        int64_t bytes = 0;
        for (int k = 0; k < job.operands; ++k) bytes += itemsize(job.operand[k].dtype);
        return bytes;
    }
};

// The sums of squares of one job's gradient, block after block, and the count of what is not finite in it.
class GradientSums {
  public:
    GradientSums(Call& call, const Job& job, const Operand& gradient, size_t index)
        : call(call),
          job(job),
          gradient(gradient),
          first_block(call.first_block.empty() ? 0 : call.first_block[index]) {}

    // g: the elements [begin, begin + n), unscaled.
    void add(const void* g, int64_t begin, int64_t n) {
        const Kernels& kernels = call.kernels;
        kernels.squares[int(job.compute)](n, g, nullptr, lane);
        double odd = 0;  // 0 as long as every lane is finite
        for (double x : lane) odd += x - x;
        if (odd != 0)  // only then is it worth a closer look, at the gradient as it came
            call.nonfinite +=
                kernels.nonfinite[int(job.compute)](n, load(gradient, job.compute, begin, n, tiles.before, kernels));
        const int64_t end = begin + n;
        if (end % block == 0 || end == job.n) call.grads[first_block + (end - 1) / block] = take(lane);
    }

  private:
    Call& call;
    const Job& job;
    const Operand& gradient;
    const int64_t first_block;
    double lane[lanes] = {};
};

// The read before the pass: norm, check and count in one.
void read(Call& call, size_t index, int64_t begin, int64_t end) {
    const Job& job = call.jobs[index];
    GradientSums sums(call, job, job.gradient, index);
    for (; begin < end; begin += tile) {
        const int64_t n = std::min(tile, end - begin);
        void* g = load(job.gradient, job.compute, begin, n, tiles.operand[1], call.kernels);
        if (call.ask.grad_scale != 1) {
            call.kernels.scale[int(job.compute)](n, g, tiles.operand[1], call.ask.grad_scale, 1);
            g = tiles.operand[1];
        }
        sums.add(g, begin, n);
    }
}

// Takes a tile of a tensor into its average, which is the operand `ema`.
void blend(Call& call, const Job& job, int ema, int64_t begin, int64_t n, const void* x) {
    const Operand& average = job.operand[ema];
    void* e = load(average, job.compute, begin, n, tiles.operand[ema], call.kernels);
    call.kernels.blend[int(job.compute)](n, e, x, call.ask.ema_weight);
    if (!in_place(average, job.compute)) store(average, job.compute, begin, n, e, call.kernels);
}

// Elements [begin, end) of a job that is not stepped.
void average(Call& call, const Job& job, int64_t begin, int64_t end) {
    for (; begin < end; begin += tile) {
        const int64_t n = std::min(tile, end - begin);
        blend(call, job, 1, begin, n, load(job.operand[0], job.compute, begin, n, tiles.operand[0], call.kernels));
    }
}

// Elements [begin, end) of a job: load and widen -> unscale and clip -> the rule -> round and store -> average ->
// copy -> zero -> statistics; or the rule alone, on the arrays, where nothing else is asked for.
void step(Call& call, size_t index, int64_t begin, int64_t end) {
    const Job& job = call.jobs[index];
    if (!job.row) return average(call, job, begin, end);
    const OnePass& ask = call.ask;
    const Kernels& kernels = call.kernels;
    const Compute compute = job.compute;
    const Update update = kernels.update[job.rule][job.row->variant][int(compute)];
    const int states_end = job.operands - job.ema - job.copy, ema = states_end, copy = states_end + job.ema;

    bool direct = ask.plain();
    for (int k = 0; k < job.operands; ++k) direct = direct && in_place(job.operand[k], compute);
    if (direct) {
        void* x[max_operands];
        for (int k = 0; k < job.operands; ++k) x[k] = job.operand[k].data + begin * itemsize(job.operand[k].dtype);
        return update(end - begin, x[0], x[1], x + 2, *job.row);
    }

    const Operand &param = job.operand[0], &grad = job.operand[1];
    const bool count_grads = ask.stats && !ask.reads_first();
    GradientSums grads(call, job, grad, index);
    double update_lanes[lanes] = {}, param_lanes[lanes] = {};
    for (; begin < end; begin += tile) {
        const int64_t n = std::min(tile, end - begin);
        if (!ask.plain() && end - begin >= 3 * tile) prefetch(job, begin);
        void* x[max_operands];
        for (int k = 0; k < states_end; ++k) x[k] = load(job.operand[k], compute, begin, n, tiles.operand[k], kernels);
        if (ask.grad_scale != 1 || ask.clip) {
            kernels.scale[int(compute)](n, x[1], tiles.operand[1], ask.grad_scale, call.clip_factor);
            x[1] = tiles.operand[1];
        }
        if (count_grads) grads.add(x[1], begin, n);
        if (ask.stats) memcpy(tiles.before, x[0], n * itemsize(dtype_of(compute)));

        update(n, x[0], x[1], x + 2, *job.row);
        for (int k = 0; k < states_end; ++k)
            if (k != 1 && !in_place(job.operand[k], compute)) store(job.operand[k], compute, begin, n, x[k], kernels);

        if (job.ema || job.copy || ask.stats)  // these take the parameter as it was stored
            x[0] = load(param, compute, begin, n, tiles.operand[0], kernels);
        if (job.ema) blend(call, job, ema, begin, n, x[0]);
        if (job.copy) store(job.operand[copy], compute, begin, n, x[0], kernels);
        if (ask.zero_grads) zero(grad, begin, n);
        if (ask.stats) {
            kernels.squares[int(compute)](n, x[0], tiles.before, update_lanes);
            kernels.squares[int(compute)](n, x[0], nullptr, param_lanes);
            const int64_t done = begin + n;
            if (done % block && done != job.n) continue;
            call.updates[call.first_block[index] + (done - 1) / block] = take(update_lanes);
            call.params[call.first_block[index] + (done - 1) / block] = take(param_lanes);
        }
    }
}

// Part p of the list has the bytes from p / parts to (p + 1) / parts of the whole, in whole blocks.
void run_part(void* context, int part) {
    Call& call = *static_cast<Call*>(context);
    FloatControl control;
    const int64_t first = call.bytes / call.parts * part;
    const int64_t last = part + 1 == call.parts ? call.bytes : call.bytes / call.parts * (part + 1);
    int64_t at = 0;
    for (size_t i = 0; i < call.jobs.size() && at < last; ++i) {
        const int64_t n = call.jobs[i].n, width = call.width(call.jobs[i]), bytes = width * n;
        if (!bytes) continue;
        auto cut = [&](int64_t limit) {
            if (limit <= at) return int64_t(0);
            if (limit >= at + bytes) return n;
            return (limit - at) / width / block * block;
        };
        const int64_t begin = cut(first), end = cut(last);
        if (begin < end) call.reading ? read(call, i, begin, end) : step(call, i, begin, end);
        at += bytes;
    }
}

void run_parts(Call& call, bool reading) {
    call.reading = reading;
    call.bytes = 0;
    for (const Job& job : call.jobs) call.bytes += call.width(job) * job.n;
    call.parts = parts_for(call.bytes);
    parallel(call.parts, run_part, &call);
}

std::vector<double> by_job(const Call& call, const std::vector<double>& blocks) {
    std::vector<double> sums(call.jobs.size(), 0.0);
    for (size_t i = 0; i < sums.size(); ++i)
        for (int64_t b = call.first_block[i], end = call.first_block[i + 1]; b < end; b += group)
            sums[i] += add(&blocks[b], std::min(group, end - b));
    return sums;
}

}  // namespace

int parts_for(int64_t bytes) {
    const int64_t threads = get_num_threads(), most = bytes / grain;
    if (threads == 1 || most < 2) return 1;
    const int64_t parts = bytes < threads * several ? threads : 4 * threads;
    return int(std::min({most, parts, int64_t(max_parts)}));
}

Outcome run(const std::vector<Job>& jobs, const OnePass& ask, const Reduce& reduce) {
    FloatControl control;
    Outcome outcome;
    Call call(jobs, ask);
    if (ask.reads_first() || ask.stats) {
        call.first_block.assign(1, 0);
        for (const Job& job : jobs) call.first_block.push_back(call.first_block.back() + (job.n + block - 1) / block);
        call.grads.resize(call.first_block.back());
        if (ask.stats) {
            call.updates.resize(call.first_block.back());
            call.params.resize(call.first_block.back());
        }
    }
    if (ask.reads_first()) {
        run_parts(call, true);
        outcome.grads = by_job(call, call.grads);
        double total = 0;
        for (double sum : outcome.grads) total += sum;
        if (reduce) std::tie(total, call.nonfinite) = reduce(outcome.grads, call.nonfinite);
        if (ask.clip) call.clip_factor = clip_factor(ask.max_norm, total);
        outcome.skipped = ask.skip_nonfinite && call.nonfinite > 0;
    }
    if (!outcome.skipped) {
        outcome.clip_factor = call.clip_factor;
        run_parts(call, false);
        if (ask.stats) {
            if (!ask.reads_first()) outcome.grads = by_job(call, call.grads);
            outcome.updates = by_job(call, call.updates);
            outcome.params = by_job(call, call.params);
        }
    }
    outcome.nonfinite = call.nonfinite;
    return outcome;
}

}  // namespace fastgd
