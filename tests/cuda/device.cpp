// The GPU's bodies on the host: thread block after thread block, in an order that changes from launch to launch, phase
// after phase, thread after thread. For csrc/cuda/device.hpp.
#include "cuda/device.hpp"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <random>

#include "cpu/float_control.hpp"
#include "cuda/body.hpp"

namespace fastgd {
namespace {

struct Each {
    template <class F> void operator()(F f) const {
        for (int thread = 0; thread < threads; ++thread) f(thread);
    }
    template <class F> void alone(F f) const { (*this)(f); }
};

using Body = void (*)(const Launch&, const Place&);

template <class Rule, class T> void step(const Launch& l, const Place& place) { step_body<Rule, T>(l, place, Each()); }
template <class T> void average(const Launch& l, const Place& place) { average_body<T>(l, place, Each()); }
void read(const Launch& l, const Place& place) { read_body(l, place, Each()); }

template <template <bool...> class Rule, int flags, int mask = 0> Body find(int variant, Compute compute) {
    if constexpr (mask < (1 << flags)) {
        using R = typename fastgd::variant<Rule, flags, mask>::type;
        if (variant != mask) return find<Rule, flags, mask + 1>(variant, compute);
        return compute == Compute::float32 ? step<R, float> : step<R, double>;
    }
    return nullptr;
}

Body body(const device::Kernel& kernel) {
    switch (kernel.rule) {
#define RULE(name, ...) \
    case rule_##name: return find<name, count(__VA_ARGS__)>(kernel.variant, kernel.compute);
        FASTGD_RULES(RULE)
#undef RULE
        case device::averages: return kernel.compute == Compute::float32 ? average<float> : average<double>;
    }
    return read;
}

std::mt19937 shuffled(0);

// A graph: while one is captured, launches are kept and not run.
struct Kept {
    device::Kernel kernel;
    Launch launch;
    uint32_t blocks;
};
std::vector<Kept> graph;
bool capturing = false;

}  // namespace

namespace device {

const bool is_host = true;
bool holds(dlpack::DeviceType type) { return type == dlpack::cpu; }
int of(const void*) { return 0; }

Current::Current(int device) : before(device) {}
Current::~Current() {}

Owner owner(Stream stream) { return {stream.device, reinterpret_cast<uint64_t>(stream.handle), uint64_t(capturing)}; }

void* allocate(size_t bytes) { return calloc(bytes, 1); }
void upload(void* to, const void* from, size_t bytes, Stream) { memcpy(to, from, bytes); }

Event::Event(Stream stream) : device(stream.device) {}
Event::~Event() {}
bool Event::passed() const { return true; }
void Event::wait() const {}
void Event::download(void* to, const void* from, size_t bytes) const { memcpy(to, from, bytes); }

uint32_t enough(const Kernel&) {
    const char* blocks = getenv("FASTGD_EMULATED_BLOCKS");
    return blocks ? uint32_t(atoi(blocks)) : 7;
}

void launch(const Kernel& kernel, const Launch& launch, uint32_t blocks, Stream) {
    if (capturing) return graph.push_back({kernel, launch, blocks});
    FloatControl control;
    std::vector<uint32_t> order(blocks);
    for (uint32_t i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), shuffled);
    for (uint32_t i : order) {
        alignas(16) static char shared[sizeof(Shared<double>)];
        memset(shared, 0xff, sizeof shared);
        body(kernel)(launch, {i, blocks, shared});
    }
}

std::vector<std::string> architectures() { return {"emulated"}; }
Devices devices() { return {{"the host"}, ""}; }

}  // namespace device
}  // namespace fastgd

extern "C" __attribute__((visibility("default"))) void emulated_capture(int begin) {
    fastgd::capturing = begin != 0;
    if (begin) fastgd::graph.clear();
}

extern "C" __attribute__((visibility("default"))) void emulated_replay() {
    for (const auto& kept : fastgd::graph) fastgd::device::launch(kept.kernel, kept.launch, kept.blocks, {0, nullptr});
}
