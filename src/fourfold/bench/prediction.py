"""Whether `fourfold plan` is right on this machine: each repetition of decoding between two calibrations.

The memory's speed and what the kernels make of it are measured anew beside every repetition, since other programs and
other machines change both from second to second. The calibration runs programs of its own and never the model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any, TypeVar

from fourfold.bench.limits import check_counts, spread
from fourfold.bench.matrix import whole_numbers
from fourfold.bench.model import loaded
from fourfold.engine import Engine
from fourfold.machine import read_machine
from fourfold.plan.calibrate import Calibration
from fourfold.plan.machines import PlannedMachine
from fourfold.plan.times import Clock
from fourfold.plan.work import count_work
from fourfold.progress import bar

# A repetition in which others took more than so many cores' worth of time, or around which the memory's speed changed
# by more than this part, is made again.
UNDISTURBED = 0.1
PATIENCE = 4  # so many times the repetitions asked for are tried

T = TypeVar("T")


def plan(
    *,
    models: Sequence[str],
    ranks: str | int | Sequence[int] = "1,2",
    format: str | None = None,
    kv: str | None = None,
    context: int = 0,
    tokens: int = 16,
    repeats: int = 7,
) -> dict[str, Any]:
    """For each model and number of ranks: ms a token as planned and as measured, and their ratio.

    `tokens` are decoded one after another from position `context` on. Repetitions that other processes disturbed are
    made again; where there are too many of them, the least disturbed count. Raises what loading a model raises.
    """
    counts = whole_numbers("ranks", ranks)
    check_counts(tokens=tokens, repeats=repeats, ranks=min(counts))
    rows = []
    for model in models:
        for n_ranks in counts:
            with loaded(model, format, None, n_ranks, context, kv, "auto", tokens, None) as run:
                calibrations = Calibrations(run.engine, {n: w.format for n, w in run.stored.weights.items()})
                measured = run.times(repeats, calibrations, run.feed_one_by_one) * 1e3 / tokens
                planned = calibrations.decode_ms(context + tokens // 2)
                rows.append(
                    {
                        "model": model,
                        "ranks": n_ranks,
                        "threads": sum(len(rank.cpus) for rank in run.engine.plan),
                        "bytes_per_token": run.engine.bytes_per_token(context + tokens // 2),
                        "read_gb_s": spread(calibrations.read_gb_s()),
                        "planned_ms": spread([row["total"] for row in planned]),
                        "measured_ms": spread(measured.tolist()),
                        "ratio": spread(
                            [row["total"] / ms for row, ms in zip(planned, measured.tolist(), strict=True)]
                        ),
                        "parts_ms": {name: median(row[name] for row in planned) for name in planned[0]},
                        "others": spread(calibrations.others),
                    }
                )
    return {"bench": "plan", "tokens": tokens, "context": context, "repeats": repeats, "rows": rows}


class Calibrations:
    """Calibrations before and after each repetition that counts."""

    def __init__(self, engine: Engine, formats: dict[str, Any]) -> None:
        self._plan = engine.plan
        self._calibration = Calibration(read_machine(), engine.plan, engine.config, engine.format, engine.kv)
        threads = [len(rank.cpus) for rank in engine.plan]
        self._work = count_work(engine.config, formats, kv=engine.kv, context=engine.context, threads=threads)
        self._around: list[tuple[PlannedMachine, PlannedMachine]] = []
        self.others: list[float] = []  # cores' worth of time that other processes took meanwhile

    def interleave(self, repeats: int, repetition: Callable[[], T]) -> list[T]:
        """The results of `repeats` repetitions, the least disturbed of at most PATIENCE times as many."""
        machines, results = [self._calibration.measure()], list[T]()
        others, disturbed = list[float](), list[float]()
        with bar("planning and measuring", unit="repetitions") as report:
            while (n_calm := sum(d <= UNDISTURBED for d in disturbed)) < repeats and len(results) < PATIENCE * repeats:
                report(n_calm, repeats)
                start = _cpu_seconds(), time.perf_counter()
                results.append(repetition())
                machines.append(self._calibration.measure(passes=1, decode_only=True))
                others.append((_cpu_seconds() - start[0]) / (time.perf_counter() - start[1]))
                before, after = (one.nodes[0].read_gb_s for one in machines[-2:])
                disturbed.append(max(others[-1], abs(after / before - 1)))
        kept = sorted(sorted(range(len(results)), key=disturbed.__getitem__)[:repeats])
        around = list(pairwise(machines))
        self._around, self.others = [around[i] for i in kept], [others[i] for i in kept]
        return [results[i] for i in kept]

    def decode_ms(self, position: int) -> list[dict[str, float]]:
        """Of each repetition the planned parts and their total, the mean of the machine before and after it."""
        rows = []
        for machines in self._around:
            times = [Clock(machine, self._plan, self._work).decode(position) for machine in machines]
            parts = {name: mean(asdict(one)[name] for one in times) for name in asdict(times[0])}
            rows.append(parts | {"total": sum(parts.values())})
        return rows

    def read_gb_s(self) -> list[float]:
        return [mean(sum(node.read_gb_s for node in one.nodes) for one in machines) for machines in self._around]


def _cpu_seconds() -> float:
    """CPU time of all other processes since the machine started."""
    user, nice, system, _idle, _wait, irq, soft, *_ = map(
        int, Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    )
    ours = os.times()
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK") - ours.user - ours.system
