"""The all-reduce: from the last rank's partial sums until every rank has their total, as a step does it.

A program of partial products and reductions runs, and the marks of its threads (csrc/timeline.h) tell for each when the
last thread arrived at the barrier before it and when the last one left it: barrier of all ranks, sums, barrier of the
rank. Buffers alternate as in a model, so that what a rank reads has just been written by other cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold.bench.limits import check_counts, spread
from fourfold.errors import ResourceError, RuntimeFailure, UserError
from fourfold.format import TILE_K, n_panels, panel_bytes
from fourfold.machine import RankPlan, choose_isa, plan_ranks, read_machine
from fourfold.placement import start_team
from fourfold.profile import MARK, WAIT
from fourfold.program import TILE_N, whole

REDUCTIONS = 64  # in one step
STEPS = 40  # in one repetition
WARM_UP_STEPS = 5
HANDOVERS = 2000  # in one measurement of the limit
MAX_KB = 4096
F32 = 4


def reduce(*, ranks: int = 2, threads: int | None = None, kb: int = 16, repeats: int = 5) -> dict[str, Any]:
    """Latency of adding `kb` KB of float32 sums of every rank on every rank; one thread a rank by default.

    The limit is what the slowest pair of ranks needs for the hand-over itself: a word from core to core that the bytes
    are there, and reading a word of each of their lines; measured before and after each repetition. Raises UserError
    and ResourceError for what cannot be measured, RuntimeFailure, giving no figures, where a sum is wrong.
    """
    check_counts(ranks=ranks, threads=threads, kb=kb, repeats=repeats)
    if ranks < 2:
        raise UserError("one rank has nothing to reduce; ask for at least 2 ranks")
    if kb > MAX_KB:
        raise UserError(f"kb must be at most {MAX_KB}, not {kb}")
    plan = plan_ranks(read_machine(), ranks, threads or ranks)
    cpus = [cpu for rank in plan for cpu in rank.cpus]
    if len(set(cpus)) < len(cpus):
        raise ResourceError(
            f"{ranks} ranks need as many CPUs to be measured, and {len(set(cpus))} are usable: ask for fewer --ranks"
        )
    chain = _Reductions(plan, kb * 1024 // F32)
    limits, latencies = [_limit(plan, kb)], []
    for _ in range(WARM_UP_STEPS):
        chain.step()
    for _ in range(repeats):
        latencies.append(np.concatenate([chain.step() for _ in range(STEPS)]))
        limits.append(_limit(plan, kb))
    medians = [float(np.median(times)) for times in latencies]
    around = [(a["us"] + b["us"]) / 2 for a, b in pairwise(limits)]
    return {
        "bench": "reduce",
        "kb": kb,
        "ranks": len(plan),
        "threads": len(cpus),
        "isa": chain.isa,
        "repeats": repeats,
        "reductions": sum(map(len, latencies)),
        "us": spread(medians),
        "p99_us": spread([float(np.percentile(times, 99)) for times in latencies]),
        "limits": {
            "handover_us": spread([limit["us"] for limit in limits]),
            "round_trip_us": spread([limit["round_trip_us"] for limit in limits]),
        },
        "of_limit": spread([limit / us for limit, us in zip(around, medians, strict=True)]),
        "notes": [
            "From the last thread's arrival until the last one leaves; taking the times costs about 0.1 µs of it."
        ],
    }


def _limit(plan: Sequence[RankPlan], kb: int) -> dict[str, float]:
    """µs that the slowest pair needs: half a round trip for the word, and the reading of all other ranks' bytes."""
    first, *others = (rank.cpus[0] for rank in plan)
    pairs = []
    for other in others:
        trip = _core.measure_handover(first, other, 0, HANDOVERS)["median_us"]
        loaded = _core.measure_handover(first, other, kb * 1024 // min(len(rank.cpus) for rank in plan), HANDOVERS)
        pairs.append((max(0.0, loaded["median_us"] - trip), trip))
    reading, trip = max(pairs)
    return {"us": trip / 2 + reading * len(others), "round_trip_us": trip}


class _Reductions:
    """A program that multiplies and reduces again and again, and the latencies of its reductions."""

    def __init__(self, plan: Sequence[RankPlan], width: int) -> None:
        self.isa = choose_isa()
        n_ranks = len(plan)
        self._plan, self._team = plan, start_team(read_machine(), plan)
        rng = np.random.default_rng(0)
        inputs = rng.standard_normal((1, n_ranks * TILE_K), dtype=np.float32)  # an embedding of one row
        spread_out = np.eye(n_ranks * TILE_K, dtype=np.float32)
        multiplied = rng.standard_normal((width, n_ranks * TILE_K), dtype=np.float32)
        seen = rng.standard_normal((TILE_N, width), dtype=np.float32)
        self._truth = seen.astype(np.float64) @ (multiplied.astype(np.float64) @ inputs[0].astype(np.float64))
        self._size = np.abs(seen.astype(np.float64)) @ (np.abs(multiplied) @ np.abs(inputs[0])).astype(np.float64)

        self._program = program = _core.make_program(
            self._team, max_tokens=1, n_slots=1, context=1, n_pages=1, head_dim=TILE_K, kv="f32", isa=self.isa
        )
        all_inputs, all_width = whole(n_ranks * TILE_K, n_ranks), whole(width, n_ranks)
        cut = [[(TILE_K * rank, TILE_K * (rank + 1))] for rank in range(n_ranks)]
        x = program.add_buffer(all_inputs.widths, False)
        part = program.add_buffer([TILE_K] * n_ranks, False)
        partials = [program.add_buffer(all_width.widths, False) for _ in range(2)]
        base, total = (program.add_buffer(all_width.widths, False) for _ in range(2))
        everything = [list(rank) for rank in all_inputs.ranges]
        program.add_embed(self._weight(inputs, [[(0, 1)]] * n_ranks, everything), 1.0, x)
        program.add_linear(x, [(self._weight(spread_out, cut, everything), part, [])])
        weight = self._weight(multiplied, [list(rank) for rank in all_width.ranges], cut)
        for i in range(REDUCTIONS):
            program.add_linear(part, [(weight, partials[i % 2], [])])
            program.add_reduce(partials[i % 2], base, [], total)
        head = self._weight(seen, [[(0, TILE_N)]] + [[]] * (n_ranks - 1), [[(0, width)]] + [[]] * (n_ranks - 1))
        program.add_linear(total, [(head, _core.Program.LOGITS, [])])
        program.finish()
        program.record(True)
        self._reduce_ops = [i for i, name in enumerate(program.op_names) if name == "reduce"]
        self._y = np.empty((1, TILE_N), np.float32)

    def _weight(self, values: NDArray[np.float32], outputs: Any, inputs: Any) -> int:
        n, k = values.shape
        panels = np.empty((n_panels(n), panel_bytes("f32", k)), np.uint8)
        _core.pack(values, "f32", panels, None, threads=1)
        weight = _core.make_weight("f32", n, k, list(zip(outputs, inputs, strict=True)), self._team)
        weight.load(self._team, panels, None)
        return int(self._program.add_weight(weight))

    def step(self) -> NDArray[np.float64]:
        """Latencies (REDUCTIONS) in µs. Raises RuntimeFailure where the totals are not the sums."""
        self._y[:] = np.nan
        token, sequence = np.zeros(1, np.int32), np.zeros((0, 4), np.int32)
        try:
            self._program.step(token, sequence, np.zeros((0, 0), np.int32), token, self._y)
        except _core.StallError as error:
            raise RuntimeFailure(str(error)) from None
        if not bool((np.abs(self._y[0] - self._truth) <= 2.0**-16 * self._size).all()):
            raise RuntimeFailure("the ranks' sums are wrong: no figures of a wrong result")
        threads = [(rank, thread) for rank, at in enumerate(self._plan) for thread in range(len(at.cpus))]
        times = [self._arrivals_and_ends(np.frombuffer(self._program.marks(*thread), MARK)) for thread in threads]
        arrived, ended = np.max(times, axis=0)
        latencies: NDArray[np.float64] = (ended - arrived) / 1e3
        return latencies

    def _arrivals_and_ends(self, marks: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """ns at which this thread came to the barrier before each reduction, and was through with the reduction."""
        begins = np.searchsorted(marks["op"], self._reduce_ops)  # the reductions' first marks
        assert (marks["phase"][begins - 1] == WAIT).all()
        return marks["ns"][begins - 1], marks["ns"][np.searchsorted(marks["op"], self._reduce_ops, side="right")]
