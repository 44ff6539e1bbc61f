// The kernels' bodies, as functions of block and thread over plain pointers: nvcc makes kernels of them, and a host
// loop can run the same text. A body is a sequence of phases. `each(phase)` runs a phase in every thread of the thread
// block and then waits for all of them; what stands outside of phases is the same in all threads.
#pragma once
#include "../pass/convert.hpp"
#include "../pass/sums.hpp"
#include "coefficients.hpp"
#include "launch.hpp"

#if defined(__CUDACC__)
#define FASTGD_SLOW static __host__ __device__ __noinline__
#define FASTGD_UNROLL _Pragma("unroll")
#define FASTGD_UNROLL_8 _Pragma("unroll 8")
#else
#define FASTGD_SLOW static
#define FASTGD_UNROLL
#define FASTGD_UNROLL_8
#endif

namespace fastgd {
namespace FASTGD_UNIT {

constexpr int quad = 4;  // consecutive elements of a thread: up to 16 bytes an access
static_assert(threads * quad == block && threads % lanes == 0);

// What the threads of a thread block share.
template <class T> struct Shared {
    double lane[sums][lanes];
    double numbers[max_coefficients];
    bool last;
    alignas(16) T squares[sums][block];  // what is to be squared and added up; only there where something is
};
// For the read of the gradients.
struct ReadShared {
    double lane[threads];
    bool last;
};

// Where this thread block stands.
struct Place {
    uint32_t index, count;  // of the thread blocks
    void* shared;

    FASTGD_FN uint32_t cut(uint32_t blocks, uint32_t i) const { return uint32_t(uint64_t(blocks) * i / count); }
};

FASTGD_FN void fence() {
#if defined(__CUDA_ARCH__)
    __threadfence();
#endif
}

template <class N> FASTGD_FN N fetch_add(N* to, N x) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(N) == 8)
        return N(atomicAdd(reinterpret_cast<unsigned long long*>(to), x));
    else
        return N(atomicAdd(reinterpret_cast<unsigned int*>(to), x));
#else
    const N before = *to;
    *to += x;
    return before;
#endif
}

FASTGD_FN const PackedJob& job_at(const Launch& l, uint32_t i) {
    return *reinterpret_cast<const PackedJob*>(l.arena + i * l.stride);
}

FASTGD_FN int64_t blocks_of(const PackedJob& j) { return (j.n + block - 1) / block; }

// The last job whose first block, as `key` counts, is not beyond.
template <class Key> FASTGD_FN uint32_t job_of(const Launch& l, uint64_t wanted, Key key) {
    uint32_t low = 0, high = l.jobs;
    while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        (key(middle) <= wanted ? low : high) = middle;
    }
    return low;
}

// Where element e of operand k lies.
FASTGD_SLOW const char* address(const Launch& l, const PackedJob& j, int k, int64_t e) {
    const Access access = j.access[k];
    if (access.path() < Path::strided) return j.data[k] + e * itemsize(access.dtype());
    const int64_t* layout = reinterpret_cast<const int64_t*>(l.arena + j.layout);
    const int ndim = int(layout[0]);
    const int64_t *shape = layout + 1, *strides = shape + ndim * (1 + k);
    const char* at = j.data[k];
    for (int d = ndim - 1; d > 0; --d) {
        at += e % shape[d] * strides[d];
        e /= shape[d];
    }
    return at + e * strides[0];
}

template <class S> FASTGD_FN S take_bytes(const char* from, bool whole) {
    if (whole) return *reinterpret_cast<const S*>(from);
    S x;
    unsigned char* to = reinterpret_cast<unsigned char*>(&x);
    for (unsigned i = 0; i < sizeof x; ++i) to[i] = static_cast<unsigned char>(from[i]);
    return x;
}

template <class S> FASTGD_FN void put_bytes(S x, char* to, bool whole) {
    if (whole) {
        *reinterpret_cast<S*>(to) = x;
        return;
    }
    const char* from = reinterpret_cast<const char*>(&x);
    for (unsigned i = 0; i < sizeof x; ++i) to[i] = from[i];
}

// One element: the way of tails and of everything that does not lie in quads.
template <class T> FASTGD_SLOW T load_one(const Launch& l, const PackedJob& j, int k, int64_t e) {
    const char* at = address(l, j, k, e);
    const bool whole = j.access[k].path() != Path::bytes;
    switch (j.access[k].dtype()) {
        case Dtype::float64: return load<T>(take_bytes<double>(at, whole));
        case Dtype::float32: return load<T>(take_bytes<float>(at, whole));
        case Dtype::float16: return load<T>(take_bytes<half>(at, whole));
        default: return load<T>(take_bytes<bfloat>(at, whole));
    }
}

