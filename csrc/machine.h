// What this computer is, as a value: read once, passed down, never asked again. Nothing here starts a thread or touches
// an array; the rest of the house decides with it.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cgroup.h"
#include "isa.h"

namespace fourfold {

struct Node {
    int id;                      // the kernel's number, as mbind wants it; numbers may have gaps
    std::vector<int> cpus;       // online ones; empty for a node of memory alone
    int64_t total_bytes;         // of memory
    int64_t free_bytes;          // holding nothing at all
    int64_t available_bytes;     // free, or holding a copy of a file
    std::vector<int> distances;  // to each node in the order of Machine::nodes; 10 is here
    bool memory_allowed;         // cpuset.mems lets this process take its pages
};

struct Cache {
    int level;                              // 1 (data), 2, 3
    int64_t bytes;                          // of one of them
    std::vector<std::vector<int>> sharers;  // for each one, the CPUs that share it
};

struct Machine {
    std::string model;  // "Intel(R) Xeon(R) Gold 6448H"; empty where the kernel does not say
    // Each is set only where the operating system saves its registers, and implies the one before it.
    bool has_avx2;
    bool has_avx512_vnni;
    bool has_avx512;
    bool has_amx;         // granted: reading the machine asks for the permission, once for the whole process
    bool amx_is_present;  // the silicon has it, granted or not

    std::vector<Node> nodes;              // ascending ids; at least one
    std::vector<int> online_cpus;         // ascending; at least one
    std::vector<int> offline_cpus;        // present, but switched off
    std::vector<std::vector<int>> cores;  // online SMT siblings of each physical core, ascending
    int n_sockets;
    std::vector<Cache> caches;  // ascending levels; instruction caches left out
    std::string huge_pages;     // "always", "madvise" or "never"; empty where the kernel has no transparent huge pages

    std::vector<int> allowed_cpus;   // online, in the cpuset, and in the affinity mask the process was started with
    CgroupLimits cgroup;             // this process's own, its ancestors' limits included
    int64_t total_memory_bytes;      // MemTotal
    int64_t available_memory_bytes;  // MemAvailable: what could be taken without swapping

    // For each of `nodes`: one allowed CPU per physical core, the first of its siblings. SMT siblings share the ports
    // that kernels saturate, so a second thread on a core only adds to the waiting.
    std::vector<std::vector<int>> usable_cpus() const;
    // The threads worth running: every usable CPU, or the CPU quota rounded up where that is less.
    int n_threads() const;
    // Memory this process may take: MemAvailable, or what the cgroup has left where that is less.
    int64_t available_bytes() const;
};

// Reads /sys, /proc and the cgroup files below root, missing files meaning the plainest machine (one node, no SMT, no
// limits). CPUID and the AMX permission are asked of this CPU where root is "/"; elsewhere the flags of /proc/cpuinfo
// stand for both. Throws std::invalid_argument where root holds neither /sys nor /proc.
Machine read_machine(const std::string& root = "/");

// What a CPU offers, each level including the one before it.
struct CpuFeatures {
    bool avx2 = false, avx512_vnni = false, avx512 = false, amx = false;  // usable: registers saved, tiles granted
    bool amx_is_present = false;
};
CpuFeatures read_cpuid();                                            // of this CPU; asks for the tiles
CpuFeatures parse_cpu_flags(const std::vector<std::string>& flags);  // of a "flags" line in /proc/cpuinfo

// The levels this machine can run, ascending; scalar always.
std::vector<Isa> available_isas(const Machine& machine);
// The level of that name, or none.
std::optional<Isa> parse_isa(std::string_view name);
// The best level, or the one that FOURFOLD_ISA names; empty means unset. Throws std::invalid_argument, in a sentence,
// where that is no level or not one of this machine's: a forced choice never falls back.
Isa choose_isa(const Machine& machine);

}  // namespace fourfold
