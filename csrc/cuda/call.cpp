#include "call.hpp"

#include <string.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <tuple>

namespace fastgd {
namespace {

// Memory that calls of one owner use one after the other.
struct Workspace {
    Verdict* verdict = nullptr;
    double* sums = nullptr;
    size_t room = 0;                                // numbers in `sums`
    std::vector<std::pair<size_t, void*>> results;  // buffers that nobody uses any more

    void grow(size_t numbers) {
        if (!verdict) verdict = static_cast<Verdict*>(device::allocate(sizeof(Verdict)));
        if (numbers <= room) return;
        room = std::max(numbers, 2 * room);
        sums = static_cast<double*>(device::allocate(room * sizeof(double)));
    }
};

std::mutex workspaces_mutex;  // held while a call is put into its stream
std::map<device::Owner, Workspace>& workspaces() {
    static auto* all = new std::map<device::Owner, Workspace>;  // never destroyed: results outlive static destruction
    return *all;
}

Access access_of(const Operand& x) {
    const int64_t size = itemsize(x.dtype), wide = std::min<int64_t>(16, 4 * size);
    const uintptr_t at = reinterpret_cast<uintptr_t>(x.data);
    if (!x.ndim) return {x.dtype, at % wide == 0 ? Path::quads : Path::dense};
    bool whole = at % size == 0;
    for (int d = 0; d < x.ndim; ++d) whole = whole && x.strides[d] % size == 0;
    return {x.dtype, whole ? Path::strided : Path::bytes};
}

int64_t blocks_in(int64_t n) { return (n + block - 1) / block; }

// Fills launch after launch with jobs that one kernel can take: these from the front of the arena, their rows and
// layouts from the back.
class Packer {
  public:
    Packer(const OnePass& ask, int states, bool reading)
        : operands(reading ? 1 : 2 + states + (ask.ema || ask.copies ? 2 : 0)),
          stride(uint32_t((offsetof(PackedJob, data) + operands * sizeof(char*)) / 8)) {
        memset(&launch, 0, offsetof(Launch, arena));
        launch.states = uint8_t(states);
        launch.stride = stride;
        clear();
    }

    void clear() {
        launch.jobs = launch.blocks = launch.group_count = 0;
        back = Launch::words;
        rows.clear();
    }

    // False where this launch is full.
    bool add(const Job& job, bool reading, uint32_t index, uint32_t counter) {
        const Operand* at_slot[max_operands] = {};
        if (reading)
            at_slot[0] = &job.gradient;
        else
            place(job, at_slot);
        const Operand* scattered = nullptr;
        for (const Operand* x : at_slot)
            if (x && x->ndim) scattered = x;
        const int64_t blocks = blocks_in(job.n), ndim = scattered ? scattered->ndim : 0;
        const bool new_row = !reading && job.row && rows.find(job.row) == rows.end();
        const size_t needed = stride + (scattered ? 1 + ndim * (1 + operands) : 0) + new_row * row_words;
        if (needed > back - launch.jobs * stride || launch.blocks + blocks > std::numeric_limits<int32_t>::max()) {
            if (launch.jobs == 0) throw std::length_error("an array has more elements than one launch can take");
            return false;
        }
        PackedJob& packed = *reinterpret_cast<PackedJob*>(launch.arena + launch.jobs * stride);
        packed.n = job.n;
        packed.first = launch.blocks;
        packed.index = index;
        packed.counter = counter;
        packed.row = reading ? 0 : row_of(job.row);
        packed.layout = 0;
        if (scattered) {
            back -= 1 + ndim * (1 + operands);
            packed.layout = uint16_t(back);
            int64_t* at = reinterpret_cast<int64_t*>(launch.arena + back);
            *at++ = ndim;
            at = std::copy(scattered->shape, scattered->shape + ndim, at);
            for (int k = 0; k < operands; ++k, at += ndim)
                if (at_slot[k] && at_slot[k]->ndim) std::copy(at_slot[k]->strides, at_slot[k]->strides + ndim, at);
        }
        for (Access& access : packed.access) access = {Dtype::float32, Path::absent};
        for (int k = 0; k < operands; ++k) {
            if (!at_slot[k]) continue;
            packed.access[k] = access_of(*at_slot[k]);
            packed.data[k] = at_slot[k]->data;
        }
        if (reading) packed.access[1] = {dtype_of(job.compute), Path::absent};
        ++launch.jobs;
        launch.blocks += uint32_t(blocks);
        launch.group_count = uint32_t(launch.blocks / group + launch.jobs);
        return true;
    }

    Launch launch;

  private:
    static constexpr size_t row_words = sizeof(PackedRow) / 8;

