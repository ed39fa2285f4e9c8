// The share of the machine that control groups leave to this process, version 1, version 2, or both mounted together.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "sysfiles.h"

namespace fourfold {

struct CgroupLimits {
    std::optional<double> cpu_quota;         // CPUs' worth of time; the least of the group and its ancestors
    std::optional<std::vector<int>> cpus;    // the effective cpuset
    std::optional<int64_t> memory_bytes;     // the least limit of the group and its ancestors
    std::optional<int64_t> remaining_bytes;  // the least of limit - usage, where usage leaves out cached files: the
                                             // kernel drops those before it refuses anything
};

// Reads /proc/self/cgroup for the groups, /proc/self/mountinfo for where they are mounted (a container sees its own
// group as the root of the mount), and walks from each group up to its mount.
CgroupLimits read_cgroup_limits(const SysFiles& files);

}  // namespace fourfold
