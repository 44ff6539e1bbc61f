#include "device.hpp"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <new>
#include <utility>

#include "body.hpp"
#include "kernels.hpp"

namespace fastgd::device {
namespace {

// The architectures that CMakeLists.txt names, in tenths: 75;80;90.
const char* const compiled = FASTGD_ARCHITECTURES;

void check(cudaError_t status, const char* call) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // it is told here, and not once more by whoever asks next
    if (status == cudaErrorMemoryAllocation) throw std::bad_alloc();
    throw Failure(std::string(call) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}
#define CHECK(call, ...) check(call(__VA_ARGS__), #call)

cudaStream_t of(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

cudaStreamCaptureStatus capturing(cudaStream_t stream, unsigned long long* id = nullptr) {
    cudaStreamCaptureStatus status;
    unsigned long long unused;
    CHECK(cudaStreamGetCaptureInfo, stream, &status, id ? id : &unused);
    return status;
}

// What is allowed while something is captured.
class Relaxed {
  public:
    Relaxed() { CHECK(cudaThreadExchangeStreamCaptureMode, &mode); }
    ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
    Relaxed(const Relaxed&) = delete;

  private:
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
};

// A stream of the current device for work beside all others; it waits for none of them.
cudaStream_t aside() {
    static std::mutex mutex;
    static std::map<int, cudaStream_t> streams;
    int device;
    CHECK(cudaGetDevice, &device);
    std::lock_guard<std::mutex> hold(mutex);
    cudaStream_t& stream = streams[device];
    if (!stream) CHECK(cudaStreamCreateWithFlags, &stream, cudaStreamNonBlocking);
    return stream;
}

const void* function(const Kernel& kernel) {
    switch (kernel.rule) {
#define RULE(name, ...) \
    case rule_##name: return step_kernel_##name(kernel.variant, kernel.compute);
        FASTGD_RULES(RULE)
#undef RULE
        case averages: return average_kernel(kernel.compute);
    }
    return read_kernel();
}

// Bytes that the threads of a block share.
size_t shared_bytes(const Kernel& kernel, bool summing) {
    if (kernel.rule == read_gradients) return sizeof(ReadShared);
    if (kernel.compute == Compute::float64) return summing ? sizeof(Shared<double>) : offsetof(Shared<double>, squares);
    return summing ? sizeof(Shared<float>) : offsetof(Shared<float>, squares);
}

std::string name_of(int device) {
    cudaDeviceProp p;
    CHECK(cudaGetDeviceProperties, &p, device);
    return std::string(p.name) + ", " + std::to_string(p.major) + "." + std::to_string(p.minor);
}

}  // namespace

const bool is_host = false;
bool holds(dlpack::DeviceType type) { return type == dlpack::cuda || type == dlpack::cuda_managed; }

int of(const void* memory) {
    cudaPointerAttributes found{};
    if (memory) CHECK(cudaPointerGetAttributes, &found, memory);
    if (found.type != cudaMemoryTypeDevice && found.type != cudaMemoryTypeManaged) {
        int current;  // empty, or not ours to judge
        CHECK(cudaGetDevice, &current);
        return current;
    }
    return found.device;
}

Current::Current(int device) {
    CHECK(cudaGetDevice, &before);
    if (device != before) CHECK(cudaSetDevice, device);
}
Current::~Current() { cudaSetDevice(before); }

Owner owner(Stream stream) {
    unsigned long long id, capture = 0;
    CHECK(cudaStreamGetId, of(stream), &id);
    if (capturing(of(stream), &capture) == cudaStreamCaptureStatusNone) capture = 0;
    return {stream.device, id, capture};
}

void* allocate(size_t bytes) {
    const Relaxed relaxed;
    void* memory;
    CHECK(cudaMalloc, &memory, bytes);
    CHECK(cudaMemsetAsync, memory, 0, bytes, aside());
    CHECK(cudaStreamSynchronize, aside());
    return memory;
}

void upload(void* to, const void* from, size_t bytes, Stream stream) {
    if (capturing(of(stream)) == cudaStreamCaptureStatusNone) CHECK(cudaStreamSynchronize, of(stream));
    const Relaxed relaxed;
    CHECK(cudaMemcpyAsync, to, from, bytes, cudaMemcpyHostToDevice, aside());
    CHECK(cudaStreamSynchronize, aside());
}

Event::Event(Stream stream) : device(stream.device) {
    if (capturing(of(stream)) != cudaStreamCaptureStatusNone) return;
    cudaEvent_t event;
    CHECK(cudaEventCreateWithFlags, &event, cudaEventDisableTiming);
    handle = event;
    CHECK(cudaEventRecord, event, of(stream));
}

Event::~Event() {
    if (handle) cudaEventDestroy(static_cast<cudaEvent_t>(handle));
}

bool Event::passed() const {
    if (!handle) return false;
    const Relaxed relaxed;  // to ask would end a capture
    const cudaError_t status = cudaEventQuery(static_cast<cudaEvent_t>(handle));
    if (status == cudaErrorNotReady) return false;
    check(status, "cudaEventQuery");
    return true;
}

void Event::wait() const {
    const Current current(device);
    if (handle)
        CHECK(cudaEventSynchronize, static_cast<cudaEvent_t>(handle));
    else
        CHECK(cudaDeviceSynchronize);
}

void Event::download(void* to, const void* from, size_t bytes) const {
    wait();
    const Current current(device);
    const Relaxed relaxed;
    CHECK(cudaMemcpyAsync, to, from, bytes, cudaMemcpyDeviceToHost, aside());
    CHECK(cudaStreamSynchronize, aside());
}

uint32_t enough(const Kernel& kernel) {
    const Relaxed relaxed;  // the first look at a kernel loads it
    int device;
    CHECK(cudaGetDevice, &device);
    static std::mutex mutex;
    static std::map<std::pair<int, const void*>, uint32_t> known;
    std::lock_guard<std::mutex> hold(mutex);
    uint32_t& blocks = known[{device, function(kernel)}];
    if (blocks) return blocks;
    constexpr int waves = 4;  // so that no part of the chip is done long before the rest
    int resident, processors;
    const cudaError_t status =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, function(kernel), threads, shared_bytes(kernel, true));
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
        status == cudaErrorUnsupportedPtxVersion) {
        cudaGetLastError();
        throw Failure("this build of fastgd has no code for device " + std::to_string(device) + " (" + name_of(device) +
                      "), only for the architectures " + compiled +
                      "; build it with -DFASTGD_CUDA_ARCHITECTURES for this one, or update the driver");
    }
    check(status, "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    CHECK(cudaDeviceGetAttribute, &processors, cudaDevAttrMultiProcessorCount, device);
    return blocks = uint32_t(resident * processors * waves);
}

void launch(const Kernel& kernel, const Launch& launch, uint32_t blocks, Stream stream) {
    void* arguments[] = {const_cast<Launch*>(&launch)};
    const bool summing = launch.sum[of_grads] || launch.sum[of_updates];
    CHECK(cudaLaunchKernel, function(kernel), dim3(blocks), dim3(threads), arguments, shared_bytes(kernel, summing),
          of(stream));
}

std::vector<std::string> architectures() {
    std::vector<std::string> all(1);
    for (const char* c = compiled; *c; ++c)
        if (*c == ';')
            all.emplace_back();
        else
            all.back() += *c;
    return all;
}

Devices devices() {
    Devices found;
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) {
        cudaGetLastError();
        found.why_none = cudaGetErrorString(status);
        return found;
    }
    for (int i = 0; i < count; ++i) found.names.push_back(name_of(i));
    return found;
}

}  // namespace fastgd::device
