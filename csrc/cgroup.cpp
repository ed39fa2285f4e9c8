#include "cgroup.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <string>

namespace fourfold {
namespace {

constexpr int64_t kUnlimited = int64_t{1} << 60;  // version 1 writes "no limit" as LONG_MAX rounded down to a page

struct Mount {
    bool is_v2;
    std::string root;                      // the group that is seen at `point`
    std::string point;                     // where
    std::vector<std::string> controllers;  // version 1, among other options
};

struct Group {
    bool is_v2;
    std::vector<std::string> controllers;  // version 1
    std::string path;
};

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
    return parts;
}

bool contains(const std::vector<std::string>& list, const std::string& word) {
    return std::find(list.begin(), list.end(), word) != list.end();
}

// "31 23 0:28 /root /point rw,relatime shared:9 - cgroup source rw,cpu": the fields after " - " are at its place + 1,
// 2, 3.
std::vector<Mount> read_mounts(const SysFiles& files) {
    std::vector<Mount> mounts;
    for (const std::string& line : files.lines("/proc/self/mountinfo")) {
        const auto words = split_words(line);
        const auto dash = std::find(words.begin(), words.end(), "-");
        if (dash - words.begin() < 6 || words.end() - dash < 4) continue;
        if (dash[1] == "cgroup2") mounts.push_back({true, words[3], words[4], {}});
        if (dash[1] == "cgroup") mounts.push_back({false, words[3], words[4], split(dash[3], ',')});
    }
    return mounts;
}

// "4:memory:/path", or "0::/path" for version 2.
std::vector<Group> read_groups(const SysFiles& files) {
    std::vector<Group> groups;
    for (const std::string& line : files.lines("/proc/self/cgroup")) {
        const size_t first = line.find(':');
        const size_t second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        groups.push_back({controllers.empty(), split(controllers, ','), line.substr(second + 1)});
    }
    return groups;
}

// The group's directory and its ancestors' up to the mount. A path outside the mount (another namespace's) leaves the
// mount.
std::vector<std::string> directories(const Group& group, const Mount& mount) {
    std::string below = group.path;
    if (mount.root != "/") {
        const bool inside = (group.path + "/").starts_with(mount.root + "/");
        below = inside ? group.path.substr(mount.root.size()) : "";
    }
    if (!below.starts_with('/') || below == "/" || below.find("/..") != std::string::npos) below.clear();
    std::vector<std::string> found;
    for (; !below.empty(); below.erase(below.rfind('/'))) found.push_back(mount.point + below);
    found.push_back(mount.point);
    return found;
}

template <typename T>
void lower(std::optional<T>& least, std::optional<T> limit) {
    if (limit && (!least || *limit < *least)) least = limit;
}

std::optional<double> quota(const SysFiles& files, const std::string& group, bool is_v2) {
    double quota_us = 0, period_us = 0;
    if (is_v2) {
        std::istringstream(files.text(group + "/cpu.max").value_or("max")) >> quota_us >> period_us;
    } else {
        quota_us = static_cast<double>(files.integer(group + "/cpu.cfs_quota_us").value_or(-1));
        period_us = static_cast<double>(files.integer(group + "/cpu.cfs_period_us").value_or(0));
    }
    if (quota_us <= 0 || period_us <= 0) return std::nullopt;  // "max", -1, no file
    return quota_us / period_us;
}

std::optional<std::vector<int>> cpuset(const SysFiles& files, const std::string& group, bool is_v2) {
    const auto names =
        is_v2 ? std::vector{"cpuset.cpus.effective"} : std::vector{"cpuset.effective_cpus", "cpuset.cpus"};
    for (const char* name : names) {
        const auto cpus = files.cpu_list(group + "/" + name);
        if (cpus && !cpus->empty()) return cpus;
    }
    return std::nullopt;
}

void lower_memory(const SysFiles& files, const std::string& group, bool is_v2, CgroupLimits& limits) {
    std::optional<int64_t> limit;
    if (is_v2) {
        lower(limit, files.integer(group + "/memory.max"));
        lower(limit, files.integer(group + "/memory.high"));  // beyond it the kernel throttles to a crawl
    } else {
        lower(limit, files.integer(group + "/memory.limit_in_bytes"));
    }
    if (!limit || *limit >= kUnlimited) return;
    const auto usage = files.integer(group + (is_v2 ? "/memory.current" : "/memory.usage_in_bytes"));
    int64_t held = usage.value_or(0);
    for (const std::string list : {"inactive_file", "active_file"}) {
        const auto cached = files.field(group + "/memory.stat", (is_v2 ? "" : "total_") + list);
        if (cached) held -= std::strtoll(cached->c_str(), nullptr, 10);
    }
    lower(limits.memory_bytes, limit);
    lower(limits.remaining_bytes, std::optional(std::max<int64_t>(0, *limit - std::max<int64_t>(0, held))));
}

}  // namespace

CgroupLimits read_cgroup_limits(const SysFiles& files) {
    CgroupLimits limits;
    const auto mounts = read_mounts(files);
    for (const Group& group : read_groups(files)) {
        for (const Mount& mount : mounts) {
            if (mount.is_v2 != group.is_v2) continue;
            const auto rules = [&](const std::string& controller) {
                return group.is_v2 ||
                       (contains(group.controllers, controller) && contains(mount.controllers, controller));
            };
            for (const std::string& directory : directories(group, mount)) {
                if (rules("cpu")) lower(limits.cpu_quota, quota(files, directory, group.is_v2));
                if (rules("cpuset") && !limits.cpus) limits.cpus = cpuset(files, directory, group.is_v2);
                if (rules("memory")) lower_memory(files, directory, group.is_v2, limits);
            }
        }
    }
    return limits;
}

}  // namespace fourfold
