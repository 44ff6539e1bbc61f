#include "pool.hpp"

#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace fastgd {
namespace {

std::atomic<int> num_threads{1};
std::atomic<uint64_t> generation{0};

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    __asm__ __volatile__("yield");
#endif
}

// Spins a little, since the next step often follows at once, then parks.
template <class T, class Until> void wait(const std::atomic<T>& value, Until until) {
    constexpr int spins = 2000;  // 50 microseconds on a Zen 5, more or less elsewhere
    for (int i = 0; i < spins; ++i) {
        if (until(value.load(std::memory_order_acquire))) return;
        pause();
    }
    for (T seen = value.load(std::memory_order_acquire); !until(seen); seen = value.load(std::memory_order_acquire))
        value.wait(seen, std::memory_order_acquire);
}

constexpr uint64_t job_unit = 2048;
static_assert(max_parts < job_unit);

struct Pool {
    std::mutex busy;
    int workers = 0;
    void (*task)(void*, int) = nullptr;
    void* context = nullptr;
    alignas(64) std::atomic<int> unfinished{0};  // waited on by the caller, as job is by the workers
    // A job's number, and in its low bits how many parts it has: one word, so that a late worker never mixes two jobs.
    alignas(64) std::atomic<uint64_t> job{0};
    // The last job whose part this was given away. Every worker starts at parts of its own, the same from step to step
    // so that caches stay warm; whoever is done early takes what a late one has not begun.
    alignas(64) std::atomic<uint64_t> given[max_parts] = {};

    void share(uint64_t current, int member) {
        const int parts = int(current % job_unit), threads = std::min(get_num_threads(), parts);
        if (member >= threads) return;
        const int first = member * parts / threads;
        for (int i = 0; i < parts; ++i) {
            const int part = (first + i) % parts;
            uint64_t before = given[part].load(std::memory_order_relaxed);
            if (before >= current || !given[part].compare_exchange_strong(before, current)) continue;
            task(context, part);  // task and context stay until this part is finished
            if (unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished.notify_one();
        }
    }

    void work(int member) {
        for (uint64_t seen = 0;;) {
            wait(job, [&](uint64_t j) { return j != seen; });
            seen = job.load(std::memory_order_acquire);
            share(seen, member);
        }
    }

    void grow(int wanted) {
        try {
            for (; workers < wanted; ++workers) std::thread([this, member = workers + 1] { work(member); }).detach();
        } catch (const std::system_error&) {  // out of threads: fewer will do
        }
    }

    void run(int parts, void (*f)(void*, int), void* c) {
        grow(std::min(get_num_threads(), parts) - 1);
        task = f;
        context = c;
        unfinished.store(parts, std::memory_order_relaxed);
        const uint64_t current = (job.load(std::memory_order_relaxed) / job_unit + 1) * job_unit + uint64_t(parts);
        job.store(current, std::memory_order_release);
        job.notify_all();
        share(current, 0);
        wait(unfinished, [](int n) { return n == 0; });
    }
};

// Never destroyed: its threads outlive static destruction. A forked child has none of them and starts anew.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
    Pool* p = pool.load(std::memory_order_acquire);
    if (p) return *p;
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(p, fresh)) return *fresh;
    delete fresh;
    return *p;
}

}  // namespace

void start_anew_in_forked_children() {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] {
        pool.store(nullptr);
        ++generation;
    });
#endif
}

uint64_t forks() { return generation.load(std::memory_order_relaxed); }

int get_num_threads() { return num_threads.load(std::memory_order_relaxed); }
void set_num_threads(int n) { num_threads.store(n, std::memory_order_relaxed); }

void parallel(int parts, void (*task)(void*, int), void* context) {
    if (parts > 1) {
        Pool& p = the_pool();
        if (p.busy.try_lock()) {
            std::lock_guard<std::mutex> hold(p.busy, std::adopt_lock);
            return p.run(parts, task, context);
        }
    }
    for (int part = 0; part < parts; ++part) task(context, part);
}

}  // namespace fastgd