    // The average and the copy have places of their own behind the states.
    void place(const Job& job, const Operand** at_slot) const {
        const int end = 2 + launch.states;
        for (int k = 0; k < end; ++k) at_slot[k] = &job.operand[k];
        if (!job.row) return;
        if (job.ema) at_slot[end] = &job.operand[end];
        if (job.copy) at_slot[end + 1] = &job.operand[end + job.ema];
    }

    uint16_t row_of(const Row* row) {
        if (!row) return 0;
        auto [at, is_new] = rows.emplace(row, uint16_t(back - row_words));
        if (is_new) {
            back -= row_words;
            PackedRow& packed = *reinterpret_cast<PackedRow*>(launch.arena + back);
            packed.sign = row->sign;
            std::copy(row->coefficients, row->coefficients + max_coefficients, packed.numbers);
            packed.lr = row->lr;
            packed.lr_dtype = int32_t(row->lr_dtype);
            packed.counted = row->counted;
        }
        return at->second;
    }

    const int operands;
    const uint32_t stride;
    size_t back;
    std::map<const Row*, uint16_t> rows;
};

// What a call does, in its stream.
class Submission {
  public:
    Submission(const std::vector<Job>& jobs, const OnePass& ask, const Into& into) : jobs(jobs), ask(ask), into(into) {
        for (const Job& job : jobs) {
            blocks += blocks_in(job.n);
            stepping += job.row != nullptr;
            const device::Kernel kernel = kernel_of(job);
            if (std::find(kernels.begin(), kernels.end(), kernel) != kernels.end()) continue;
            // Averages first: what ends the call ends the verdict, too.
            kernels.insert(job.row ? kernels.end() : kernels.begin(), kernel);
        }
        for (const device::Kernel& kernel : kernels) device::enough(kernel);  // throws before anything has changed
        if (ask.reads_first()) device::enough({});
    }

    // How many numbers the sums need.
    size_t room() const { return sums * (2 * size_t(blocks / group + 1) + size_t(blocks) + 2 * jobs.size()); }
    size_t steps() const { return stepping; }

    void run(const Workspace& space, ResultHead* head) {
        numbers = space.sums;
        verdict = space.verdict;
        result = head;
        if (ask.reads_first() && stepping) {
            run({}, true);
            if (into.reduce) decide();
        }
        for (const device::Kernel& kernel : kernels) run(kernel, kernel == kernels.back());
    }

  private:
    static device::Kernel kernel_of(const Job& job) {
        if (!job.row) return {device::averages, 0, job.compute};
        return {job.rule, job.row->variant, job.compute};
    }

    double* groups() const { return numbers + sums * size_t(blocks); }
    double* totals() const {
        if (result && ask.stats) return reinterpret_cast<double*>(result + 1);
        return groups() + sums * (size_t(blocks / group + 1) + jobs.size());
    }

    void run(const device::Kernel& kernel, bool last) {
        const bool reading = kernel.rule == device::read_gradients, averaging = kernel.rule == device::averages;
        int states = 0;
        for (const Job& job : jobs)
            if (!reading && !averaging && kernel_of(job) == kernel) states = job.operands - 2 - job.ema - job.copy;
        Packer packer(ask, states, reading);
        Launch& l = packer.launch;
        l.verdict = verdict;
        l.result = result;
        l.counters = into.counters ? into.counters->on_device : nullptr;
        l.partials = numbers;
        l.groups = groups();
        l.totals = totals();
        l.grad_scale = ask.grad_scale;
        l.max_norm = ask.max_norm;
        l.ema_weight = ask.ema_weight;
        l.call_jobs = uint32_t(stepping);
        l.rule = uint8_t(kernel.rule);
        l.clip = ask.clip;
        l.skip = ask.skip_nonfinite;
        l.count = reading ? ask.stats || ask.skip_nonfinite || into.reduce : ask.stats && !ask.reads_first();
        l.sum[of_grads] = reading ? ask.stats || ask.clip || into.reduce : ask.stats && !ask.reads_first();
        l.sum[of_updates] = l.sum[of_params] = !reading && !averaging && ask.stats;
        l.zero_grads = ask.zero_grads;
        l.finish = reading || (!averaging && (result || into.counters || ask.skip_nonfinite));

        auto flush = [&](bool ends) {
            l.last = ends;
            const uint32_t wanted = reading ? (l.blocks + threads / lanes - 1) / (threads / lanes) : l.blocks;
            if (wanted || l.finish)
                device::launch(kernel, l, std::clamp(wanted, 1u, device::enough(kernel)), into.stream);
            packer.clear();
        };
        for (size_t i = 0; i < jobs.size(); ++i) {
            const Job& job = jobs[i];
            if (reading ? !job.row : !(kernel_of(job) == kernel)) continue;
            if (job.n == 0 && !l.finish) continue;
            const uint32_t counter = into.counters && job.row ? into.counter[i] : 0;
            if (packer.add(job, reading, uint32_t(i), counter)) continue;
            flush(false);
            packer.add(job, reading, uint32_t(i), counter);
        }
        flush(last);
    }

