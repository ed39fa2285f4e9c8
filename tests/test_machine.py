"""What fourfold makes of a computer: real ones as directory trees, and this one."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fourfold import _core, doctor
from fourfold.errors import ResourceError, UnsupportedError
from fourfold.machine import RankPlan, address_space_left, plan_ranks, read_machine
from machine_fixtures import (
    AMX,
    AVX2,
    AVX512,
    AVX512_VNNI,
    GB,
    container_v1,
    container_v2,
    restrict,
    server_6448h,
    write,
    write_machine,
)


def test_a_virtual_machine_is_one_node_of_plain_cores(tmp_path: Path) -> None:
    machine = read_machine(str(write_machine(tmp_path, cores_per_socket=8, model="Virtual CPU")))
    assert machine.model == "Virtual CPU"
    assert machine.isas == ["scalar", "avx2", "avx512_vnni", "avx512"]
    assert (machine.n_sockets, machine.cores) == (1, [[cpu] for cpu in range(8)])
    assert [node.usable_cpus for node in machine.nodes] == [list(range(8))]
    assert machine.n_threads == 8
    assert [(cache.level, cache.bytes, len(cache.sharers)) for cache in machine.caches] == [
        (1, 48 << 10, 8),
        (2, 2 << 20, 8),
        (3, 60 << 20, 1),
    ]
    assert machine.huge_pages == "madvise"
    assert machine.available_bytes == machine.nodes[0].available_bytes == 16 * GB // 2 // 1024 * 1024
    assert machine.cgroup.cpu_quota is machine.cgroup.cpus is machine.cgroup.memory_bytes is None


def test_two_sockets_are_two_nodes_and_siblings_stay_idle(tmp_path: Path) -> None:
    machine = read_machine(str(write_machine(tmp_path, n_sockets=2, cores_per_socket=16, n_siblings=2)))
    assert machine.n_sockets == 2
    assert machine.nodes[0].cpus == [*range(16), *range(32, 48)]
    assert [node.usable_cpus for node in machine.nodes] == [list(range(16)), list(range(16, 32))]
    assert [node.distances for node in machine.nodes] == [[10, 21], [21, 10]]
    assert machine.caches[-1].sharers == [node.cpus for node in machine.nodes]
    half = 16 * GB // 2 // 1024
    assert machine.nodes[0].total_bytes == half * 1024
    assert machine.nodes[0].free_bytes == half // 2 * 1024
    assert machine.nodes[0].available_bytes == (half // 2 + 3072) * 1024


def test_the_reference_server_gives_four_ranks_of_32_cores_and_amx(tmp_path: Path) -> None:
    machine = read_machine(str(server_6448h(tmp_path)))
    assert machine.isas[-1] == "amx"
    assert (machine.n_sockets, len(machine.cores), len(machine.online_cpus)) == (4, 128, 256)
    assert machine.cores[5] == [5, 133]
    assert machine.n_threads == 128
    assert plan_ranks(machine) == [RankPlan(node, list(range(32 * node, 32 * node + 32))) for node in range(4)]
    assert [(cache.level, len(cache.sharers)) for cache in machine.caches] == [(1, 128), (2, 128), (3, 4)]


def test_sub_numa_clustering_gives_a_rank_for_each_half_socket(tmp_path: Path) -> None:
    root = write_machine(
        tmp_path, n_sockets=2, cores_per_socket=8, n_siblings=2, nodes_per_socket=2, interleaved=True, flags=AMX
    )
    machine = read_machine(str(root))
    assert (machine.n_sockets, len(machine.nodes)) == (2, 4)
    assert machine.nodes[1].cpus == [1, 5, 9, 13, 17, 21, 25, 29]
    assert machine.nodes[1].distances == [12, 10, 21, 21]
    assert [rank.cpus for rank in plan_ranks(machine)] == [[n, n + 4, n + 8, n + 12] for n in range(4)]


def test_a_container_keeps_to_its_cpuset_quota_and_memory(tmp_path: Path) -> None:
    machine = read_machine(str(container_v2(tmp_path)))
    assert machine.allowed_cpus == [0, 1, 2, 3, 32, 33, 34, 35]
    assert [node.usable_cpus for node in machine.nodes] == [[0, 1, 2, 3], []]
    assert machine.cgroup.cpu_quota == 3.5
    assert machine.n_threads == 4
    assert machine.cgroup.memory_bytes == 20 * GB
    assert machine.available_bytes == 16 * GB
    assert plan_ranks(machine) == [RankPlan(0, [0, 1, 2, 3])]


def test_a_version_1_container_is_read_below_its_mount_root(tmp_path: Path) -> None:
    machine = read_machine(str(container_v1(tmp_path)))
    assert machine.isas == ["scalar", "avx2"]
    assert machine.cgroup.cpus == machine.allowed_cpus == [4, 5, 6, 7]
    assert machine.cgroup.cpu_quota == 2.5
    assert machine.n_threads == 3
    assert machine.cgroup.memory_bytes == 8 * GB
    assert machine.available_bytes == 6 * GB
    assert plan_ranks(machine) == [RankPlan(0, [4, 5, 6])]


def test_a_version_1_limit_of_a_huge_number_is_no_limit(tmp_path: Path) -> None:
    write(container_v1(tmp_path), "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    assert read_machine(str(tmp_path)).cgroup.memory_bytes is None


def test_offline_cores_are_left_out_and_a_lone_sibling_stands_for_its_core(tmp_path: Path) -> None:
    machine = read_machine(str(write_machine(tmp_path, cores_per_socket=4, n_siblings=2, offline=[1, 3, 7])))
    assert machine.offline_cpus == [1, 3, 7]
    assert machine.cores == [[0, 4], [2, 6], [5]]
    assert machine.nodes[0].usable_cpus == [0, 2, 5]


def test_a_core_whose_first_sibling_is_not_allowed_is_used_through_the_other(tmp_path: Path) -> None:
    write_machine(tmp_path, cores_per_socket=4, n_siblings=2)
    restrict(tmp_path, cpus=[1, 4, 5, 6], nodes=[0])
    assert read_machine(str(tmp_path)).nodes[0].usable_cpus == [4, 1, 6]


def test_a_node_whose_memory_is_barred_is_known(tmp_path: Path) -> None:
    write_machine(tmp_path, n_sockets=2, cores_per_socket=2)
    restrict(tmp_path, cpus=range(4), nodes=[1])
    assert [node.memory_allowed for node in read_machine(str(tmp_path)).nodes] == [False, True]
    assert any("cpuset.mems" in warning for warning in doctor.report(root=str(tmp_path))["warnings"])


@pytest.mark.parametrize("why", ["no memory", "barred"])
def test_cores_without_memory_are_used_with_the_nearest_that_is_to_be_had(tmp_path: Path, why: str) -> None:
    write_machine(tmp_path, n_sockets=2, nodes_per_socket=2, cores_per_socket=4)
    if why == "no memory":
        write(tmp_path, "sys/devices/system/node/node3/meminfo", "Node 3 MemTotal:  0 kB\nNode 3 MemFree:  0 kB")
    restrict(tmp_path, cpus=range(8), nodes=[0, 1, 2])  # Linux lists no node without memory
    report = doctor.report(root=str(tmp_path))
    assert report["uses"]["ranks"] == [
        {"node": 0, "cpus": [0, 1]},
        {"node": 1, "cpus": [2, 3]},
        {"node": 2, "cpus": [4, 5]},
        {"node": 2, "cpus": [6, 7]},
    ]
    (warning,) = report["warnings"]
    assert ("cores of node 3 have no memory beside them" if why == "no memory" else "cpuset.mems") in warning


@pytest.mark.parametrize(("n_cores", "is_said"), [(0, False), (3, True), (8, True), (9, False), (10, False)])
def test_nodes_of_unlike_strength_are_pointed_out(tmp_path: Path, n_cores: int, is_said: bool) -> None:
    write_machine(tmp_path, n_sockets=2, cores_per_socket=10)
    restrict(tmp_path, cpus=range(10 + n_cores), nodes=[0, 1])
    said = [warning for warning in doctor.report(root=str(tmp_path))["warnings"] if "waits for the smallest" in warning]
    assert len(said) == is_said
    assert all(f"10, {n_cores} usable cores" in warning for warning in said)


def test_without_sys_there_is_one_node_of_the_processors_in_cpuinfo(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", f"processor : 0\nflags : {AVX2}\n\nprocessor : 1\nflags : {AVX2}")
    write(tmp_path, "proc/meminfo", "MemTotal: 4 kB\nMemFree: 1 kB\nMemAvailable: 2 kB")
    machine = read_machine(str(tmp_path))
    assert (machine.online_cpus, machine.cores, machine.n_sockets) == ([0, 1], [[0], [1]], 1)
    assert [(node.id, node.cpus, node.total_bytes) for node in machine.nodes] == [(0, [0, 1], 4096)]
    assert (machine.huge_pages, machine.caches, machine.available_bytes) == ("", [], 2048)


def test_damaged_files_read_as_missing(tmp_path: Path) -> None:
    write_machine(tmp_path, cores_per_socket=2)
    write(tmp_path, "sys/devices/system/cpu/cpu0/topology/thread_siblings_list", "no,-1,0-99999999999,-")
    write(tmp_path, "sys/devices/system/cpu/cpu0/cache/index0/size", "")
    write(tmp_path, "proc/self/cgroup", "0:\n0::nowhere\n:::")
    write(tmp_path, "proc/self/mountinfo", "1 2 3\n31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "0 0")
    machine = read_machine(str(tmp_path))
    assert machine.cores == [[0], [1]]
    assert machine.cgroup.cpu_quota is None


def test_a_container_that_numbers_its_cpus_from_0_uses_those_that_it_may(tmp_path: Path) -> None:
    write_machine(tmp_path, n_sockets=2, cores_per_socket=8)
    restrict(tmp_path, cpus=range(8, 12), nodes=[1])
    write(tmp_path, "sys/devices/system/cpu/online", "0-3")
    machine = read_machine(str(tmp_path))
    assert (machine.allowed_cpus, machine.offline_cpus) == ([8, 9, 10, 11], [])
    assert plan_ranks(machine) == [RankPlan(1, [8, 9, 10, 11])]


def test_a_root_without_sys_and_proc_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="neither sys nor proc"):
        read_machine(str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "isas"),
    [
        ("fpu sse2 avx avx2 fma", ["scalar"]),
        (AVX2, ["scalar", "avx2"]),
        (AVX512.replace("avx512_vnni", ""), ["scalar", "avx2"]),
        (AVX512_VNNI, ["scalar", "avx2", "avx512_vnni"]),
        (AVX512, ["scalar", "avx2", "avx512_vnni", "avx512"]),
        (AMX.replace("amx_int8", ""), ["scalar", "avx2", "avx512_vnni", "avx512"]),
        (AVX512.replace("avx512vbmi", ""), ["scalar", "avx2", "avx512_vnni"]),
        (AMX.replace("avx512_bf16", ""), ["scalar", "avx2", "avx512_vnni"]),
        (AMX, ["scalar", "avx2", "avx512_vnni", "avx512", "amx"]),
    ],
)
def test_an_isa_needs_all_of_its_flags_and_the_isa_before_it(tmp_path: Path, flags: str, isas: list[str]) -> None:
    assert read_machine(str(write_machine(tmp_path, cores_per_socket=1, flags=flags))).isas == isas


def choose_in_a_new_process(root: Path, forced: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from fourfold.machine import choose_isa; print(choose_isa(sys.argv[1]))"
    environment = {**os.environ, "FOURFOLD_ISA": forced}
    return subprocess.run(
        [sys.executable, "-c", program, str(root)], env=environment, capture_output=True, text=True, check=False
    )


def test_fourfold_isa_forces_a_level_and_empty_means_the_best(tmp_path: Path) -> None:
    write_machine(tmp_path, cores_per_socket=1, flags=AVX512)
    assert choose_in_a_new_process(tmp_path, "avx2").stdout == "avx2\n"
    assert choose_in_a_new_process(tmp_path, "").stdout == "avx512\n"


@pytest.mark.parametrize(
    ("flags", "forced", "reason"),
    [
        (AVX2, "avx9", "FOURFOLD_ISA=avx9 is no instruction set: choose one of scalar, avx2, or unset it"),
        (AVX512_VNNI, "avx512", "this CPU does not have it: choose one of scalar, avx2, avx512_vnni, or unset it"),
        (AVX512, "amx", "this CPU does not have it: choose one of scalar, avx2, avx512_vnni, avx512, or unset it"),
        (f"{AVX2} amx_tile amx_bf16 amx_int8", "amx", "the operating system does not grant it"),
    ],
)
def test_fourfold_isa_never_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, forced: str, reason: str
) -> None:
    write_machine(tmp_path, cores_per_socket=1, flags=flags)
    monkeypatch.setenv("FOURFOLD_ISA", forced)
    with pytest.raises(UnsupportedError, match=reason):
        doctor.report(quick=True, root=str(tmp_path))


def test_ranks_share_out_the_cores_of_their_nodes(tmp_path: Path) -> None:
    machine = read_machine(str(write_machine(tmp_path, n_sockets=2, cores_per_socket=4)))
    assert [rank.cpus for rank in plan_ranks(machine, n_ranks=3)] == [[0, 1], [2, 3], [4, 5, 6, 7]]
    assert [rank.node for rank in plan_ranks(machine, n_ranks=3)] == [0, 0, 1]
    assert plan_ranks(machine, n_ranks=1) == [RankPlan(0, [0, 1, 2, 3])]
    assert [rank.cpus for rank in plan_ranks(machine, n_threads=5)] == [[0, 1, 2], [4, 5]]
    assert [rank.node for rank in plan_ranks(machine, n_threads=1)] == [0]


def test_virtual_ranks_may_outnumber_the_cores(tmp_path: Path) -> None:
    machine = read_machine(str(write_machine(tmp_path, cores_per_socket=2)))
    assert [rank.cpus for rank in plan_ranks(machine, n_ranks=3)] == [[0], [1], [0]]


def test_a_quota_below_the_cores_is_shared_evenly_by_the_ranks(tmp_path: Path) -> None:
    machine = replace(read_machine(str(write_machine(tmp_path, n_sockets=2, cores_per_socket=4))), n_threads=3)
    assert [rank.cpus for rank in plan_ranks(machine)] == [[0, 1], [4]]


@pytest.mark.parametrize(("n_ranks", "n_threads"), [(0, None), (None, 0), (2, 1), (None, 9), (1, 5), (8, 9)])
def test_ranks_and_threads_that_do_not_fit_are_refused(
    tmp_path: Path, n_ranks: int | None, n_threads: int | None
) -> None:
    machine = read_machine(str(write_machine(tmp_path, n_sockets=2, cores_per_socket=4)))
    with pytest.raises(ResourceError, match="ask for"):
        plan_ranks(machine, n_ranks, n_threads)


def test_more_ranks_than_the_core_has_are_refused_whatever_their_number(tmp_path: Path) -> None:
    machine = read_machine(str(write_machine(tmp_path, n_sockets=2, cores_per_socket=4)))
    assert len(plan_ranks(machine, 64)) == 64
    for n_ranks in (65, 10**12):
        with pytest.raises(
            UnsupportedError, match=f"{n_ranks} ranks are more than fourfold runs; use --ranks 64 or fewer"
        ):
            plan_ranks(machine, n_ranks)


def test_address_space_is_without_a_limit_or_has_so_much_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert address_space_left() is None
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 50, resource.RLIM_INFINITY))
    assert (1 << 49) < (address_space_left() or 0) < (1 << 50) - (1 << 20)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, resource.RLIM_INFINITY))
    assert address_space_left() == 0


def test_doctor_says_what_a_container_lacks(tmp_path: Path) -> None:
    root = container_v2(tmp_path)
    write(root, "sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]")
    report = json.loads(json.dumps(doctor.report(root=str(root))))
    assert report["uses"]["ranks"] == [{"node": 0, "cpus": [0, 1, 2, 3]}]
    assert (report["uses"]["isa"], report["uses"]["amx"], report["measured"]) == ("amx", True, None)
    warnings = " ".join(report["warnings"])
    for words in ("huge pages are off", "quota is 3.5 of 4", "4 of 32 cores", "20.0 GB of 256.0 GB"):
        assert words in warnings


def test_doctor_finds_nothing_wrong_with_the_reference_server(tmp_path: Path) -> None:
    report = doctor.report(root=str(server_6448h(tmp_path)))
    assert report["warnings"] == []
    output = StringIO()
    doctor.render(report, Console(file=output, width=200))
    text = output.getvalue()
    for words in ("6448H", "granted", "4, 128 (2 SMT siblings each)", "node 3", "0-31,128-159", "4, 128 in all"):
        assert words in text


def test_this_machine_has_a_core_to_run_on() -> None:
    machine = read_machine()
    assert machine.isas[0] == "scalar"
    assert 1 <= machine.n_threads <= sum(len(node.usable_cpus) for node in machine.nodes)
    assert set(machine.allowed_cpus) >= set(os.sched_getaffinity(0))
    assert 0 < machine.available_bytes <= machine.total_bytes


def usable_cpus() -> list[int]:
    return [cpu for node in read_machine().nodes for cpu in node.usable_cpus]


def test_read_bandwidth_sums_what_was_written_in_every_pattern() -> None:
    cpus = usable_cpus()[:2]
    read = _core.measure_read_bandwidth(cpus, 8 << 20, 2)
    assert read["bytes"] == 8 << 20
    assert set(read["patterns"]) == {"linear", "linear_prefetch", "streams4", "streams4_prefetch"}
    for rate in read["patterns"].values():
        assert 0 < rate["median_gb_s"] <= rate["best_gb_s"] <= read["best_gb_s"]


def test_copy_bandwidth_counts_the_bytes_that_arrive() -> None:
    copy = _core.measure_copy_bandwidth(usable_cpus()[:1], 4 << 20, 3)
    assert copy["bytes"] == 2 << 20
    assert 0 < copy["median_gb_s"] <= copy["best_gb_s"]


@pytest.mark.skipif(len(usable_cpus()) < 2, reason="a hand-over needs two CPUs")
def test_a_hand_over_takes_longer_with_bytes_than_without() -> None:
    cpus = usable_cpus()[:2]
    alone, loaded = (_core.measure_handover(*cpus, n_bytes, 200) for n_bytes in (0, 1 << 20))
    assert loaded["bytes"] == 1 << 20
    assert 0 < alone["best_us"] <= alone["median_us"]
    assert loaded["best_us"] > alone["best_us"]


def test_every_peak_of_this_machine_is_measured() -> None:
    kinds = _core.peak_kinds()
    assert ("amx_bf16" in kinds) == ("amx" in read_machine().isas)
    for kind in kinds:
        peak = _core.measure_peak(usable_cpus()[:1], kind, 1)
        assert peak["best_gflop_s"] > 0


def test_measuring_refuses_what_cannot_be_measured() -> None:
    cpus = usable_cpus()[:1]
    with pytest.raises(ValueError, match="no peak called amx_fp64"):
        _core.measure_peak(cpus, "amx_fp64")
    with pytest.raises(ValueError, match="may use"):
        _core.measure_peak([1023], _core.peak_kinds()[0])
    with pytest.raises(ValueError, match="at least one CPU"):
        _core.measure_read_bandwidth([], 1 << 20)
    with pytest.raises(ValueError, match="does not fit"):
        _core.measure_read_bandwidth(cpus, 1 << 60)
    with pytest.raises(ValueError, match="two CPUs"):
        _core.measure_handover(cpus[0], cpus[0], 0)
    with pytest.raises(ValueError, match="may use"):
        _core.measure_handover(cpus[0], 1023, 0)
    for n_bytes in (-1, 1 << 60):
        with pytest.raises(ValueError, match="does not fit"):
            _core.measure_handover(cpus[0], 1023, n_bytes)
    with pytest.raises(ValueError, match="repetition"):
        _core.measure_copy_bandwidth(cpus, 1 << 20, 0)


@pytest.mark.skipif("amx" in read_machine().isas, reason="this machine has AMX")
def test_the_amx_peak_is_refused_without_amx() -> None:
    with pytest.raises(ValueError, match="no peak called amx_bf16"):
        _core.measure_peak(usable_cpus()[:1], "amx_bf16")
