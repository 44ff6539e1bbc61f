// What a call needs from a GPU: memory, streams, launches. device.cpp asks the CUDA runtime; the tests have another,
// which runs the same bodies on the host. Whatever the runtime refuses is thrown, as Failure or, where memory is short,
// std::bad_alloc.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../bind/dlpack.hpp"
#include "../cpu/kernels.hpp"
#include "launch.hpp"

namespace fastgd::device {

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

extern const bool is_host;            // whether this is no GPU but its emulation
bool holds(dlpack::DeviceType type);  // whether its tensors lie there
int of(const void* memory);           // the device that memory belongs to

struct Stream {
    int device;
    void* handle;
};

// The kernel of a rule's variant; or, in the place of a rule, the read of the gradients, or averages without a step.
constexpr int read_gradients = -1, averages = -2;
struct Kernel {
    int rule = read_gradients, variant = 0;
    Compute compute = Compute::float32;

    bool operator==(const Kernel&) const = default;
};

// Makes a device the current one for as long as it lives.
class Current {
  public:
    explicit Current(int device);
    ~Current();
    Current(const Current&) = delete;

  private:
    int before;
};

// Which memory of ours a call on this stream may use: never one that another call may be using. A stream has its own;
// while it is captured, each capture has its own, for a graph may be replayed beside anything.
struct Owner {
    int device;
    uint64_t stream, capture;  // capture: 0 for none

    auto operator<=>(const Owner&) const = default;
};
Owner owner(Stream stream);

// Zeroed memory on the current device, also while something is captured; kept for good, since a captured graph may
// come back to it at any time.
void* allocate(size_t bytes);

// To and from the device, at once; `download` waits for what the event stands for.
void upload(void* to, const void* from, size_t bytes, Stream stream);

// A mark in a stream. In a stream that is captured it stands for whatever the device has to do.
class Event {
  public:
    explicit Event(Stream stream);
    ~Event();
    Event(const Event&) = delete;
    bool passed() const;
    void wait() const;
    void download(void* to, const void* from, size_t bytes) const;

  private:
    const int device;
    void* handle = nullptr;
};

// How many thread blocks of a kernel keep the current device busy to the end. Throws where it has no such kernel.
uint32_t enough(const Kernel& kernel);

void launch(const Kernel& kernel, const Launch& launch, uint32_t blocks, Stream stream);

// Which architectures were compiled, and the devices there are, or why there are none.
std::vector<std::string> architectures();
struct Devices {
    std::vector<std::string> names;
    std::string why_none;
};
Devices devices();

}  // namespace fastgd::device
