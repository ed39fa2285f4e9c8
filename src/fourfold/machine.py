"""What this computer is, as a value, and where ranks go on it. Reads through the native core; starts nothing."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from pathlib import Path

import fourfold._core as _core
from fourfold.errors import ResourceError, UnsupportedError, UserError

MAX_RANKS = 64  # of the native core too
MAX_THREADS = 4096


@dataclass(frozen=True)
class Node:
    """A NUMA node: CPUs and the memory beside them."""

    id: int  # the kernel's number
    cpus: list[int]  # online
    usable_cpus: list[int]  # what ranks may be pinned to: one allowed CPU per physical core
    total_bytes: int
    free_bytes: int  # holding nothing at all
    available_bytes: int  # free, or holding a copy of a file
    distances: list[int]  # to each node in the order of Machine.nodes; 10 is here
    memory_allowed: bool  # whether this process may take its pages

    @property
    def has_memory(self) -> bool:
        """Whether there is any for this process."""
        return self.memory_allowed and self.total_bytes > 0


@dataclass(frozen=True)
class Cache:
    level: int  # 1 (data), 2, 3
    bytes: int  # of one of them
    sharers: list[list[int]]  # for each one, the CPUs that share it


@dataclass(frozen=True)
class CgroupLimits:
    """The share that control groups leave to this process; None where they set no limit."""

    cpu_quota: float | None  # CPUs' worth of time
    cpus: list[int] | None
    memory_bytes: int | None
    remaining_bytes: int | None  # cached files count as remaining


@dataclass(frozen=True)
class Machine:
    model: str
    isas: list[str]  # ascending; AMX only where the operating system grants it
    amx_is_present: bool  # in the silicon, granted or not
    nodes: list[Node]
    online_cpus: list[int]
    offline_cpus: list[int]  # present, but switched off
    allowed_cpus: list[int]  # online, in the cpuset and in the affinity mask
    cores: list[list[int]]  # online SMT siblings of each physical core
    n_sockets: int
    caches: list[Cache]
    huge_pages: str  # always, madvise or never; empty where the kernel has none
    cgroup: CgroupLimits
    total_bytes: int
    available_bytes: int  # what this process may take, the cgroup's limit included
    n_threads: int  # worth running: the usable CPUs, or the CPU quota rounded up where that is less


@dataclass(frozen=True)
class RankPlan:
    """Where one tensor-parallel rank lives: its memory on a node, one thread pinned to each CPU."""

    node: int  # the CPUs' own, or where that has no memory for this process the nearest that does
    cpus: list[int]


def read_machine(root: str = "/") -> Machine:
    """Reads /sys, /proc and the cgroup files below root; "/" also asks the CPU itself."""
    try:
        native = _core.read_machine(root)
    except ValueError as error:
        raise UnsupportedError(str(error)) from None
    limits = native.cgroup
    return Machine(
        model=native.model,
        isas=native.isas(),
        amx_is_present=native.amx_is_present,
        nodes=[
            Node(
                id=node.id,
                cpus=node.cpus,
                usable_cpus=usable,
                total_bytes=node.total_bytes,
                free_bytes=node.free_bytes,
                available_bytes=node.available_bytes,
                distances=node.distances,
                memory_allowed=node.memory_allowed,
            )
            for node, usable in zip(native.nodes, native.usable_cpus(), strict=True)
        ],
        online_cpus=native.online_cpus,
        offline_cpus=native.offline_cpus,
        allowed_cpus=native.allowed_cpus,
        cores=native.cores,
        n_sockets=native.n_sockets,
        caches=[Cache(cache.level, cache.bytes, cache.sharers) for cache in native.caches],
        huge_pages=native.huge_pages,
        cgroup=CgroupLimits(limits.cpu_quota, limits.cpus, limits.memory_bytes, limits.remaining_bytes),
        total_bytes=native.total_memory_bytes,
        available_bytes=native.available_bytes(),
        n_threads=native.n_threads(),
    )


def checked_threads(threads: int | None) -> int:
    """The same number, or the machine's where it is None. Raises UserError for an impossible one."""
    if threads is None:
        return read_machine().n_threads
    if not isinstance(threads, Integral) or not 1 <= threads <= MAX_THREADS:
        raise UserError(f"threads must be a whole number from 1 to {MAX_THREADS}, not {threads!r}")
    return int(threads)


