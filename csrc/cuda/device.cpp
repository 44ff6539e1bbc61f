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

// For work beside all streams: what is allowed while something is captured, and is not captured itself.
class Aside {
  public:
    Aside() {
        CHECK(cudaThreadExchangeStreamCaptureMode, &mode);
        CHECK(cudaStreamCreateWithFlags, &stream, cudaStreamNonBlocking);
    }
    ~Aside() {
        cudaStreamDestroy(stream);
        cudaThreadExchangeStreamCaptureMode(&mode);
    }
    void wait() const { CHECK(cudaStreamSynchronize, stream); }

    cudaStream_t stream = nullptr;

  private:
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
};

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
    const Aside aside;
    void* memory;
    CHECK(cudaMalloc, &memory, bytes);
    CHECK(cudaMemsetAsync, memory, 0, bytes, aside.stream);
    aside.wait();
    return memory;
}

void upload(void* to, const void* from, size_t bytes, Stream stream) {
    if (capturing(of(stream)) == cudaStreamCaptureStatusNone) CHECK(cudaStreamSynchronize, of(stream));
    const Aside aside;
    CHECK(cudaMemcpyAsync, to, from, bytes, cudaMemcpyHostToDevice, aside.stream);
    aside.wait();
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
    const Aside aside;
    CHECK(cudaMemcpyAsync, to, from, bytes, cudaMemcpyDeviceToHost, aside.stream);
    aside.wait();
}

uint32_t enough(const Kernel& kernel) {
    int device;
    CHECK(cudaGetDevice, &device);
    static std::mutex mutex;
    static std::map<std::pair<int, const void*>, uint32_t> known;
    std::lock_guard<std::mutex> hold(mutex);
    uint32_t& blocks = known[{device, function(kernel)}];
    if (blocks) return blocks;
    constexpr int waves = 4;  // so that no part of the chip is done long before the rest
    int resident, processors;
    const cudaError_t status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, function(kernel), threads,
                                                                             shared_bytes(kernel, true));
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
        status == cudaErrorUnsupportedPtxVersion) {
        cudaGetLastError();
        throw Failure("this build of fastgd has no code for device " + std::to_string(device) + " (" +
                      name_of(device) + "), only for the architectures " + compiled +
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
