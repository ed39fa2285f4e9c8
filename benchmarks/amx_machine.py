"""A core of Sapphire Rapids on paper: what a trace of instructions takes on it.

Instructions are allocated and retired in order, six and eight micro-operations a cycle, and executed as soon as their
operands are there and a port is free. Which lines are in L1 and L2 follows from the trace's addresses; what is in
neither comes at a rate of its own, 250 cycles late. Branches are predicted, and instructions always there.

What an ordinary instruction costs (ports, latency, micro-operations) comes from llvm-mca, whose model of this
processor knows nothing of tile instructions (each a quarter of a cycle, 100 cycles of latency) and lacks the second
512-bit unit, on port 5. Both are put right here by published facts; so are sizes of windows and caches.
"""

from __future__ import annotations

import heapq
import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

# Cycles, from the table of throughput and latency in the AMX chapter of Intel's optimization manual. How many
# micro-operations a tile instruction is was not found: amx_counts.py assumes as many as its cycles.
DOT_CYCLES, DOT_LATENCY = 16, 52
LOAD_LATENCY, LOAD_T1_CYCLES, LOAD_T1_LATENCY = 45, 33, 48
ROWS = 16  # of a tile; a load takes two lines a cycle, a store one
# Golden Cove: micro-operations allocated and retired a cycle, and what waits at most.
ALLOCATED, RETIRED, WINDOW, WAITING = 6, 8, 512, {"load": 70, "store": 38, "compute": 97}
# Lines of 64 bytes a way and set; what L2 gives (64 bytes a cycle at best, 48 sustained) and how long beyond it takes.
L1_SETS, L1_WAYS, L2_SETS, L2_WAYS = 64, 12, 2048, 16
L2_LATENCY, L2_LINE_CYCLES = 10, 64 / 48
# Beyond L2; tiles read from L3 kept others' tile unit busy for 0.28 of the time, which is 18 bytes a cycle.
FAR_LATENCY, FAR_LINE_CYCLES = 250, 64 / 18
L1_LATENCY = 8  # of a vector, as llvm-mca has it
STORED_AFTER = 5  # cycles until a load may have what was stored
LOAD_PORTS, STORE_PORT, TILE_PORT, T1_PORT, L2_PORT, FAR_PORT = (2, 3), 100, 101, 102, 103, 104
NOTHING = (0, 0, 0)
# 512-bit arithmetic that both of a server's units do, and llvm-mca's model leaves to port 0.
BOTH_UNITS = re.compile(r"v(f?n?m(add|sub)|mul|add|sub|max|min|cvtdq2|dp|pdp|pmul|pmadd|scalef|reduce|rndscale)")


@dataclass(frozen=True)
class Cost:
    """`uses`: the ports that each micro-operation may take, one cycle each."""

    micro_ops: int
    latency: int
    uses: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Step:
    """One instruction of a trace. Registers are names; lines are addresses over 64."""

    kind: str  # compute, load, store, prefetch, dot, tile_load, tile_load_t1, tile_store, tile_zero, other
    cost: Cost
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    lines: tuple[int, ...] = ()
    values: tuple[str, ...] = ()  # registers that are wanted only when a load's line is there

    def waits_in(self) -> str:
        """The scheduler that holds it."""
        return {"load": "load", "store": "store"}.get(
            self.kind.split("_")[1] if "_" in self.kind else self.kind, "compute"
        )


@dataclass
class Lru:
    sets: int
    ways: int
    held: dict[int, OrderedDict[int, float]] = field(default_factory=dict)

    def get(self, line: int) -> float | None:
        """When the line is there, or None."""
        of_set = self.held.setdefault(line % self.sets, OrderedDict())
        if line in of_set:
            of_set.move_to_end(line)
            return of_set[line]
        return None

    def put(self, line: int, when: float) -> int | None:
        """Keeps the line; the one that makes room for it, if any."""
        of_set = self.held.setdefault(line % self.sets, OrderedDict())
        full = line not in of_set and len(of_set) >= self.ways
        gone = of_set.popitem(last=False)[0] if full else None
        of_set[line] = when
        of_set.move_to_end(line)
        return gone


