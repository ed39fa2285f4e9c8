#include "probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <latch>
#include <stdexcept>
#include <thread>

#include "affinity.h"
#include "memory.h"

namespace fourfold {
namespace {

struct Lanes {
    using Vector = uint64_t;
    static Vector zero() { return 0; }
    static Vector load(const uint8_t* p) { return *reinterpret_cast<const uint64_t*>(p); }
    static Vector add(Vector a, Vector b) { return a + b; }
};
#include "kernels/probe_read.inl"

}  // namespace
constinit const ReadProbe kReadScalar = read_probe(Isa::scalar);
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr auto kPeakTime = std::chrono::milliseconds(50);  // a repetition: long enough for the clock rate to settle
constexpr const PeakProbe* kPeaks[] = {&kPeakAmxBf16, &kPeakAvx512Int8, &kPeakAvx512Bf16, &kPeakAvx512F32,
                                       &kPeakAvx2F32};

using Clock = std::chrono::steady_clock;

// A part for each CPU's thread, resident where that thread first touches it.
std::vector<NodeMemory> parts(size_t n_parts, size_t part_bytes) {
    std::vector<NodeMemory> parts;
    for (size_t i = 0; i < n_parts; ++i) parts.emplace_back(part_bytes, kAnyNode);
    return parts;
}

// body(i) on a thread pinned to cpus[i], for all i at once. Nothing runs where a CPU cannot be had.
void run_pinned(const std::vector<int>& cpus, const std::function<void(size_t)>& body) {
    if (cpus.empty()) throw std::invalid_argument("a measurement needs at least one CPU");
    std::latch pinned(1);
    bool all_pinned = false;
    std::vector<std::jthread> threads;
    struct Release {  // before the threads are joined, whatever happens
        std::latch& latch;
        ~Release() { latch.count_down(); }
    } release{pinned};
    for (size_t i = 0; i < cpus.size(); ++i) {
        threads.emplace_back([&, i] {
            pinned.wait();
            if (all_pinned) body(i);
        });
        if (!CpuSet::only(cpus[i]).bind(threads.back().native_handle()))
            throw std::invalid_argument("CPU " + std::to_string(cpus[i]) + " is not one that this process may use");
    }
    all_pinned = true;
}

// prepare(i) once and then trial(i, t) for each t on every thread i, no trial before all threads are done with the one
// before it. Seconds of each trial, from the first start to the last end. trial says whether its result was right.
std::vector<double> time_trials(const std::vector<int>& cpus, size_t n_trials,
                                const std::function<void(size_t)>& prepare,
                                const std::function<bool(size_t, size_t)>& trial) {
    struct Span {
        Clock::time_point start, end;
    };
    std::vector<std::vector<Span>> spans(cpus.size(), std::vector<Span>(n_trials));
    std::atomic<size_t> n_arrived = 0;
    std::atomic<bool> wrong = false;
    run_pinned(cpus, [&](size_t i) {
        prepare(i);
        for (size_t t = 0; t < n_trials; ++t) {
            ++n_arrived;
            while (n_arrived < (t + 1) * cpus.size()) std::this_thread::yield();
            spans[i][t].start = Clock::now();
            if (!trial(i, t)) wrong = true;
            spans[i][t].end = Clock::now();
        }
    });
    if (wrong)
        throw std::runtime_error("a measurement gave a wrong result: this machine's memory or CPU cannot be trusted");
    std::vector<double> seconds;
    for (size_t t = 0; t < n_trials; ++t) {
        Span all = spans[0][t];
        for (const auto& thread : spans) all = {std::min(all.start, thread[t].start), std::max(all.end, thread[t].end)};
        seconds.push_back(std::chrono::duration<double>(all.end - all.start).count());
    }
    return seconds;
}

Spread spread(std::vector<double> rates) {
    std::sort(rates.begin(), rates.end());
    return {rates.back(), (rates[(rates.size() - 1) / 2] + rates[rates.size() / 2]) / 2};
}

void check_repeats(int n_repeats) {
    if (n_repeats < 1) throw std::invalid_argument("a measurement needs at least one repetition");
}

// Bytes for each of the CPUs, so that together they have n_bytes or a little more.
size_t share(const Machine& machine, const std::vector<int>& cpus, int64_t n_bytes) {
    if (n_bytes < 1 || n_bytes > machine.available_bytes()) {
        throw std::invalid_argument("a measurement over " + std::to_string(n_bytes) + " bytes does not fit the " +
                                    std::to_string(machine.available_bytes()) + " bytes available");
    }
    const size_t n_cpus = std::max<size_t>(1, cpus.size());
    const size_t exact = (static_cast<size_t>(n_bytes) + n_cpus - 1) / n_cpus;
    return (exact + kHugePage - 1) / kHugePage * kHugePage;
}

// Word i is i * kStep; they sum to kStep * n (n - 1) / 2, modulo 2^64.
constexpr uint64_t kStep = 0x9E3779B97F4A7C15;  // odd, so that all words differ
void fill(uint8_t* data, size_t n_bytes) {
    auto* words = reinterpret_cast<uint64_t*>(data);
    for (size_t i = 0; i < n_bytes / sizeof(uint64_t); ++i) words[i] = i * kStep;
}
uint64_t filled_sum(size_t n_bytes) {
    const uint64_t n = n_bytes / sizeof(uint64_t);  // even
    return kStep * (n / 2) * (n - 1);
}

}  // namespace

