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
    friend std::shared_ptr<class Pending> submit(const std::vector<Job>&, const OnePass&, const struct Into&);
    size_t count;
    std::unique_ptr<device::Event> last;
};

// Where a call goes.
struct Into {
    device::Stream stream;
    Counters* counters = nullptr;   // rows that are `counted` take their step from there
    std::vector<uint32_t> counter;  // the place of each job's step count among them
    Reduce reduce;                  // needs the host in the middle of the call
};

// What a call tells. It stays on the device until someone looks.
class Pending {
  public:
    ~Pending();
    const Outcome& outcome();  // waits for the call

  private:
    friend std::shared_ptr<Pending> submit(const std::vector<Job>&, const OnePass&, const Into&);
    device::Owner owner{};
    size_t jobs = 0;
    bool norms = false;
    void* buffer = nullptr;
    size_t bytes = 0;
    std::unique_ptr<device::Event> done;
    std::optional<Outcome> known;
};

// Puts a call into a stream. Null where nobody asked for anything.
std::shared_ptr<Pending> submit(const std::vector<Job>& jobs, const OnePass& ask, const Into& into);

}  // namespace fastgd