class Port:
    """Where a micro-operation is taken as soon as it is ready and there is a free cycle, in any order."""

    def __init__(self) -> None:
        self.after: dict[int, int] = {}  # of each cycle taken, one before which none is free

    def free(self, ready: float) -> int:
        first = cycle = int(-(-ready // 1))
        while cycle in self.after:
            cycle = self.after[cycle]
        while first in self.after:
            self.after[first], first = cycle, self.after[first]
        return cycle

    def take(self, ready: float) -> int:
        cycle = self.free(ready)
        self.after[cycle] = cycle + 1
        return cycle


@dataclass
class Result:
    cycles: float
    dots: int
    loaded: int  # lines that loads and tile loads asked for,
    from_l2: int  # of which these came from L2
    far: int  # and these from beyond


class Core:
    def __init__(self) -> None:
        self.ports: dict[int, Port] = {}
        self.busy: dict[int, float] = {TILE_PORT: 0, T1_PORT: 0}
        self.l1, self.l2 = Lru(L1_SETS, L1_WAYS), Lru(L2_SETS, L2_WAYS)
        self.stored: dict[int, float] = {}  # lines, and when a load may have them
        self.dirty: set[int] = set()  # lines that L1 has yet to write to L2

    def run(self, steps: Iterable[Step], skip: int = 0) -> Result:
        """What the steps take, from the retirement of step `skip` on; those before warm caches."""
        ready: dict[str, float] = {}
        retire: list[float] = []  # of each micro-operation in the window
        waiting: dict[str, list[float]] = {kind: [] for kind in WAITING}
        allocated, slot, retired, start, n_retired_at = 0.0, 0, 0.0, 0.0, 0
        counts = [0, 0, 0, 0]
        for index, step in enumerate(steps):
            n = max(1, step.cost.micro_ops)
            where = step.waits_in()
            queue = waiting[where]
            while queue and queue[0] <= allocated:
                heapq.heappop(queue)
            if len(queue) >= WAITING[where]:
                allocated, slot = max(allocated, heapq.heappop(queue)), 0
            slot += n
            allocated += slot // ALLOCATED
            slot %= ALLOCATED
            if len(retire) >= WINDOW:
                allocated = max(allocated, retire[-WINDOW])
                if len(retire) > 8 * WINDOW:
                    del retire[: -2 * WINDOW]
            at = max([allocated + 1, *(ready.get(name, 0) for name in step.reads)])
            values = max((ready.get(name, 0) for name in step.values), default=0)
            done, began, tally = self.execute(step, at, values)
            if step.kind not in ("other", "tile_zero"):
                heapq.heappush(queue, began)
            for name in step.writes:
                ready[name] = done
            if done > retired:
                retired, n_retired_at = done, 0
            n_retired_at += n
            retired += n_retired_at // RETIRED
            n_retired_at %= RETIRED
            retire.extend([retired] * n)
            if index < skip:
                start = retired
                continue
            counts = [a + b for a, b in zip(counts, (step.kind == "dot", *tally), strict=True)]
        return Result(retired - start, *counts)

    def execute(self, step: Step, at: float, values: float) -> tuple[float, float, tuple[int, int, int]]:
        """When its result is there, when it began, and its lines: all, from L2, from beyond."""
        if step.kind == "dot":
            begin = self.occupy(TILE_PORT, at, DOT_CYCLES)
            return begin + DOT_LATENCY, begin, NOTHING
        if step.kind == "tile_zero":
            return at, at, NOTHING
        if step.kind in ("tile_load", "tile_load_t1"):
            return self.load_tile(step, at)
        began = self.spread(step.cost.uses, at)
        if step.kind in ("tile_store", "store"):
            for line in step.lines:
                began = self.port(STORE_PORT).take(began)
                self.fetch(line, began)
                self.stored[line] = began + STORED_AFTER
                self.dirty.add(line)
            return began + 1, began if step.kind == "tile_store" else at, NOTHING
        if step.kind == "prefetch":
            for line in step.lines:
                if self.l1.get(line) is None and self.l2.get(line) is None:
                    self.l2.put(line, self.from_afar(began))
            return began, began, NOTHING
        done, tally = began + step.cost.latency, NOTHING
        for line in step.lines:
            there, level = self.fetch(line, max(began, self.stored.get(line, 0)))
            loading = min(L1_LATENCY, step.cost.latency)
            done = max(there + loading, values) + step.cost.latency - loading
            tally = (1, int(level == 2), int(level == 3))
        return done, began, tally

    def load_tile(self, step: Step, at: float) -> tuple[float, float, tuple[int, int, int]]:
        once = step.kind == "tile_load_t1"
        if once:
            at = self.occupy(T1_PORT, at, LOAD_T1_CYCLES)
        last, levels = at, [0, 0, 0, 0]
        for line in step.lines:
            port = min(LOAD_PORTS, key=lambda p: self.port(p).free(at))
            there, level = self.fetch(line, self.port(port).take(max(at, self.stored.get(line, 0))), keep=not once)
            last = max(last, there)
            levels[level] += 1
        latency = LOAD_T1_LATENCY if once else LOAD_LATENCY
        return last + latency - ROWS // len(LOAD_PORTS), at, (sum(levels), levels[2], levels[3])

    def port(self, number: int) -> Port:
        return self.ports.setdefault(number, Port())

    def spread(self, uses: tuple[tuple[int, ...], ...], at: float) -> float:
        began = at
        for ports in uses:
            began = max(began, self.port(min(ports, key=lambda p: self.port(p).free(at))).take(at))
        return began

    def occupy(self, number: int, at: float, cycles: float) -> float:
        begin = max(at, self.busy[number])
        self.busy[number] = begin + cycles
        return begin

    def from_afar(self, at: float) -> float:
        return self.port(FAR_PORT).take(at / FAR_LINE_CYCLES) * FAR_LINE_CYCLES + FAR_LATENCY

    def fetch(self, line: int, at: float, keep: bool = True) -> tuple[float, int]:
        """When the line is there, and from which level."""
        here = self.l1.get(line)
        if here is not None:
            return max(at, here), 1
        level, there = 2, self.l2.get(line)
        if there is None:
            level, there = 3, self.from_afar(at)
            self.l2.put(line, there)
        there = max(there, self.port(L2_PORT).take(at / L2_LINE_CYCLES) * L2_LINE_CYCLES + L2_LATENCY)
        if keep and (gone := self.l1.put(line, there)) in self.dirty:
            self.dirty.discard(gone)
            self.port(L2_PORT).take(there / L2_LINE_CYCLES)
        return there, level
