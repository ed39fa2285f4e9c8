"""Work divided by what a machine attains: the model of docs/planning.md, and nothing else.

A linear of one token takes, on the slowest rank,
    linear_us + panel_us · panels of the busiest thread + reading,
    reading = max(bytes of the node / read_gb_s, bytes of the busiest thread / core_read_gb_s) / share
where the weights of a step do not stay in the last-level cache. Many tokens take the longer of that and of
    FLOP / (peak · share).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import fourfold._core as _core
from fourfold.config import seen
from fourfold.engine import MAX_STEP_TOKENS
from fourfold.machine import RankPlan
from fourfold.plan.machines import PlannedMachine
from fourfold.plan.work import LinearWork, VectorWork, Work

CACHED_UP_TO, NOT_CACHED_FROM = 0.5, 1.0  # of the last-level cache: in between, the part that stays shrinks to none
LINE_TRIPS = 3  # a reduction between nodes waits for: all have arrived, go on, the first line of the others' sums


@dataclass(frozen=True)
class Decode:
    """One token: milliseconds."""

    weights: float  # reading them
    kv: float  # reading the cache of keys and values
    reduction: float  # meeting the other ranks, and adding up their sums
    overhead: float  # everything else

    @property
    def total(self) -> float:
        return self.weights + self.kv + self.reduction + self.overhead


@dataclass(frozen=True)
class Prefill:
    """A prompt: seconds."""

    matrices: float
    attention: float
    reduction: float
    overhead: float

    @property
    def total(self) -> float:
        return self.matrices + self.attention + self.reduction + self.overhead


class Clock:
    """Times of one step's work on one machine, with its ranks placed."""

    def __init__(self, machine: PlannedMachine, plan: Sequence[RankPlan], work: Work) -> None:
        self._m, self._a, self._work = machine, machine.attained, work
        self._threads = [len(rank.cpus) for rank in plan]
        self._nodes = [machine.nodes[rank.node] for rank in plan]
        self._on_node = [sum(other.node == rank.node for other in plan) for rank in plan]  # ranks that share its node
        self._remote = [sum(other.node != rank.node for other in plan) for rank in plan]
        # Virtual ranks beyond the cores take turns on them.
        on_cpu = [cpu for rank in plan for cpu in rank.cpus]
        self._turns = max(map(on_cpu.count, on_cpu))
        self._ranks = range(len(plan))

    def decode(self, position: int) -> Decode:
        """One token that sees `position` others."""
        a, work = self._a, self._work
        cached = self._cached_share(position)
        reading = overhead = 0.0
        for op, count in work.linears.items():
            slowest = max((self._linear_us(op, rank, cached) for rank in self._ranks), key=sum)
            reading, overhead = reading + count * slowest[0], overhead + count * slowest[1]
        reduction = 0.0
        for vector, count in work.vectors.items():
            us = count * self._vector_us(vector, 1)
            if vector.is_reduce and len(self._ranks) > 1:
                reduction += us + count * self._meeting_us(1)
            else:
                overhead += us
        overhead += a.step_us + work.n_layers * 2 * a.op_us
        kv = 0.0
        for window, count in work.windows.items():
            kv_us, heads_us = self._attention_us(seen(window, position), cached)
            kv, overhead = kv + count * kv_us, overhead + count * heads_us
        parts = (reading, kv, reduction, overhead)
        weights, kv, reduction, overhead = (us * self._turns / 1e3 for us in parts)
        return Decode(weights, kv, reduction, overhead)

    def prefill(self, n_tokens: int) -> Prefill:
        """A prompt of so many tokens, in steps of at most MAX_STEP_TOKENS."""
        parts = [0.0, 0.0, 0.0, 0.0]
        for start in range(0, n_tokens, MAX_STEP_TOKENS):
            rows = min(MAX_STEP_TOKENS, n_tokens - start)
            for i, us in enumerate(self._prefill_step_us(start, rows)):
                parts[i] += us * self._turns / 1e6
        return Prefill(*parts)

    def read_gb(self, position: int) -> tuple[float, float]:
        """GB of weights and of KV cache that one token reads, all ranks together."""
        return sum(self._work.read_bytes) / 1e9, self._work.seen(position) * sum(self._work.kv_layer_bytes) / 1e9

    def _cached_share(self, position: int) -> float:
        """How much of what a token reads is still in the last-level caches from the token before."""
        shares = []
        for rank in self._ranks:
            step = self._work.read_bytes[rank] + self._work.seen(position) * self._work.kv_layer_bytes[rank]
            filled = step * self._on_node[rank] / (self._nodes[rank].cache_mb * 1e6)
            shares.append((NOT_CACHED_FROM - filled) / (NOT_CACHED_FROM - CACHED_UP_TO))
        return min(1.0, max(0.0, min(shares)))

    def _read_us(self, n_bytes: float, busiest: float, rank: int, share: float, cached: float) -> float:
        """Microseconds to read a rank's bytes, of which its busiest thread has the part `busiest`."""
        node = self._nodes[rank]
        gb = n_bytes / 1e9
        memory = max(gb * self._on_node[rank] / node.read_gb_s, gb * busiest / self._m.core_read_gb_s) / share
        cache = gb * busiest / self._a.cached_core_gb_s
        return 1e6 * (cached * cache + (1 - cached) * memory)

    def _busiest(self, pieces: int, rank: int) -> float:
        """The part that the thread with the most of so many equal pieces has."""
        return -(-pieces // self._threads[rank]) / pieces if pieces else 0.0

    def _linear_us(self, op: LinearWork, rank: int, cached: float) -> tuple[float, float]:
        """(reading, the rest) of one token."""
        a, busiest = self._a, self._busiest(op.panels[rank], rank)
        reading = self._read_us(op.large[rank], busiest, rank, a.weights, cached)
        reading += self._read_us(op.small[rank], busiest, rank, a.small_weights, cached)
        return reading, a.linear_us + a.panel_us * busiest * op.panels[rank]

    def _vector_us(self, op: VectorWork, rows: int) -> float:
        per_thread = [
            elements * (-(-rows // threads) if op.by_rows else rows / threads)
            for elements, threads in zip(op.elements, self._threads, strict=True)
        ]
        return self._a.op_us + max(per_thread) * self._a.element_ns / 1e3

    def _meeting_us(self, rows: int) -> float:
        """All ranks waiting for each other, and the others' sums crossing the links."""
        links = self._m.links
        if links is None or not max(self._remote):
            return 0.0
        per_link = rows * self._work.dim * 4 * max(self._on_node)  # sums of the ranks at the link's other end
        return LINE_TRIPS * links.latency_us + per_link / links.gb_s / 1e3

    def _attention_us(self, position: int, cached: float) -> tuple[float, float]:
        """(reading the cache, the rest) of one layer for one token."""
        reading, rest = [], []
        for rank in self._ranks:
            heads, n_bytes = self._work.heads[rank], position * self._work.kv_layer_bytes[rank]
            # Where heads are few for the threads, threads divide the positions too.
            is_split = heads < _core.SPLIT_ITEMS * self._threads[rank]
            pieces = heads * -(-(position + 1) // self._work.attend_chunk) if is_split else heads
            reading.append(self._read_us(n_bytes, self._busiest(pieces, rank), rank, self._a.kv, cached))
            rest.append(self._a.head_us * self._busiest(heads, rank) * heads)
        return max(reading), max(rest)

    def _prefill_step_us(self, start: int, rows: int) -> tuple[float, float, float, float]:
        """(matrices, attention, reduction, overhead)"""
        a, work = self._a, self._work
        matrices = overhead = reduction = 0.0
        for op, count in work.linears.items():
            m = 1 if op.of_outputs else rows
            times = []
            for rank in self._ranks:
                flop = 2.0 * m * op.weights[rank] * self._busiest(op.panels[rank], rank)
                reading, rest = self._linear_us(op, rank, 0.0)
                times.append((max(reading, flop / (self._thread_flop_us(rank) * a.prefill)), rest))
            slowest = max(times, key=sum)
            matrices, overhead = matrices + count * slowest[0], overhead + count * slowest[1]
        for vector, count in work.vectors.items():
            us = count * self._vector_us(vector, rows)
            if vector.is_reduce and len(self._ranks) > 1:
                reduction += us + count * self._meeting_us(rows)
            else:
                overhead += us
        n_seen = sum(work.seen(position) + work.n_layers for position in range(start, start + rows))
        attention = max(
            4.0
            * work.heads[rank]
            * work.head_dim
            * n_seen
            / self._threads[rank]
            / (self._thread_flop_us(rank) * a.attention)
            for rank in self._ranks
        )
        overhead += a.step_us + 2 * work.n_layers * a.op_us
        return matrices, attention, reduction, overhead

    def _thread_flop_us(self, rank: int) -> float:
        """Peak FLOP of one thread in a microsecond."""
        node = self._nodes[rank]
        return node.peak_tflops * 1e6 / node.cores
