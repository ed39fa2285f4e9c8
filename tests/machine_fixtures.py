"""Computers as directory trees: the /sys, /proc and cgroup files that Linux would show, written below a root."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

AVX2 = "fpu sse2 avx fma f16c avx2"
AVX512_VNNI = AVX2 + " avx512f avx512dq avx512bw avx512vl avx512_vnni"
AVX512 = AVX512_VNNI + " avx512vbmi avx512_bf16"
AMX = AVX512 + " amx_bf16 amx_tile amx_int8"
GB = 1_000_000_000


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


def cpu_list(cpus: Iterable[int]) -> str:
    return ",".join(str(cpu) for cpu in cpus)


def write_machine(
    root: Path,
    *,
    n_sockets: int = 1,
    cores_per_socket: int,
    n_siblings: int = 1,
    nodes_per_socket: int = 1,
    interleaved: bool = False,
    memory_bytes: int = 16 * GB,
    flags: str = AVX512,
    model: str = "Test CPU",
    offline: Iterable[int] = (),
    huge_pages: str = "always [madvise] never",
) -> Path:
    """Cores are numbered node by node, or dealt to nodes in turn (interleaved, as some firmware does); siblings follow
    after all first siblings, as Linux has it on x86."""
    n_cores, n_nodes = n_sockets * cores_per_socket, n_sockets * nodes_per_socket
    online = [cpu for cpu in range(n_cores * n_siblings) if cpu not in set(offline)]

    def node_of(cpu: int) -> int:
        core = cpu % n_cores
        return core % n_nodes if interleaved else core * n_nodes // n_cores

    def siblings_of(cpu: int) -> list[int]:
        return [other for other in online if other % n_cores == cpu % n_cores]

    cpus = "sys/devices/system/cpu"
    write(root, f"{cpus}/online", cpu_list(online))
    write(root, f"{cpus}/present", f"0-{n_cores * n_siblings - 1}")
    blocks = []
    for cpu in online:
        socket = node_of(cpu) // nodes_per_socket
        write(root, f"{cpus}/cpu{cpu}/topology/thread_siblings_list", cpu_list(siblings_of(cpu)))
        write(root, f"{cpus}/cpu{cpu}/topology/physical_package_id", str(socket))
        package = [other for other in online if node_of(other) // nodes_per_socket == socket]
        caches = [(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2048K"), (3, "Unified", "61440K")]
        for index, (level, kind, size) in enumerate(caches):
            cache = f"{cpus}/cpu{cpu}/cache/index{index}"
            write(root, f"{cache}/level", str(level))
            write(root, f"{cache}/type", kind)
            write(root, f"{cache}/size", size)
            write(root, f"{cache}/shared_cpu_list", cpu_list(package if level == 3 else siblings_of(cpu)))
        blocks.append(f"processor\t: {cpu}\nmodel name\t: {model}\nflags\t\t: {flags}\n")
    write(root, "proc/cpuinfo", "\n".join(blocks))

    write(root, "sys/devices/system/node/online", f"0-{n_nodes - 1}")
    for node in range(n_nodes):
        path = f"sys/devices/system/node/node{node}"
        write(root, f"{path}/cpulist", cpu_list(cpu for cpu in online if node_of(cpu) == node))
        distances = (
            10 if other == node else 12 if other // nodes_per_socket == node // nodes_per_socket else 21
            for other in range(n_nodes)
        )
        write(root, f"{path}/distance", " ".join(map(str, distances)))
        kilobytes = memory_bytes // n_nodes // 1024
        fields = {"MemTotal": kilobytes, "MemFree": kilobytes // 2, "Active(file)": 1024, "Inactive(file)": 2048}
        write(root, f"{path}/meminfo", "\n".join(f"Node {node} {key}:  {value} kB" for key, value in fields.items()))
    total = memory_bytes // 1024
    write(root, "proc/meminfo", f"MemTotal: {total} kB\nMemFree: {total // 4} kB\nMemAvailable: {total // 2} kB")
    write(root, "sys/kernel/mm/transparent_hugepage/enabled", huge_pages)
    restrict(root, cpus=online, nodes=range(n_nodes))
    write(root, "proc/self/cgroup", "0::/")
    return root


def restrict(root: Path, *, cpus: Iterable[int], nodes: Iterable[int]) -> None:
    """The affinity mask, and the nodes whose memory is allowed."""
    status = f"Name:\tpython\nCpus_allowed_list:\t{cpu_list(cpus)}\nMems_allowed_list:\t{cpu_list(nodes)}"
    write(root, "proc/self/status", status)


def write_groups(root: Path, path: str, files: dict[str, str]) -> None:
    """Files of control groups: "group/file" below the mount point."""
    for name, text in files.items():
        write(root, f"{path}/{name}", text)


def server_6448h(root: Path) -> Path:
    """The reference machine: 4 × Xeon Gold 6448H, 32 cores each, siblings i and i + 128, 1 TB."""
    return write_machine(
        root,
        n_sockets=4,
        cores_per_socket=32,
        n_siblings=2,
        memory_bytes=1024 * GB,
        flags=AMX,
        model="Intel(R) Xeon(R) Gold 6448H",
    )


def container_v2(root: Path) -> Path:
    """8 of 64 CPUs, 3.5 CPUs of time (the parent's), 20 GB of memory, half of what is used being cached files."""
    write_machine(root, n_sockets=2, cores_per_socket=16, n_siblings=2, memory_bytes=256 * GB, flags=AMX)
    write(root, "proc/self/cgroup", "0::/pod/job")
    write(
        root, "proc/self/mountinfo", "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"
    )
    write_groups(
        root,
        "sys/fs/cgroup",
        {
            "cgroup.controllers": "cpuset cpu memory",
            "pod/cpu.max": "350000 100000",
            "pod/memory.max": str(30 * GB),
            "pod/memory.current": str(8 * GB),
            "pod/memory.stat": "anon 8000000000\ninactive_file 0\nactive_file 0",
            "pod/job/cpu.max": "max 100000",
            "pod/job/cpuset.cpus.effective": "0-3,32-35",
            "pod/job/memory.high": "max",
            "pod/job/memory.max": str(20 * GB),
            "pod/job/memory.current": str(8 * GB),
            "pod/job/memory.stat": f"anon {4 * GB}\nfile {4 * GB}\ninactive_file {3 * GB}\nactive_file {1 * GB}",
        },
    )
    return root


def container_v1(root: Path) -> Path:
    """2.5 CPUs of time on CPUs 4-7 and 8 GB, in a container that sees its own group as the mount's root."""
    write_machine(root, cores_per_socket=16, memory_bytes=64 * GB, flags=AVX2)
    write(root, "proc/self/cgroup", "4:memory:/docker/ab\n3:cpuset:/docker/ab\n2:cpu,cpuacct:/docker/ab\n0::/docker/ab")
    mounts = {"memory": "memory", "cpuset": "cpuset", "cpu,cpuacct": "cpu,cpuacct"}
    lines = [f"3 2 0:2 /docker/ab /sys/fs/cgroup/{at} ro - cgroup cgroup rw,{what}" for at, what in mounts.items()]
    write(root, "proc/self/mountinfo", "\n".join(lines))
    write_groups(
        root,
        "sys/fs/cgroup",
        {
            "cpu,cpuacct/cpu.cfs_quota_us": "250000",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
            "cpuset/cpuset.cpus": "4-7",
            "memory/memory.limit_in_bytes": str(8 * GB),
            "memory/memory.usage_in_bytes": str(5 * GB),
            "memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GB}\ntotal_active_file {1 * GB}",
        },
    )
    return root