ReadBandwidth measure_read_bandwidth(const Machine& machine, const std::vector<int>& cpus, int64_t n_bytes,
                                     int n_repeats) {
    check_repeats(n_repeats);
    const ReadProbe& probe = machine.has_avx512_vnni ? kReadAvx512 : machine.has_avx2 ? kReadAvx2 : kReadScalar;
    const size_t share_bytes = share(machine, cpus, n_bytes);
    const auto memory = parts(cpus.size(), share_bytes);
    const uint64_t expected = filled_sum(share_bytes);
    const auto part = [&](size_t i) { return memory[i].as<>(); };
    const auto seconds = time_trials(
        cpus, kReadPatterns * static_cast<size_t>(n_repeats), [&](size_t i) { fill(part(i), share_bytes); },
        [&](size_t i, size_t t) { return probe.run[t % kReadPatterns](part(i), share_bytes) == expected; });

    ReadBandwidth result = {probe.isa, static_cast<int64_t>(share_bytes * cpus.size()), {}};
    for (size_t pattern = 0; pattern < kReadPatterns; ++pattern) {
        std::vector<double> rates;
        for (size_t t = pattern; t < seconds.size(); t += kReadPatterns)
            rates.push_back(static_cast<double>(result.n_bytes) / seconds[t]);
        result.bytes_per_s[pattern] = spread(rates);
    }
    return result;
}

CopyBandwidth measure_copy_bandwidth(const Machine& machine, const std::vector<int>& cpus, int64_t n_bytes,
                                     int n_repeats) {
    check_repeats(n_repeats);
    const size_t share_bytes = share(machine, cpus, n_bytes), half = share_bytes / 2;
    const auto memory = parts(cpus.size(), share_bytes);
    const auto part = [&](size_t i) { return memory[i].as<>(); };
    const auto seconds = time_trials(
        cpus, static_cast<size_t>(n_repeats), [&](size_t i) { fill(part(i), share_bytes); },
        [&](size_t i, size_t) {
            std::memcpy(part(i) + half, part(i), half);
            return std::memcmp(part(i) + share_bytes - kReadGrain, part(i) + half - kReadGrain, kReadGrain) == 0;
        });
    CopyBandwidth result = {static_cast<int64_t>(half * cpus.size()), {}};
    std::vector<double> rates;
    for (double s : seconds) rates.push_back(static_cast<double>(result.n_bytes) / s);
    result.bytes_per_s = spread(rates);
    return result;
}

