"""What this machine can do for fourfold, what fourfold will do with it, and what would make it faster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import fourfold._core as _core
from fourfold.checkpoint.fourfold_dir import WEIGHTS
from fourfold.conversion import cache_root
from fourfold.disk import disk_rate
from fourfold.errors import RuntimeFailure
from fourfold.machine import Machine, RankPlan, choose_isa, plan_ranks, read_machine

MIN_DISK_BYTES = 50_000_000  # less is read too soon to say what a disk gives

EVEN = 0.9  # of the largest node's cores: what is lost above goes unsaid
_KERNELS = {
    "scalar": "plain C++: the definition of correct, and slow",
    "avx2": "AVX2 and FMA",
    "avx512_vnni": "AVX-512 with VNNI",
    "avx512": "AVX-512 with VNNI, VBMI and BF16",
    "amx": "AMX tiles for many tokens, AVX-512 for a few",
}


def report(quick: bool = False, root: str = "/") -> dict[str, Any]:
    """Everything that `render` shows, ready for JSON: machine, uses, measured, warnings.

    Measuring takes some seconds and all used cores. It is left out (None) when quick, and for another root, whose
    machine is not this one. Raises UnsupportedError where FOURFOLD_ISA asks for what is not there, RuntimeFailure where
    a measurement computes something wrong.
    """
    machine = read_machine(root)
    isa = choose_isa(root)
    ranks = plan_ranks(machine)
    return {
        "machine": asdict(machine),
        "uses": {
            "isa": isa,
            "kernels": _KERNELS[isa],
            "amx": isa == "amx",
            "ranks": [asdict(rank) for rank in ranks],
            "threads": sum(len(rank.cpus) for rank in ranks),
        },
        "measured": None if quick or root != "/" else _measure(machine, ranks),
        "warnings": list(_warnings(machine, isa)),
    }


def _measure(machine: Machine, ranks: list[RankPlan]) -> dict[str, Any]:
    cpus = [cpu for rank in ranks for cpu in rank.cpus]
    n_bytes = _measuring_bytes(machine)
    measured_apart = ranks if len(ranks) > 1 else []
    try:
        return {
            "read": _core.measure_read_bandwidth(cpus, n_bytes),
            "read_by_rank": [_core.measure_read_bandwidth(r.cpus, n_bytes // len(ranks)) for r in measured_apart],
            "copy": _core.measure_copy_bandwidth(cpus, n_bytes),
            "peaks": [_core.measure_peak(cpus, kind) for kind in _core.peak_kinds()],
            "disk": _disk(),
        }
    except RuntimeError as error:  # a probe whose result was wrong
        raise RuntimeFailure(str(error)) from None


def read_rate(machine: Machine, ranks: list[RankPlan]) -> float:
    """GB/s at which the ranks' cores read memory, measured now, which takes some seconds. Raises RuntimeFailure."""
    cpus = [cpu for rank in ranks for cpu in rank.cpus]
    try:
        return float(_core.measure_read_bandwidth(cpus, _measuring_bytes(machine))["best_gb_s"])
    except RuntimeError as error:
        raise RuntimeFailure(str(error)) from None


def _measuring_bytes(machine: Machine) -> int:
    """Four times the last-level caches, so that nothing is found there again; never more than the machine can spare."""
    last_level = max((cache.level for cache in machine.caches), default=0)
    last_level_bytes = sum(len(cache.sharers) * cache.bytes for cache in machine.caches if cache.level == last_level)
    return min(max(2_000_000_000, 4 * last_level_bytes), machine.available_bytes // 4)


def _disk() -> dict[str, Any] | None:
    """The rate at which weights that do not fit in memory would be read; None where no conversion is kept to read."""
    kept = [path for path in cache_root().glob(f"*/{WEIGHTS}") if path.stat().st_size >= MIN_DISK_BYTES]
    if not kept:
        return None
    largest = max(kept, key=lambda path: path.stat().st_size)
    return {"file": str(largest), "gb_s": disk_rate(largest) / 1e9}


def _warnings(machine: Machine, isa: str) -> Iterable[str]:
    """One sentence each: what is in the way, and what to do."""
    if machine.amx_is_present and "amx" not in machine.isas:
        yield (
            "The CPU has AMX, but the operating system does not grant it: "
            "use Linux 5.16 or newer, and a container or hypervisor that lets arch_prctl and the tile state through."
        )
    if isa != machine.isas[-1]:
        yield f"FOURFOLD_ISA={isa} keeps the kernels below {machine.isas[-1]}: unset it for full speed."
    if isa == "scalar":
        yield "Only the scalar kernels run here, many times slower: use a CPU with AVX2 or better."
    if machine.huge_pages not in ("always", "madvise"):
        yield (
            "Transparent huge pages are off, so weights are read through 4 KB pages: "
            "as root, write madvise to /sys/kernel/mm/transparent_hugepage/enabled."
        )
    n_usable = sum(len(node.usable_cpus) for node in machine.nodes)
    quota = machine.cgroup.cpu_quota
    if quota is not None and quota < n_usable:
        yield (
            f"The cgroup's CPU quota is {quota:g} of {n_usable} usable cores, and threads over it are paused "
            "in the middle of a token: raise the quota (cpu.max), or give whole cores with a cpuset instead."
        )
    if n_usable < len(machine.cores):
        yield (
            f"{n_usable} of {len(machine.cores)} cores are allowed to this process: "
            "widen its cpuset or affinity mask if it is to have the machine."
        )
    if machine.offline_cpus:
        yield f"CPUs {_ranges(machine.offline_cpus)} are switched off: bring them online if they are meant to work."
    with_cores = [node for node in machine.nodes if node.usable_cpus]
    counts = [len(node.usable_cpus) for node in with_cores]
    if counts and min(counts) < EVEN * max(counts):
        yield (
            f"Nodes {_ranges([node.id for node in with_cores])} have {', '.join(map(str, counts))} usable cores and "
            "even parts of a model, so every token waits for the smallest: give each as many."
        )
    limit = machine.cgroup.memory_bytes
    if limit is not None and limit < machine.total_bytes:
        yield (
            f"The cgroup limits memory to {_gb(limit)} of {_gb(machine.total_bytes)}: "
            "a model and its cache must fit in that, or raise memory.max."
        )
    bare = [node.id for node in with_cores if node.total_bytes == 0 < machine.total_bytes]
    if bare:
        yield (
            f"The cores of node {_ranges(bare)} have no memory beside them, so they read all weights from afar: "
            "put memory beside every socket."
        )
    barred = [node.id for node in with_cores if node.total_bytes and not node.memory_allowed]
    if barred:
        yield (
            f"The memory of nodes {_ranges(barred)} is barred to this process, so its cores would read from afar: "
            "add them to cpuset.mems."
        )


def render(report: dict[str, Any], console: Console) -> None:
    """Prints a report as tables."""
    for title, rows in (
        ("This machine", _machine_rows(report["machine"])),
        ("fourfold will use", _use_rows(report["uses"])),
        ("Measured now, on the cores to be used", _measured_rows(report["measured"])),
    ):
        if rows:
            table = Table(
                title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2)
            )
            for label, text in rows:
                table.add_row(label, text)
            console.print(table)
            console.print()
    for warning in report["warnings"]:
        console.print(Text.assemble(("!", "yellow"), f" {warning}"), highlight=False)