template <class S, class T> FASTGD_FN void store_as(T x, char* at, bool whole) {
    S y;
    store(x, y);
    put_bytes(y, at, whole);
}

template <class T> FASTGD_SLOW void store_one(const Launch& l, const PackedJob& j, int k, int64_t e, T x) {
    char* at = const_cast<char*>(address(l, j, k, e));
    const bool whole = j.access[k].path() != Path::bytes;
    switch (j.access[k].dtype()) {
        case Dtype::float64: return store_as<double>(x, at, whole);
        case Dtype::float32: return store_as<float>(x, at, whole);
        case Dtype::float16: return store_as<half>(x, at, whole);
        default: return store_as<bfloat>(x, at, whole);
    }
}

template <class S> struct alignas(sizeof(S) == 2 ? 8 : 16) Quad {
    S x[quad];
};

template <class S, class T> FASTGD_FN void load_as(const char* from, T (&x)[quad]) {
    const Quad<S> q = *reinterpret_cast<const Quad<S>*>(from);
    FASTGD_UNROLL
    for (int i = 0; i < quad; ++i) x[i] = load<T>(q.x[i]);
}

template <class S, class T> FASTGD_FN void store_as(const T (&x)[quad], char* to) {
    Quad<S> q;
    FASTGD_UNROLL
    for (int i = 0; i < quad; ++i) store(x[i], q.x[i]);
    *reinterpret_cast<Quad<S>*>(to) = q;
}

// A thread's elements [e, e + count) of operand k, in the compute type.
template <class T>
FASTGD_FN void load_quad(const Launch& l, const PackedJob& j, int k, int64_t e, int count, T (&x)[quad]) {
    const Access access = j.access[k];
    if (count == quad && access.path() == Path::quads) {
        const char* from = j.data[k] + e * itemsize(access.dtype());
        switch (access.dtype()) {
            case Dtype::float64: return load_as<double>(from, x);
            case Dtype::float32: return load_as<float>(from, x);
            case Dtype::float16: return load_as<half>(from, x);
            default: return load_as<bfloat>(from, x);
        }
    }
    FASTGD_UNROLL
    for (int i = 0; i < quad; ++i) x[i] = i < count ? load_one<T>(l, j, k, e + i) : T(0);
}

template <class T>
FASTGD_FN void store_quad(const Launch& l, const PackedJob& j, int k, int64_t e, int count, const T (&x)[quad]) {
    const Access access = j.access[k];
    if (count == quad && access.path() == Path::quads) {
        char* to = j.data[k] + e * itemsize(access.dtype());
        switch (access.dtype()) {
            case Dtype::float64: return store_as<double>(x, to);
            case Dtype::float32: return store_as<float>(x, to);
            case Dtype::float16: return store_as<half>(x, to);
            default: return store_as<bfloat>(x, to);
        }
    }
    FASTGD_UNROLL
    for (int i = 0; i < quad; ++i)
        if (i < count) store_one(l, j, k, e + i, x[i]);
}

// The parameter as it was stored.
template <class T> FASTGD_FN T as_stored(T x, Dtype dtype) {
    if (dtype == Dtype::float16) {
        half y;
        store(x, y);
        return load<T>(y);
    }
    if (dtype == Dtype::bfloat16) {
        bfloat y;
        store(x, y);
        return load<T>(y);
    }
    return x;
}

template <class T> FASTGD_FN int odd(T x) { return x - x == T(0) ? 0 : 1; }

// What a step needs beside a thread's elements, the same for all threads.
template <class Rule, class T> struct Numbers {
    typename Rule::template Coefficients<T> c;
    T sign, divisor, factor, ema_weight;
};

// The numbers of a row: rounded once to the compute type.
template <class Rule, class T, class Each>
FASTGD_FN Numbers<Rule, T> numbers_of(const Launch& l, const PackedJob& j, Shared<T>& shared, Each each) {
    using C = typename Rule::template Coefficients<T>;
    constexpr int count = sizeof(C) / sizeof(T);
    const PackedRow& row = *reinterpret_cast<const PackedRow*>(l.arena + j.row);
    const double* from = row.numbers;
    if (row.counted) {  // not by every thread: it takes some hundred instructions
        each([&](int thread) {
            if (thread != 0) return;
            double h[max_coefficients];
            for (int i = 0; i < max_coefficients; ++i) h[i] = row.numbers[i];
            if (row.lr)
                h[0] = Dtype(row.lr_dtype) == Dtype::float64 ? *static_cast<const double*>(row.lr)
                                                             : double(*static_cast<const float*>(row.lr));
            coefficients(l.rule, h, l.counters[j.counter] + 1, shared.numbers);
        });
        from = shared.numbers;
    }
    T rounded[count];
    FASTGD_UNROLL
    for (int i = 0; i < count; ++i) rounded[i] = T(from[i]);
    Numbers<Rule, T> numbers;
    memcpy(&numbers.c, rounded, sizeof rounded);
    numbers.sign = T(row.sign);
    numbers.divisor = T(l.grad_scale);
    numbers.factor = T(l.clip ? l.verdict->clip_factor : 1.0);
    numbers.ema_weight = T(l.ema_weight);
    return numbers;
}

