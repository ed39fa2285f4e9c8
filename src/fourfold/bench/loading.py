"""How fast a model comes into memory from the page cache, and how much memory that takes at most."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourfold.bench.limits import Limits, check_counts, spread
from fourfold.checkpoint.fourfold_dir import open_directory
from fourfold.engine import Engine
from fourfold.errors import RuntimeFailure
from fourfold.locate import fourfold_directory
from fourfold.machine import plan_ranks, read_machine
from fourfold.progress import bar

CONTEXT = 64  # one page of KV cache: little beside the weights


def load(
    *,
    model: str = "smollm2",
    format: str | None = None,
    threads: int | None = None,
    ranks: int | None = None,
    repeats: int = 5,
) -> dict[str, Any]:
    """Time from a directory to a model that can step, its file in the page cache, and the largest resident set.

    Raises RuntimeFailure where two loads do not give the same logits.
    """
    check_counts(repeats=repeats, ranks=ranks, threads=threads)
    with bar(f"converting {model}") as report:
        directory = fourfold_directory(model, format, threads=threads, report=report)
    stored, machine = open_directory(directory), read_machine()
    plan = plan_ranks(machine, ranks, threads)
    limits = Limits(machine, plan, copy=True)
    loads = _Loads(directory, ranks, threads)
    loads.run()  # brings the file into the page cache
    seconds = np.array(limits.interleave(repeats, loads.run))
    rates = (loads.weight_bytes / seconds).tolist()
    return {
        "bench": "load",
        "model": model,
        "model_type": stored.config.model_type,
        "format": stored.format,
        "ranks": len(plan),
        "threads": sum(len(rank.cpus) for rank in plan),
        "repeats": repeats,
        "limits": limits.describe(),
        "weight_bytes": loads.weight_bytes,
        "seconds": spread(seconds.tolist()),
        "gb_s": spread([rate / 1e9 for rate in rates]),
        "of_copy": limits.fractions_of_copy(rates),
        "peak_over_weights": spread([peak / loads.weight_bytes for peak in loads.peaks[1:]]),
        "notes": [
            "Time is that of everything from opening the directory on; peak memory is the growth of the resident set, "
            "a KV cache for one page included."
        ],
    }


class _Loads:
    """One load after another of the same model, each gone before the next."""

    def __init__(self, directory: Path, ranks: int | None, threads: int | None) -> None:
        self._directory, self._ranks, self._threads = directory, ranks, threads
        self.weight_bytes = 0
        self.peaks: list[int] = []
        self._logits: NDArray[np.float32] | None = None

    def run(self) -> float:
        """Seconds of one load."""
        before = _restart_peak()
        begin = perf_counter()
        engine = Engine(self._directory, ranks=self._ranks, threads=self._threads, context=CONTEXT)
        try:
            seconds = perf_counter() - begin
            self.peaks.append(max(0, _status("VmHWM") - before))  # the kernel counts in batches of pages
            self.weight_bytes = engine.weight_bytes
            logits = engine.logits([0])
        finally:
            engine.close()
        if not np.isfinite(logits).all() or (self._logits is not None and not np.array_equal(logits, self._logits)):
            raise RuntimeFailure("two loads of one model gave different logits: no figures of a wrong result")
        self._logits = logits
        return seconds


def _restart_peak() -> int:
    """Bytes resident now, which the largest resident set counts from afterwards."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    return _status("VmRSS")


def _status(name: str) -> int:
    """Bytes, of a line in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))