_Rows = list[tuple[str, str]]


def _machine_rows(machine: dict[str, Any]) -> _Rows:
    n_siblings = max(len(core) for core in machine["cores"])
    siblings = f"{n_siblings} SMT siblings each" if n_siblings > 1 else "no SMT"
    amx = "granted" if "amx" in machine["isas"] else "refused by the system" if machine["amx_is_present"] else "absent"
    cgroup = machine["cgroup"]
    limits = [
        f"{cgroup['cpu_quota']:g} CPUs of time" if cgroup["cpu_quota"] is not None else "",
        f"CPUs {_ranges(cgroup['cpus'])}" if cgroup["cpus"] is not None else "",
        f"{_gb(cgroup['memory_bytes'])} of memory" if cgroup["memory_bytes"] is not None else "",
    ]
    rows = [
        ("CPU", machine["model"] or "unknown"),
        ("sockets, cores", f"{machine['n_sockets']}, {len(machine['cores'])} ({siblings})"),
        ("instruction sets", " ".join(machine["isas"])),
        ("AMX", amx),
        ("caches", ", ".join(f"L{c['level']} {len(c['sharers'])} × {_binary(c['bytes'])}" for c in machine["caches"])),
        ("memory", f"{_gb(machine['available_bytes'])} available of {_gb(machine['total_bytes'])}"),
        ("huge pages", machine["huge_pages"] or "none"),
        ("cgroup limits", ", ".join(filter(None, limits)) or "none"),
    ]
    for node in machine["nodes"]:
        memory = f"{_gb(node['available_bytes'])} available of {_gb(node['total_bytes'])}"
        rows.append((f"node {node['id']}", f"CPUs {_ranges(node['cpus']) or 'none'}, {memory}"))
    return rows


def _use_rows(uses: dict[str, Any]) -> _Rows:
    rows = [
        ("kernels", f"{uses['isa']}: {uses['kernels']}"),
        ("ranks, threads", f"{len(uses['ranks'])}, {uses['threads']} in all"),
    ]
    for number, rank in enumerate(uses["ranks"]):
        n_threads = len(rank["cpus"])
        threads = "1 thread on CPU" if n_threads == 1 else f"{n_threads} threads on CPUs"
        rows.append((f"rank {number}", f"node {rank['node']}, {threads} {_ranges(rank['cpus'])}"))
    return rows


def _measured_rows(measured: dict[str, Any] | None) -> _Rows:
    if measured is None:
        return []
    read, copy = measured["read"], measured["copy"]
    rows = [("read", f"{read['best_gb_s']:.1f} GB/s (median {read['median_gb_s']:.1f})")]
    rows += [
        (f"  {name}", f"{rate['best_gb_s']:.1f} ({rate['median_gb_s']:.1f})") for name, rate in read["patterns"].items()
    ]
    rows += [
        (f"read, rank {number} alone", f"{rate['best_gb_s']:.1f} GB/s (median {rate['median_gb_s']:.1f})")
        for number, rate in enumerate(measured["read_by_rank"])
    ]
    rows.append(("copy", f"{copy['best_gb_s']:.1f} GB/s (median {copy['median_gb_s']:.1f})"))
    if disk := measured["disk"]:
        rows.append(("disk, in order", f"{disk['gb_s']:.2f} GB/s ({disk['file']})"))
    for peak in measured["peaks"]:
        rows.append((f"peak {peak['kind']}", f"{peak['best_gflop_s'] / 1000:.2f} TFLOP/s"))
    return rows


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5", as Linux writes CPU lists."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


def _binary(n_bytes: int) -> str:
    return f"{n_bytes >> 20} MiB" if n_bytes >= 1 << 20 else f"{n_bytes >> 10} KiB"