// A thread's part of a block of elements: load and widen -> unscale and clip -> the rule -> round and store -> average
// -> copy -> zero -> what is to be added up.
template <class Rule, class T>
FASTGD_FN void step_quad(const Launch& l, const PackedJob& j, const Numbers<Rule, T>& numbers, Shared<T>& shared,
                         int64_t b, int thread) {
    constexpr int states = Rule::states;
    const int64_t e = b * block + thread * quad;
    const int64_t left = j.n - e;
    const int count = left >= quad ? quad : left > 0 ? int(left) : 0;
    T p[quad], g[quad], s[states + 1][quad];
    load_quad(l, j, 0, e, count, p);
    load_quad(l, j, 1, e, count, g);
    FASTGD_UNROLL
    for (int k = 0; k < states; ++k) load_quad(l, j, 2 + k, e, count, s[k]);

    if (l.count) {
        int found = 0;
        FASTGD_UNROLL
        for (int i = 0; i < quad; ++i) found += odd(g[i]);
        if (found) fetch_add(&l.verdict->nonfinite, uint64_t(found));
    }
    if (l.grad_scale != 1) {
        FASTGD_UNROLL
        for (int i = 0; i < quad; ++i) g[i] = g[i] / numbers.divisor;
    }
    T* square = shared.squares[0] + thread * quad;
    if (l.sum[of_grads]) {
        FASTGD_UNROLL
        for (int i = 0; i < quad; ++i) square[of_grads * block + i] = g[i];
    }
    FASTGD_UNROLL
    for (int i = 0; i < quad; ++i) {
        T x = p[i], state[states + 1];
        FASTGD_UNROLL
        for (int k = 0; k < states; ++k) state[k] = s[k][i];
        Rule::update(x, T(numbers.sign * (g[i] * numbers.factor)), state, numbers.c);
        FASTGD_UNROLL
        for (int k = 0; k < states; ++k) s[k][i] = state[k];
        const T stored = as_stored(x, j.access[0].dtype());
        if (l.sum[of_updates]) {
            square[of_updates * block + i] = stored - p[i];
            square[of_params * block + i] = stored;
        }
        p[i] = stored;
    }
    store_quad(l, j, 0, e, count, p);
    FASTGD_UNROLL
    for (int k = 0; k < states; ++k) store_quad(l, j, 2 + k, e, count, s[k]);

    if (j.access[2 + states].path() != Path::absent) {
        T average[quad];
        load_quad(l, j, 2 + states, e, count, average);
        FASTGD_UNROLL
        for (int i = 0; i < quad; ++i) average[i] = average[i] + numbers.ema_weight * (p[i] - average[i]);
        store_quad(l, j, 2 + states, e, count, average);
    }
    if (j.access[3 + states].path() != Path::absent) store_quad(l, j, 3 + states, e, count, p);
    if (l.zero_grads) {
        const T zeros[quad] = {};
        store_quad(l, j, 1, e, count, zeros);
    }
}

// The sums of one block of elements: a thread a lane, then one for the lanes.
template <class T, class Each> FASTGD_FN void add_block(const Launch& l, uint32_t at, Shared<T>& shared, Each each) {
    constexpr int apart = 32;  // each sum to a warp of its own
    each([&](int thread) {
        const int kind = thread / apart, j = thread % apart;
        if (kind >= sums || j >= lanes || !l.sum[kind]) return;
        double sum = 0;
        FASTGD_UNROLL_8
        for (int i = j; i < block; i += lanes) {  // what is missing in a last block is zero, and adds nothing
            const double x = shared.squares[kind][i];
            sum += x * x;
        }
        shared.lane[kind][j] = sum;
    });
    each([&](int thread) {
        const int kind = thread / apart;
        if (kind < sums && thread % apart == 0 && l.sum[kind])
            l.partials[uint64_t(kind) * l.blocks + at] = take(shared.lane[kind]);
    });
}

