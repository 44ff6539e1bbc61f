// A call on the GPU: jobs packed into launches, in a stream, and what they will have told when it is done.
#pragma once
#include <memory>
#include <optional>

#include "../cpu/pass.hpp"
#include "device.hpp"

namespace fastgd {

// Step counts that live on the device, for a host that does not know which steps were skipped.
class Counters {
  public:
    Counters(const std::vector<int64_t>& steps, device::Stream stream);
    std::vector<int64_t> read() const;  // waits for the last call

    int64_t* on_device;

  private:
    friend class Pending;
    friend std::shared_ptr<class Pending> submit(const std::vector<Job>&, const OnePass&, device::Stream, Counters*,
                                                 const std::vector<uint32_t>&);
    size_t count;
    std::unique_ptr<device::Event> last;
};

// What a call tells. It stays on the device until someone looks.
class Pending {
  public:
    ~Pending();
    const Outcome& outcome();  // waits for the call

  private:
    friend std::shared_ptr<Pending> submit(const std::vector<Job>&, const OnePass&, device::Stream, Counters*,
                                           const std::vector<uint32_t>&);
    device::Owner owner{};
    size_t jobs = 0;
    bool norms = false;
    void* buffer = nullptr;
    size_t bytes = 0;
    std::unique_ptr<device::Event> done;
    std::optional<Outcome> known;
};

// Puts a call into the stream. With counters, `counter` has the place of each job's step count among them, and rows
// that are `counted` take their step from there. Null where nobody asked for anything.
std::shared_ptr<Pending> submit(const std::vector<Job>& jobs, const OnePass& ask, device::Stream stream,
                                Counters* counters, const std::vector<uint32_t>& counter);

}  // namespace fastgd
