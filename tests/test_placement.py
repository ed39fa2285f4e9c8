"""Where a program's memory lies, and where it is asked to: on this machine, and as a machine of several nodes would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fourfold._core as _core
import tiny
from fourfold.checkpoint import open_source
from fourfold.conversion import convert
from fourfold.engine import Engine
from fourfold.machine import Node, RankPlan, read_machine
from fourfold.placement import HUGE_PAGE_BYTES, PAGE_BYTES, by_rank, start_team

WRITTEN = ("weights", "vectors")  # when the model is loaded; the rest of the kinds only where a step needed it
KINDS = {*WRITTEN, "activations", "scratch", "kv", "state"}


@pytest.fixture(scope="module")
def yuan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("placement")
    with open_source(tiny.write_huggingface(folder / "source", tiny.YUAN, tiny.tensors(tiny.YUAN))) as opened:
        convert(opened, folder / "nf4", "nf4")
    return folder / "nf4"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_page_of_a_rank_lies_on_its_node(yuan: Path, ranks: int) -> None:
    engine = Engine(yuan, ranks=ranks)
    engine.logits(list(range(70)))
    for kind, rank, address, n_bytes in (regions := engine._program.memory_map()):
        nodes = Counter(_core.nodes_of_pages(range(address, address + n_bytes, PAGE_BYTES)))
        there = {node for node in nodes if node >= 0}
        assert there <= {engine.plan[rank].node}, f"{kind} of rank {rank}"
        if kind in WRITTEN:
            assert min(nodes) >= 0, f"{kind} of rank {rank}"
    assert {(kind, rank) for kind, rank, *_ in regions} == {(kind, rank) for kind in KINDS for rank in range(ranks)}
    said = engine.describe()["memory"]
    assert [(rank["node"], rank["elsewhere_bytes"]) for rank in said] == [(rank.node, 0) for rank in engine.plan]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_is_reserved_is_what_was_foreseen(yuan: Path, ranks: int) -> None:
    engine = Engine(yuan, ranks=ranks, context=64)
    for rank, said in enumerate(engine.describe()["memory"]):
        reserved, foreseen = said["reserved_bytes"], engine._footprint
        assert reserved["activations"] + reserved["scratch"] == foreseen.work[rank]
        assert reserved["kv"] >= engine.pool.n_pages * foreseen.kv_page[rank] > reserved["kv"] - 2 * PAGE_BYTES
        n_parts = sum(kind == "weights" and r == rank for kind, r, *_ in engine._program.memory_map())
        assert 0 <= reserved["weights"] - foreseen.weights[rank] < n_parts * PAGE_BYTES
        assert reserved["vectors"] < 100 * PAGE_BYTES  # left out of the footprint, being small
        pool, n_filters = engine.pool, 2 * engine.config.n_layers
        state = pool.n_slots * foreseen.state_text[rank] + pool.n_pages * foreseen.state_page[rank]
        assert 0 <= reserved["state"] - state < 2 * n_filters * PAGE_BYTES


def test_a_page_is_nowhere_until_it_is_written() -> None:
    pages = np.zeros(4 * PAGE_BYTES, np.uint8)
    first = (pages.ctypes.data + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES
    pages[first - pages.ctypes.data] = 1
    (node,) = _core.nodes_of_pages([first])
    assert node in [node.id for node in read_machine().nodes]
    assert _core.nodes_of_pages([0])[0] < 0
    assert _core.nodes_of_pages([]) == []


def test_what_lies_elsewhere_is_counted_page_by_page_and_large_things_by_huge_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = {0: 0, PAGE_BYTES: 1, 2 * PAGE_BYTES: -14, 1 << 30: 0, (1 << 30) + HUGE_PAGE_BYTES: 3}
    monkeypatch.setattr(_core, "nodes_of_pages", lambda addresses: [where[address] for address in addresses])
    regions = [("kv", 0, 0, 3 * PAGE_BYTES), ("weights", 1, 1 << 30, 2 * HUGE_PAGE_BYTES), ("kv", 1, 0, PAGE_BYTES)]
    assert by_rank(regions, [0, 3]) == [
        {"node": 0, "reserved_bytes": {"kv": 3 * PAGE_BYTES}, "elsewhere_bytes": PAGE_BYTES},
        {
            "node": 3,
            "reserved_bytes": {"weights": 2 * HUGE_PAGE_BYTES, "kv": PAGE_BYTES},
            "elsewhere_bytes": HUGE_PAGE_BYTES + PAGE_BYTES,
        },
    ]


def test_a_system_that_does_not_say_where_pages_are_leaves_it_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "nodes_of_pages", lambda _: None)
    assert by_rank([("kv", 0, 0, PAGE_BYTES)], [0])[0]["elsewhere_bytes"] is None


def nodes(*ids: int) -> list[Node]:
    return [replace(read_machine().nodes[0], id=i) for i in ids]


@pytest.mark.parametrize(
    ("machine_nodes", "rank_nodes", "bound_to", "may_spill"),
    [
        ((0,), (0, 0), (-1, -1), True),  # nothing to choose: no privilege is asked for
        ((0, 1), (0, 1), (0, 1), False),
        ((0, 1), (1,), (1,), True),
        ((0, 1, 2), (0, 0, 2), (0, 0, 2), False),
    ],
)
def test_ranks_of_several_nodes_keep_to_their_own_and_those_of_one_may_overflow(
    monkeypatch: pytest.MonkeyPatch, machine_nodes: Any, rank_nodes: Any, bound_to: Any, may_spill: bool
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(_core, "Team", lambda *arguments: called.append(arguments))
    machine = replace(read_machine(), nodes=nodes(*machine_nodes))
    start_team(machine, [RankPlan(node, [0]) for node in rank_nodes], 7.0)
    assert called == [([(node, [0]) for node in bound_to], 7.0, may_spill)]


@pytest.fixture
def policies() -> Callable[[int], str]:
    """The kernel's word for the mapping that begins at an address."""
    path = Path("/proc/self/numa_maps")
    if not path.exists():
        pytest.skip("this kernel has no NUMA")
    return lambda address: dict(line.split()[:2] for line in path.read_text().splitlines())[f"{address:08x}"]


@pytest.mark.parametrize(("may_spill", "policy"), [(False, "bind"), (True, "prefer")])
def test_the_kernel_is_told(policies: Callable[[int], str], may_spill: bool, policy: str) -> None:
    node = read_machine().nodes[0]
    team = _core.Team([(node.id, node.usable_cpus[:1])], 60.0, may_spill)
    program = _core.make_program(
        team, max_tokens=1, n_slots=1, context=64, n_pages=1, head_dim=16, kv="f32", isa="scalar"
    )
    program.add_buffer([16], False)
    ((kind, rank, address, n_bytes),) = program.memory_map()
    assert (kind, rank, n_bytes) == ("activations", 0, PAGE_BYTES)
    if not _core.memory_is_bound():
        pytest.skip("this system does not let memory be bound")
    assert policies(address) == f"{policy}:{node.id}"
