// How fast this machine reads, copies and multiplies: the limits that doctor and every benchmark divide by. One pinned
// thread per given CPU, all starting together; the clock runs from the first start to the last end. Every result is
// compared with what it must be, so that no figure is of work not done.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/probe.h"
#include "machine.h"

namespace fourfold {

struct Spread {
    double best, median;  // of the repetitions
};

struct ReadBandwidth {
    Isa isa;          // whose loads
    int64_t n_bytes;  // read in one repetition, all threads together
    std::array<Spread, kReadPatterns> bytes_per_s;
};
struct CopyBandwidth {
    int64_t n_bytes;
    Spread bytes_per_s;  // bytes that arrived: the memory carries each at least twice
};
struct Peak {
    Spread flop_per_s;
};

// All throw std::invalid_argument for no CPUs, a CPU that the process may not use, no repetitions or more bytes than
// the machine has left, and std::runtime_error for a result that is wrong.

// Walks a buffer in each ReadPattern, in turn within a repetition, so that drift meets all of them. n_bytes is shared
// out over the CPUs in whole huge pages, each part first touched by its reader; it must be many times the last-level
// caches.
ReadBandwidth measure_read_bandwidth(const Machine& machine, const std::vector<int>& cpus, int64_t n_bytes,
                                     int n_repeats);
// memcpy from one half of such a buffer to the other.
CopyBandwidth measure_copy_bandwidth(const Machine& machine, const std::vector<int>& cpus, int64_t n_bytes,
                                     int n_repeats);

struct Handover {
    int64_t n_bytes;
    double best, median;  // seconds
};
// From the first CPU's word that n_bytes, which it has just written, are there, until the second's word that it has
// read a word of every line of them; 0 bytes: the round trip of the two words alone. The CPUs must differ.
Handover measure_handover(const Machine& machine, int from, int to, int64_t n_bytes, int n_rounds);

// The peaks this machine can be asked for, fastest first: names of PeakProbe.
std::vector<std::string> peak_kinds(const Machine& machine);
// Throws std::invalid_argument also for a kind that does not exist or that the machine does not have.
Peak measure_peak(const Machine& machine, const std::vector<int>& cpus, const std::string& kind, int n_repeats);

}  // namespace fourfold
