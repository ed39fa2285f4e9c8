#include "machine.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <map>
#include <set>
#include <stdexcept>

#include "sysfiles.h"

namespace fourfold {
namespace {

constexpr const char* kCpus = "/sys/devices/system/cpu";
constexpr const char* kNodes = "/sys/devices/system/node";

std::string cpu_path(int cpu, const std::string& file) { return kCpus + ("/cpu" + std::to_string(cpu)) + "/" + file; }
std::string node_path(int node, const std::string& file) {
    return kNodes + ("/node" + std::to_string(node)) + "/" + file;
}

bool contains(const std::vector<int>& ascending, int value) {
    return std::binary_search(ascending.begin(), ascending.end(), value);
}

// "7170260 kB" of the line that starts with `key`; 0 where it is missing.
int64_t field_bytes(const SysFiles& files, const std::string& path, const std::string& key) {
    return std::strtoll(files.field(path, key).value_or("").c_str(), nullptr, 10) * 1024;
}

std::vector<int> read_online(const SysFiles& files) {
    auto online = files.cpu_list(std::string(kCpus) + "/online").value_or(std::vector<int>());
    if (!online.empty()) return online;
    for (const std::string& line : files.lines("/proc/cpuinfo")) {
        if (line.starts_with("processor")) online.push_back(static_cast<int>(online.size()));
    }
    return online.empty() ? std::vector{0} : online;
}

std::vector<int> read_offline(const SysFiles& files, const std::vector<int>& online) {
    const auto present = files.cpu_list(std::string(kCpus) + "/present").value_or(online);
    std::vector<int> offline;
    std::set_difference(present.begin(), present.end(), online.begin(), online.end(), std::back_inserter(offline));
    return offline;
}

std::vector<std::vector<int>> read_cores(const SysFiles& files, const std::vector<int>& online) {
    std::vector<std::vector<int>> cores;
    std::set<int> seen;
    for (int cpu : online) {
        if (seen.contains(cpu)) continue;
        auto siblings = intersect(
            files.cpu_list(cpu_path(cpu, "topology/thread_siblings_list")).value_or(std::vector{cpu}), online);
        if (!contains(siblings, cpu)) siblings = {cpu};
        seen.insert(siblings.begin(), siblings.end());
        cores.push_back(std::move(siblings));
    }
    return cores;
}

int count_sockets(const SysFiles& files, const std::vector<int>& online) {
    std::set<int64_t> packages;
    for (int cpu : online) packages.insert(files.integer(cpu_path(cpu, "topology/physical_package_id")).value_or(0));
    return static_cast<int>(packages.size());
}

// "32K", "60M"
int64_t parse_size(const std::string& text) {
    char* unit;
    const int64_t number = std::strtoll(text.c_str(), &unit, 10);
    return number << (*unit == 'K' ? 10 : *unit == 'M' ? 20 : *unit == 'G' ? 30 : 0);
}

std::vector<Cache> read_caches(const SysFiles& files, const std::vector<int>& online) {
    std::map<std::pair<int, int64_t>, std::vector<std::vector<int>>> found;  // by level and size
    std::set<std::pair<int, int>> known;  // (index, cpu) already listed by a sharer: hundreds of CPUs, four files each
    for (int cpu : online) {
        for (int index : files.numbered(cpu_path(cpu, "cache"), "index")) {
            if (known.contains({index, cpu})) continue;
            const std::string cache = cpu_path(cpu, "cache/index" + std::to_string(index));
            const auto sharers =
                intersect(files.cpu_list(cache + "/shared_cpu_list").value_or(std::vector{cpu}), online);
            for (int sharer : sharers) known.insert({index, sharer});
            const auto level = files.integer(cache + "/level");
            const int64_t bytes = parse_size(files.text(cache + "/size").value_or(""));
            if (!level || bytes <= 0 || files.text(cache + "/type") == "Instruction") continue;
            found[{static_cast<int>(*level), bytes}].push_back(sharers);
        }
    }
    std::vector<Cache> caches;
    for (auto& [key, sharers] : found) caches.push_back({key.first, key.second, std::move(sharers)});
    return caches;
}

Node read_node(const SysFiles& files, int id, const std::vector<int>& online, const std::vector<int>& allowed_nodes) {
    const std::string meminfo = node_path(id, "meminfo"), prefix = "Node " + std::to_string(id) + " ";
    const auto bytes = [&](const char* key) { return field_bytes(files, meminfo, prefix + key); };
    Node node;
    node.id = id;
    node.cpus = intersect(files.cpu_list(node_path(id, "cpulist")).value_or(std::vector<int>()), online);
    node.total_bytes = bytes("MemTotal");
    node.free_bytes = bytes("MemFree");
    node.available_bytes = node.free_bytes + bytes("Active(file)") + bytes("Inactive(file)");
    for (const std::string& word : split_words(files.text(node_path(id, "distance")).value_or("")))
        node.distances.push_back(std::atoi(word.c_str()));
    node.memory_allowed = contains(allowed_nodes, id);
    return node;
}

std::vector<Node> read_nodes(const SysFiles& files, const std::vector<int>& online) {
    auto ids = files.numbered(kNodes, "node");
    const auto online_nodes = files.cpu_list(std::string(kNodes) + "/online");
    if (online_nodes) ids = intersect(ids, *online_nodes);
    const auto allowed = files.field("/proc/self/status", "Mems_allowed_list");
    const auto allowed_nodes = allowed ? parse_cpu_list(*allowed) : ids;
    std::vector<Node> nodes;
    for (int id : ids) nodes.push_back(read_node(files, id, online, allowed_nodes));
    if (std::none_of(nodes.begin(), nodes.end(), [](const Node& node) { return !node.cpus.empty(); }))
        nodes = {{0, online, 0, 0, 0, {10}, true}};
    if (nodes.size() == 1) {  // the machine's own count is the better one: a node's can leave out hot-plugged memory
        nodes[0].total_bytes = field_bytes(files, "/proc/meminfo", "MemTotal");
        nodes[0].free_bytes = field_bytes(files, "/proc/meminfo", "MemFree");
        nodes[0].available_bytes = field_bytes(files, "/proc/meminfo", "MemAvailable");
    }
    return nodes;
}

// The bracketed word of "always [madvise] never".
std::string read_huge_pages(const SysFiles& files) {
    const std::string setting = files.text("/sys/kernel/mm/transparent_hugepage/enabled").value_or("");
    const size_t open = setting.find('['), close = setting.find(']', open);
    return close == std::string::npos ? "" : setting.substr(open + 1, close - open - 1);
}

}  // namespace

Machine read_machine(const std::string& root) {
    const SysFiles files(root);
    if (!files.exists("/sys") && !files.exists("/proc"))
        throw std::invalid_argument(root + " describes no machine: it holds neither sys nor proc");

    Machine machine;
    machine.model = files.field("/proc/cpuinfo", "model name").value_or("");
    const auto features = files.is_live()
                              ? read_cpuid()
                              : parse_cpu_flags(split_words(files.field("/proc/cpuinfo", "flags").value_or("")));
    machine.has_avx2 = features.avx2;
    machine.has_avx512_vnni = features.avx512_vnni;
    machine.has_avx512 = features.avx512;
    machine.has_amx = features.amx;
    machine.amx_is_present = features.amx_is_present;

    // The status file shows the main thread: a thread already pinned does not narrow the answer.
    std::optional<std::vector<int>> affinity;
    if (const auto list = files.field("/proc/self/status", "Cpus_allowed_list")) affinity = parse_cpu_list(*list);
    machine.online_cpus = read_online(files);
    // A container's /sys may number its CPUs from 0 (lxcfs does), while affinity is by the kernel's numbers: then which
    // others are online, or switched off, is not known.
    if (affinity && intersect(machine.online_cpus, *affinity).empty())
        machine.online_cpus = *affinity;
    else
        machine.offline_cpus = read_offline(files, machine.online_cpus);
    machine.nodes = read_nodes(files, machine.online_cpus);
    machine.cores = read_cores(files, machine.online_cpus);
    machine.n_sockets = count_sockets(files, machine.online_cpus);
    machine.caches = read_caches(files, machine.online_cpus);
    machine.huge_pages = read_huge_pages(files);

    machine.cgroup = read_cgroup_limits(files);
    machine.allowed_cpus = machine.online_cpus;
    if (affinity) machine.allowed_cpus = intersect(machine.allowed_cpus, *affinity);
    if (machine.cgroup.cpus) machine.allowed_cpus = intersect(machine.allowed_cpus, *machine.cgroup.cpus);

    machine.total_memory_bytes = field_bytes(files, "/proc/meminfo", "MemTotal");
    machine.available_memory_bytes = field_bytes(files, "/proc/meminfo", "MemAvailable");
    return machine;
}

std::vector<std::vector<int>> Machine::usable_cpus() const {
    std::vector<std::vector<int>> usable;
    for (const Node& node : nodes) {
        auto& cpus = usable.emplace_back();
        for (const auto& siblings : cores) {
            const auto allowed = intersect(intersect(siblings, node.cpus), allowed_cpus);
            if (!allowed.empty()) cpus.push_back(allowed.front());
        }
    }
    return usable;
}

int Machine::n_threads() const {
    int n_cpus = 0;
    for (const auto& cpus : usable_cpus()) n_cpus += static_cast<int>(cpus.size());
    if (!cgroup.cpu_quota) return n_cpus;
    return std::min(n_cpus, static_cast<int>(std::ceil(*cgroup.cpu_quota)));
}

int64_t Machine::available_bytes() const {
    return std::min(available_memory_bytes, cgroup.remaining_bytes.value_or(available_memory_bytes));
}

}  // namespace fourfold