Handover measure_handover(const Machine& machine, int from, int to, int64_t n_bytes, int n_rounds) {
    check_repeats(n_rounds);
    if (from == to) throw std::invalid_argument("a hand-over needs two CPUs, not one twice");
    if (n_bytes < 0 || n_bytes > machine.available_bytes())
        throw std::invalid_argument("a hand-over of " + std::to_string(n_bytes) + " bytes does not fit this machine");
    constexpr size_t kLine = 64, kWarmUp = 100;
    struct alignas(kLine) Word {
        std::atomic<uint64_t> value{0};
        void await(uint64_t round) const {
            for (size_t spins = 1; value.load(std::memory_order_acquire) != round; ++spins) {
                __builtin_ia32_pause();
                if (spins % 4096 == 0) std::this_thread::yield();  // the other may wait for this CPU
            }
        }
    } given, taken;
    const size_t n_lines = (static_cast<size_t>(n_bytes) + kLine - 1) / kLine,
                 n_words = n_lines * kLine / sizeof(uint64_t);
    const NodeMemory memory(n_lines * kLine, kAnyNode);
    auto* words = memory.as<uint64_t>();
    const uint64_t n_all = static_cast<uint64_t>(n_rounds) + kWarmUp;
    std::vector<double> seconds;
    std::atomic<bool> wrong = false;
    run_pinned({from, to}, [&](size_t side) {
        for (uint64_t round = 1; round <= n_all; ++round) {
            if (side == 0) {
                for (size_t i = 0; i < n_words; ++i) words[i] = round + i;
                const auto start = Clock::now();
                given.value.store(round, std::memory_order_release);
                taken.await(round);
                const std::chrono::duration<double> passed = Clock::now() - start;
                if (round > kWarmUp) seconds.push_back(passed.count());
            } else {
                given.await(round);
                uint64_t sum = 0;
                for (size_t i = 0; i < n_words; i += kLine / sizeof(uint64_t)) sum += words[i] - i;
                if (sum != n_lines * round) wrong = true;
                taken.value.store(round, std::memory_order_release);
            }
        }
    });
    if (wrong)
        throw std::runtime_error("a core read something else than another wrote: this machine cannot be trusted");
    std::sort(seconds.begin(), seconds.end());
    return {n_bytes, seconds.front(), seconds[seconds.size() / 2]};
}

std::vector<std::string> peak_kinds(const Machine& machine) {
    const auto isas = available_isas(machine);
    std::vector<std::string> kinds;
    for (const PeakProbe* probe : kPeaks)
        if (std::find(isas.begin(), isas.end(), probe->isa) != isas.end()) kinds.emplace_back(probe->name);
    return kinds;
}

Peak measure_peak(const Machine& machine, const std::vector<int>& cpus, const std::string& kind, int n_repeats) {
    check_repeats(n_repeats);
    const auto kinds = peak_kinds(machine);
    if (std::find(kinds.begin(), kinds.end(), kind) == kinds.end()) {
        std::string names;
        for (const std::string& name : kinds) names += " " + name;
        throw std::invalid_argument("this machine has no peak called " + kind + "; it has:" + names);
    }
    const auto named = [&kind](const PeakProbe* probe) { return probe->name == kind; };
    const PeakProbe& probe = **std::find_if(std::begin(kPeaks), std::end(kPeaks), named);

    std::vector<std::atomic<int64_t>> n_calls(static_cast<size_t>(n_repeats) + 1);  // the first repetition warms up
    const auto seconds = time_trials(
        cpus, n_calls.size(), [](size_t) {},
        [&](size_t, size_t t) {
            const auto end = Clock::now() + kPeakTime;
            bool right = true;
            for (; Clock::now() < end; ++n_calls[t]) right = probe.run() * 2 == probe.flops_per_call && right;
            return right;
        });
    std::vector<double> rates;
    for (size_t t = 1; t < seconds.size(); ++t)
        rates.push_back(static_cast<double>(n_calls[t]) * probe.flops_per_call / seconds[t]);
    return {spread(rates)};
}

}  // namespace fourfold
