#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "machine.h"

namespace nb = nanobind;
using namespace fourfold;

void bind_machine(nb::module_& m) {
    nb::class_<Node>(m, "Node")
        .def_ro("id", &Node::id)
        .def_ro("cpus", &Node::cpus)
        .def_ro("total_bytes", &Node::total_bytes)
        .def_ro("free_bytes", &Node::free_bytes)
        .def_ro("available_bytes", &Node::available_bytes)
        .def_ro("distances", &Node::distances)
        .def_ro("memory_allowed", &Node::memory_allowed);
    nb::class_<Cache>(m, "Cache")
        .def_ro("level", &Cache::level)
        .def_ro("bytes", &Cache::bytes)
        .def_ro("sharers", &Cache::sharers);
    nb::class_<CgroupLimits>(m, "CgroupLimits")
        .def_ro("cpu_quota", &CgroupLimits::cpu_quota)
        .def_ro("cpus", &CgroupLimits::cpus)
        .def_ro("memory_bytes", &CgroupLimits::memory_bytes)
        .def_ro("remaining_bytes", &CgroupLimits::remaining_bytes);
    nb::class_<Machine>(m, "Machine")
        .def_ro("model", &Machine::model)
        .def_ro("has_avx2", &Machine::has_avx2)
        .def_ro("has_avx512_vnni", &Machine::has_avx512_vnni)
        .def_ro("has_avx512", &Machine::has_avx512)
        .def_ro("has_amx", &Machine::has_amx)
        .def_ro("amx_is_present", &Machine::amx_is_present)
        .def_ro("nodes", &Machine::nodes)
        .def_ro("online_cpus", &Machine::online_cpus)
        .def_ro("offline_cpus", &Machine::offline_cpus)
        .def_ro("cores", &Machine::cores)
        .def_ro("n_sockets", &Machine::n_sockets)
        .def_ro("caches", &Machine::caches)
        .def_ro("huge_pages", &Machine::huge_pages)
        .def_ro("allowed_cpus", &Machine::allowed_cpus)
        .def_ro("cgroup", &Machine::cgroup)
        .def_ro("total_memory_bytes", &Machine::total_memory_bytes)
        .def_ro("available_memory_bytes", &Machine::available_memory_bytes)
        .def("usable_cpus", &Machine::usable_cpus)
        .def("n_threads", &Machine::n_threads)
        .def("available_bytes", &Machine::available_bytes)
        .def("isas",
             [](const Machine& machine) {
                 std::vector<std::string> names;
                 for (Isa isa : available_isas(machine)) names.emplace_back(to_string(isa));
                 return names;
             })
        .def("choose_isa", [](const Machine& machine) { return std::string(to_string(choose_isa(machine))); });
    m.def("read_machine", &read_machine, nb::arg("root") = "/");
}
