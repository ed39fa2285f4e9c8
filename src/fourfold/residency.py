"""Which weights lie in memory, and which are read from their file at every step because memory is too small.

A step reads every weight once, always in the same order, so that a cache of what was read last would never be hit.
What stays is chosen beforehand: as many weights as memory has room for, in a few stretches spread over the walk, so
that the disk reads on while those in memory are multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Literal

import fourfold._core as _core
from fourfold.errors import ResourceError
from fourfold.footprint import PAGE, Footprint
from fourfold.machine import Machine, RankPlan, address_space_left, read_machine
from fourfold.placement import uses_one_node

Weights = Literal["auto", "memory", "disk"]
WEIGHTS: tuple[Weights, ...] = ("auto", "memory", "disk")
SPARE = 0.1  # of the memory available: left to what no footprint counts, and to the file's pages on their way
STRETCHES = 8  # of weights in memory: the disk reads on in each, but at each one's start it has read ahead in vain
THREAD_BYTES = (8 + 64) << 20  # of address space: a stack, and a heap as glibc reserves it


@dataclass(frozen=True)
class Residency:
    """The weights in memory by name. What is not in memory is on disk; what is looked up is read by rows alone."""

    in_memory: frozenset[str]
    on_disk: frozenset[str] = frozenset()  # read whole at every step
    looked_up: frozenset[str] = frozenset()  # an embedding that is no head

    @property
    def uses_disk(self) -> bool:
        """Whether a step reads the file at all."""
        return bool(self.on_disk or self.looked_up)


@dataclass(frozen=True)
class _Pool:
    """Memory that some ranks share: the machine's, or a node's."""

    where: str  # "" or " on NUMA node 1"
    available: int
    ranks: tuple[int, ...]
    besides: int  # bytes that belong to no rank

    def of(self, per_rank: Sequence[int]) -> int:
        return sum(per_rank[rank] for rank in self.ranks) + self.besides


def choose_residency(
    need: Footprint, weights: Weights, context: int, machine: Machine, plan: list[RankPlan]
) -> Residency:
    """All in memory where they fit beside a step and one text of full length; "memory" insists on it, "disk" on none.

    Raises ResourceError where that is too much for the machine or for one of its nodes, or where even the rest is.
    """
    short = next((p for p in _pools(machine, plan, need.rope) if p.of(need.rank(context)) > p.available), None)
    if short is None and weights != "disk":
        return Residency(in_memory=frozenset(need.slices))
    if short is not None and weights == "memory":
        raise _too_much(
            need, context, short, "use weights on disk, a smaller context, a smaller format, or more memory"
        )
    pools = _pools(machine, plan, need.rope + _core.RING_BYTES)
    rest = [a + b for a, b in zip(need.besides_weights(context), need.on_disk, strict=True)]
    for pool in pools:
        if pool.of(rest) <= pool.available:
            continue
        if short is not None and short.of(need.rank(context)) <= pool.of(rest):  # so small that the disk is no help
            raise _too_much(need, context, short, "use a smaller context, a smaller format, or more memory")
        raise ResourceError(
            f"even with its weights on disk the model needs {gb(pool.of(rest))}{pool.where} ({gb(need.kv(context))} of "
            f"KV cache for one text of {context} positions), where {gb(pool.available)} are free: "
            "use a smaller context, or more memory"
        )
    multiplied = {name: room for name, room in need.slices.items() if name not in need.looked_up}
    sizes = [(pool, sum(sum(room[rank] for rank in pool.ranks) for room in multiplied.values())) for pool in pools]
    budgets = [(pool.available * (1 - SPARE) - pool.of(rest)) / size for pool, size in sizes]
    kept = _spread(multiplied, 0.0 if weights == "disk" else min(budgets))
    return Residency(kept, frozenset(multiplied) - kept, need.looked_up)


def kv_pages(
    need: Footprint, residency: Residency, n_texts: int, context: int, machine: Machine, plan: list[RankPlan]
) -> int:
    """Pages for so many texts of full length, or as many as memory has room for; one text's at least."""
    of_a_text = -(-context // PAGE)
    resident = tuple(sum(need.slices[name][rank] for name in residency.in_memory) for rank in range(len(plan)))
    besides = [a + b for a, b in zip(resident, need.work, strict=True)]
    fitting = [
        int(pool.available * (1 - SPARE) - pool.of(besides)) // max(1, sum(need.page[rank] for rank in pool.ranks))
        for pool in _pools(machine, plan, need.rope)
    ]
    return max(of_a_text, min(n_texts * of_a_text, *fitting))


def may_grow(need: Footprint, machine: Machine, plan: list[RankPlan]) -> Callable[[int], bool]:
    """Whether memory has room for n further pages, now. Reads the system's account once a second at most."""
    spare = [pool.available * SPARE for pool in _pools(machine, plan, 0)]
    read_at, left = -math.inf, 0

    def grow(n_pages: int) -> bool:
        nonlocal read_at, left
        if monotonic() > read_at + 1:
            pools = _pools(read_machine(), plan, 0)
            each = [max(1, sum(need.page[rank] for rank in pool.ranks)) for pool in pools]
            rooms = [int(p.available - s) // n for p, s, n in zip(pools, spare, each, strict=True)]
            read_at, left = monotonic(), min(rooms)
        return n_pages <= left

    return grow


def check_address_space(need: Footprint, n_positions: int, plan: list[RankPlan], file: Path) -> None:
    """Raises ResourceError where a limit on address space is too low: all texts' pages and the file are mapped."""
    n_threads = 1 + sum(len(rank.cpus) for rank in plan)  # and a progress bar's
    left = address_space_left()
    total = need.total(n_positions) + file.stat().st_size + n_threads * THREAD_BYTES
    if left is not None and total > left:
        raise ResourceError(
            f"loading the model takes {gb(total)} of address space, of which `ulimit -v` leaves {gb(left)}: "
            "raise the limit, or use a smaller context or a smaller format"
        )


def gb(n_bytes: float) -> str:
    """Bytes for people."""
    return f"{n_bytes / 1e9:.2f} GB"


def _pools(machine: Machine, plan: list[RankPlan], besides: int) -> list[_Pool]:
    """The machine's memory and, where ranks are bound to several nodes, each node's."""
    pools = [_Pool("", machine.available_bytes, tuple(range(len(plan))), besides)]
    if uses_one_node(plan):
        return pools  # what the node lacks comes from the others
    for node in machine.nodes:
        ranks = tuple(i for i, rank in enumerate(plan) if rank.node == node.id)
        if ranks:
            pools.append(_Pool(f" on NUMA node {node.id}", node.available_bytes, ranks, 0))
    return pools


def _too_much(need: Footprint, context: int, pool: _Pool, remedy: str) -> ResourceError:
    total, weights, kv = gb(pool.of(need.rank(context))), gb(sum(need.weights)), gb(need.kv(context))
    if pool.where:
        free = f"where {gb(pool.available)} are free: free some there, or {remedy}"
        return ResourceError(f"the model needs {total}{pool.where}, {free}")
    parts = f"({weights} of weights, {kv} of KV cache for one text of {context} positions)"
    return ResourceError(f"the model needs {total} {parts} and {gb(pool.available)} are free: {remedy}")


def _spread(sizes: dict[str, tuple[int, ...]], share: float) -> frozenset[str]:
    """Names that together take at most that share of all bytes, in STRETCHES equal parts of the walk each."""
    stretch_bytes = sum(map(sum, sizes.values())) / STRETCHES
    kept, kept_bytes, seen_bytes = set(), 0, 0
    for name, room in sizes.items():
        stretch = int(seen_bytes / stretch_bytes) + 1
        seen_bytes += sum(room)
        if kept_bytes + sum(room) <= share * stretch * stretch_bytes:
            kept.add(name)
            kept_bytes += sum(room)
    return frozenset(kept)