// Whether this thread block is the last of the launch to get here: all others have written what they had to.
template <class Each> FASTGD_FN bool last_one(const Launch& l, const Place& place, bool& shared, Each each) {
    each([&](int thread) {
        if (thread != 0) return;
        fence();
        shared = fetch_add(&l.verdict->done, 1u) == place.count - 1;
        fence();
    });
    return shared;
}

// The sums of blocks become sums of jobs; every group has a slot of its own.
template <class Each> FASTGD_FN void add_jobs(const Launch& l, Each each) {
    auto slot = [&](uint32_t i) { return uint64_t(job_at(l, i).first) / group + i; };
    each([&](int thread) {
        for (uint64_t at = uint64_t(thread); at < l.group_count; at += threads) {
            const uint32_t i = job_of(l, at, slot);
            const int64_t blocks = blocks_of(job_at(l, i)), begin = int64_t(at - slot(i)) * group;
            if (begin >= blocks) continue;
            const int64_t n = blocks - begin < group ? blocks - begin : group;
            for (int kind = 0; kind < sums; ++kind)
                if (l.sum[kind])
                    l.groups[kind * uint64_t(l.group_count) + at] =
                        add(l.partials + uint64_t(kind) * l.blocks + job_at(l, i).first + begin, n);
        }
    });
    each([&](int thread) {
        for (uint32_t i = uint32_t(thread); i < l.jobs; i += threads)
            for (int kind = 0; kind < sums; ++kind)
                if (l.sum[kind])
                    l.totals[kind * uint64_t(l.call_jobs) + job_at(l, i).index] =
                        add(l.groups + kind * uint64_t(l.group_count) + slot(i),
                            (blocks_of(job_at(l, i)) + group - 1) / group);
    });
}

// What a call tells, at its end; and the verdict is as it was before.
FASTGD_FN void conclude(const Launch& l) {
    volatile Verdict& v = *l.verdict;  // others have just written it
    if (l.result) {
        l.result->clip_factor = v.skipped || !l.clip ? 1 : v.clip_factor;
        l.result->nonfinite = int64_t(v.nonfinite);
        l.result->skipped = v.skipped;
    }
    v.nonfinite = 0;
    v.skipped = 0;
}

// The step of all jobs of a launch.
template <class Rule, class T, class Each> FASTGD_FN void step_body(const Launch& l, const Place& place, Each each) {
    Shared<T>& shared = *static_cast<Shared<T>*>(place.shared);
    const bool skipped = l.skip && l.verdict->skipped;
    const uint32_t end = place.cut(l.blocks, place.index + 1);
    uint32_t at = place.cut(l.blocks, place.index), i = 0;
    if (at < end && !skipped) i = job_of(l, at, [&](uint32_t k) { return job_at(l, k).first; });
    while (at < end && !skipped) {
        const PackedJob& j = job_at(l, i++);
        const Numbers<Rule, T> numbers = numbers_of<Rule>(l, j, shared, each);
        const uint64_t stop = j.first + uint64_t(blocks_of(j)), until = stop < end ? stop : end;
        for (; at < until; ++at) {
            auto step = [&](int thread) { step_quad<Rule, T>(l, j, numbers, shared, at - j.first, thread); };
            if (l.sum[of_grads] || l.sum[of_updates]) {
                each(step);
                add_block(l, at, shared, each);
            } else {
                each.alone(step);
            }
        }
        if (until < end) each([](int) {});  // shared.numbers may change
    }
    if (!l.finish || !last_one(l, place, shared.last, each)) return;
    if (!skipped && (l.sum[of_grads] || l.sum[of_updates])) add_jobs(l, each);
    each([&](int thread) {
        if (l.counters && !skipped)
            for (uint32_t k = uint32_t(thread); k < l.jobs; k += threads) ++l.counters[job_at(l, k).counter];
    });
    each([&](int thread) {
        if (thread != 0) return;
        l.verdict->done = 0;
        if (l.last) conclude(l);
    });
}

// Averages of tensors that are not stepped: operands 0 and 1.
template <class T, class Each> FASTGD_FN void average_body(const Launch& l, const Place& place, Each each) {
    if (l.skip && l.verdict->skipped) return;
    const uint32_t end = place.cut(l.blocks, place.index + 1);
    const T weight = T(l.ema_weight);
    for (uint32_t at = place.cut(l.blocks, place.index); at < end; ++at) {
        const PackedJob& j = job_at(l, job_of(l, at, [&](uint32_t k) { return job_at(l, k).first; }));
        each.alone([&](int thread) {
            const int64_t e = int64_t(at - j.first) * block + thread * quad, left = j.n - e;
            const int count = left >= quad ? quad : left > 0 ? int(left) : 0;
            T x[quad], average[quad];
            load_quad(l, j, 0, e, count, x);
            load_quad(l, j, 1, e, count, average);
            FASTGD_UNROLL
            for (int i = 0; i < quad; ++i) average[i] = average[i] + weight * (x[i] - average[i]);
            store_quad(l, j, 1, e, count, average);
        });
    }
}