def address_space_left() -> int | None:
    """Bytes that this process may still map (RLIMIT_AS, `ulimit -v`); None where there is no such limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return max(0, limit - mapped)


def choose_isa(root: str = "/") -> str:
    """The machine's best level, or the one that FOURFOLD_ISA forces; raises UnsupportedError where it is not there."""
    try:
        return str(_core.read_machine(root).choose_isa())
    except ValueError as error:
        raise UnsupportedError(str(error)) from None


def plan_ranks(machine: Machine, n_ranks: int | None = None, n_threads: int | None = None) -> list[RankPlan]:
    """Cuts the machine into ranks: by default one for each node with usable CPUs, and machine.n_threads threads in all.

    Ranks are dealt to nodes in order and as evenly as can be, and a rank stays on one node; with fewer ranks than nodes
    the last nodes stay empty. Ranks of a node share its CPUs out; where they are more than the CPUs (virtual ranks),
    they take the same ones in turn. n_threads is for all ranks together. Raises ResourceError where a rank would be
    left without a thread, or a thread without a CPU, and UnsupportedError for more than MAX_RANKS.
    """
    nodes = [node for node in machine.nodes if node.usable_cpus]
    if not nodes:
        raise ResourceError("no CPU is left to this process: widen its cpuset or its affinity mask")
    n_wanted = machine.n_threads if n_threads is None else n_threads
    if n_ranks is None:
        n_ranks = min(len(nodes), n_wanted, MAX_RANKS)
    if n_ranks < 1:
        raise ResourceError(f"{n_ranks} ranks cannot run a model: ask for at least one rank and one thread")
    if n_ranks > MAX_RANKS:
        raise UnsupportedError(f"{n_ranks} ranks are more than fourfold runs; use --ranks {MAX_RANKS} or fewer")
    nodes = nodes[:n_ranks]
    plan = [
        RankPlan(_memory_node(node, machine), cpus)
        for position, node in enumerate(nodes)
        for cpus in _deal(node.usable_cpus, len(range(position, n_ranks, len(nodes))))
    ]
    n_most = sum(len(rank.cpus) for rank in plan)
    if n_threads is not None and not n_ranks <= n_threads <= n_most:
        raise ResourceError(
            f"{n_threads} threads do not fit {n_ranks} ranks here: ask for {n_ranks} to {n_most} threads"
        )
    return _trim(plan, n_wanted)


def _memory_node(node: Node, machine: Machine) -> int:
    """Where memory for a node's CPUs is to be had; the node itself where no node is known to have any."""
    near = zip(node.distances, machine.nodes, strict=False)
    return min(
        ((distance, other.id != node.id, other.id) for distance, other in near if other.has_memory),
        default=(0, False, node.id),
    )[2]


def _deal(cpus: list[int], n_ranks: int) -> list[list[int]]:
    if n_ranks > len(cpus):
        return [[cpus[rank % len(cpus)]] for rank in range(n_ranks)]
    cuts = [len(cpus) * rank // n_ranks for rank in range(n_ranks + 1)]
    return [cpus[begin:end] for begin, end in pairwise(cuts)]


def _trim(plan: list[RankPlan], n_threads: int) -> list[RankPlan]:
    """Takes threads from the largest ranks until n_threads are left; every rank keeps one."""
    counts = [len(rank.cpus) for rank in plan]
    while sum(counts) > n_threads and max(counts) > 1:
        counts[len(counts) - 1 - counts[::-1].index(max(counts))] -= 1
    return [RankPlan(rank.node, rank.cpus[:count]) for rank, count in zip(plan, counts, strict=True)]