    // Where the call has a part of the model only: the host puts the parts together.
    void decide() {
        const device::Event read(into.stream);
        std::vector<double> grads(stepping);
        Verdict told;
        read.download(grads.data(), totals(), stepping * sizeof(double));
        read.download(&told, verdict, sizeof told);
        const auto [total, nonfinite] = into.reduce(grads, int64_t(told.nonfinite));
        told.nonfinite = uint64_t(nonfinite);
        told.clip_factor = clip_factor(ask.max_norm, total);
        told.skipped = ask.skip_nonfinite && nonfinite > 0;
        device::upload(verdict, &told, sizeof told, into.stream);
    }

    const std::vector<Job>& jobs;
    const OnePass& ask;
    const Into& into;
    std::vector<device::Kernel> kernels;
    int64_t blocks = 0;
    size_t stepping = 0;
    double* numbers = nullptr;
    Verdict* verdict = nullptr;
    ResultHead* result = nullptr;
};

}  // namespace

std::shared_ptr<Pending> submit(const std::vector<Job>& jobs, const OnePass& ask, const Into& into) {
    const bool asked = ask.stats || ask.skip_nonfinite;
    std::shared_ptr<Pending> pending = asked ? std::make_shared<Pending>() : nullptr;
    const device::Current current(into.stream.device);
    Submission submission(jobs, ask, into);
    if (pending && !submission.steps()) pending->known.emplace();
    std::unique_lock<std::mutex> hold(workspaces_mutex);
    const device::Owner owner = device::owner(into.stream);
    Workspace& space = workspaces()[owner];
    if (!ask.plain() || into.counters) space.grow(ask.clip || ask.stats || into.reduce ? submission.room() : 0);
    if (pending && submission.steps()) {
        pending->owner = owner;
        pending->jobs = submission.steps();
        pending->norms = ask.stats;
        pending->bytes = sizeof(ResultHead) + (ask.stats ? sums * pending->jobs * sizeof(double) : 0);
        auto& free = space.results;
        auto fits = std::find_if(free.begin(), free.end(), [&](const auto& x) { return x.first >= pending->bytes; });
        if (fits == free.end()) {
            pending->buffer = device::allocate(pending->bytes);
        } else {
            std::tie(pending->bytes, pending->buffer) = *fits;
            free.erase(fits);
        }
    }
    submission.run(space, pending ? static_cast<ResultHead*>(pending->buffer) : nullptr);
    if (pending && pending->buffer) pending->done = std::make_unique<device::Event>(into.stream);
    if (into.counters) into.counters->last = std::make_unique<device::Event>(into.stream);
    return pending;
}

Pending::~Pending() {
    if (!buffer || owner.capture) return;  // a graph writes there each time
    std::lock_guard<std::mutex> hold(workspaces_mutex);
    workspaces()[owner].results.emplace_back(bytes, buffer);
}

const Outcome& Pending::outcome() {
    if (known && !owner.capture) return *known;
    std::vector<char> copy(sizeof(ResultHead) + (norms ? sums * jobs * sizeof(double) : 0));
    done->download(copy.data(), buffer, copy.size());
    ResultHead head;
    memcpy(&head, copy.data(), sizeof head);
    Outcome& outcome = known.emplace();
    outcome.skipped = head.skipped;
    outcome.nonfinite = head.nonfinite;
    outcome.clip_factor = head.clip_factor;
    const double* of_kind = reinterpret_cast<const double*>(copy.data() + sizeof head);
    if (norms) outcome.grads.assign(of_kind, of_kind + jobs);
    if (norms && !outcome.skipped) {
        outcome.updates.assign(of_kind + jobs, of_kind + 2 * jobs);
        outcome.params.assign(of_kind + 2 * jobs, of_kind + 3 * jobs);
    }
    return outcome;
}

Counters::Counters(const std::vector<int64_t>& steps, device::Stream stream) : count(steps.size()) {
    const device::Current current(stream.device);
    on_device = static_cast<int64_t*>(device::allocate(std::max<size_t>(count, 1) * sizeof(int64_t)));
    device::upload(on_device, steps.data(), count * sizeof(int64_t), stream);
}

std::vector<int64_t> Counters::read() const {
    std::vector<int64_t> steps(count);
    last->download(steps.data(), on_device, count * sizeof(int64_t));
    return steps;
}

}  // namespace fastgd