// A thread's lane of a block of a gradient.
template <class T, class S> struct Dense {
    const char* from;
    FASTGD_FN T operator()(int64_t e) const { return load<T>(reinterpret_cast<const S*>(from)[e]); }
};
template <class T> struct Scattered {
    const Launch& l;
    const PackedJob& j;
    FASTGD_FN T operator()(int64_t e) const { return load_one<T>(l, j, 0, e); }
};

template <class T, class Load>
FASTGD_FN double read_lane(const Launch& l, Load load, int64_t begin, int64_t n, int& found) {
    const T divisor = T(l.grad_scale);
    double sum = 0;
    for (int64_t k = 0; k < block; k += 16 * lanes) {  // 16 loads on their way at once
        T x[16];
        FASTGD_UNROLL
        for (int i = 0; i < 16; ++i) {
            const int64_t e = begin + k + i * lanes;
            x[i] = e < n ? load(e) : T(0);
        }
        FASTGD_UNROLL
        for (int i = 0; i < 16; ++i) {
            if (l.count) found += odd(x[i]);
            const double wide = l.grad_scale != 1 ? T(x[i] / divisor) : x[i];
            sum += wide * wide;
        }
    }
    return sum;
}

template <class T> FASTGD_FN double read_block(const Launch& l, const PackedJob& j, int64_t begin, int& found) {
    const char* from = j.data[0];
    if (j.access[0].path() >= Path::strided) return read_lane<T>(l, Scattered<T>{l, j}, begin, j.n, found);
    switch (j.access[0].dtype()) {
        case Dtype::float64: return read_lane<T>(l, Dense<T, double>{from}, begin, j.n, found);
        case Dtype::float32: return read_lane<T>(l, Dense<T, float>{from}, begin, j.n, found);
        case Dtype::float16: return read_lane<T>(l, Dense<T, half>{from}, begin, j.n, found);
        default: return read_lane<T>(l, Dense<T, bfloat>{from}, begin, j.n, found);
    }
}

// The read before the step: norm, check and count in one. Sixteen threads have a block of elements, each a lane. The
// gradient is operand 0, the compute type that of operand 1, which has no data.
template <class Each> FASTGD_FN void read_body(const Launch& l, const Place& place, Each each) {
    ReadShared& shared = *static_cast<ReadShared*>(place.shared);
    const uint32_t end = place.cut(l.blocks, place.index + 1), first = place.cut(l.blocks, place.index);
    constexpr uint32_t at_once = threads / lanes;
    for (uint32_t at = first; at < end; at += at_once) {
        each([&](int thread) {
            const uint32_t b = at + uint32_t(thread) / lanes;
            if (b >= end) return;
            const PackedJob& j = job_at(l, job_of(l, b, [&](uint32_t k) { return job_at(l, k).first; }));
            const int64_t begin = int64_t(b - j.first) * block + thread % lanes;
            int found = 0;
            shared.lane[thread] = compute_of(j.access[1].dtype()) == Compute::float64
                                      ? read_block<double>(l, j, begin, found)
                                      : read_block<float>(l, j, begin, found);
            if (found) fetch_add(&l.verdict->nonfinite, uint64_t(found));
        });
        each([&](int thread) {
            const uint32_t b = at + uint32_t(thread) / lanes;
            if (thread % lanes != 0 || b >= end || !l.sum[of_grads]) return;
            double lane[lanes];
            for (int i = 0; i < lanes; ++i) lane[i] = shared.lane[thread + i];
            l.partials[b] = take(lane);
        });
    }
    if (!last_one(l, place, shared.last, each)) return;
    if (l.sum[of_grads]) add_jobs(l, each);
    each([&](int thread) {
        if (thread != 0) return;
        volatile Verdict& v = *l.verdict;
        v.done = 0;
        if (!l.last) return;
        if (l.clip) v.clip_factor = clip_factor(l.max_norm, add(l.totals, l.call_jobs));
        v.skipped = l.skip && v.nonfinite > 0;
    });
}

}  // namespace FASTGD_UNIT
}  // namespace fastgd
