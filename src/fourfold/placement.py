"""Ranks and the memory of nodes: where it is to lie, and for a loaded program where it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import fourfold._core as _core
from fourfold.errors import ResourceError
from fourfold.machine import Machine, RankPlan

PAGE_BYTES, HUGE_PAGE_BYTES = 4096, 2 << 20

Region = tuple[str, int, int, int]  # (kind, rank, address, bytes), as Program.memory_map gives them


def start_team(machine: Machine, plan: Sequence[RankPlan], timeout_seconds: float = 60.0) -> Any:
    """The native team of a plan. Ranks on several nodes get memory of their own node alone, which takes it back from
    cached files where those fill it. Ranks that are all at home on one node may overflow to the others. Raises
    ResourceError where the system gives no more threads.
    """
    is_numa = len(machine.nodes) > 1
    ranks = [(rank.node if is_numa else -1, rank.cpus) for rank in plan]
    try:
        return _core.Team(ranks, timeout_seconds, uses_one_node(plan))
    except RuntimeError as error:
        n_threads = sum(len(rank.cpus) for rank in plan)
        raise ResourceError(
            f"the system does not give this process {n_threads} threads ({error}); ask for fewer, or raise its limit"
        ) from None


def uses_one_node(plan: Iterable[RankPlan]) -> bool:
    """Whether all ranks are at home on the same node."""
    return len({rank.node for rank in plan}) == 1


def by_rank(regions: Iterable[Region], nodes: Sequence[int]) -> list[dict[str, Any]]:
    """For each rank, whose memory belongs on `nodes[rank]`: that node, the bytes reserved by kind (what is reserved is
    taken only when it is first written: a KV cache grows), and of all that the bytes that lie elsewhere.

    Where they lie is asked of one 4 KB page in every 2 MB of what fills so much, and of every page of the rest.
    `elsewhere_bytes` is None where the system does not tell.
    """
    reserved: list[Counter[str]] = [Counter() for _ in nodes]
    elsewhere: list[int | None] = [0] * len(nodes)
    for kind, rank, address, n_bytes in regions:
        reserved[rank][kind] += n_bytes
        stride = HUGE_PAGE_BYTES if n_bytes >= HUGE_PAGE_BYTES else PAGE_BYTES
        found = _core.nodes_of_pages(list(range(address, address + n_bytes, stride)))
        before = elsewhere[rank]
        if found is None or before is None:
            elsewhere[rank] = None
        else:
            elsewhere[rank] = before + stride * sum(node >= 0 and node != nodes[rank] for node in found)
    return [
        {"node": node, "reserved_bytes": dict(kinds), "elsewhere_bytes": away}
        for node, kinds, away in zip(nodes, reserved, elsewhere, strict=True)
    ]
