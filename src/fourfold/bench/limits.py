"""The limits that every figure is a fraction of, measured before and after each repetition of what they limit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from typing import Any, TypeVar

import fourfold._core as _core
from fourfold.errors import ResourceError, RuntimeFailure, UserError
from fourfold.machine import Machine, RankPlan
from fourfold.progress import bar

READ_BYTES = 1_000_000_000  # what the read bandwidth is measured over, or more where the caches are large
TIMES_CACHE = 4  # that many last-level caches' worth of bytes make what is found in them count for little
_ISA = "FOURFOLD_ISA"
TRIALS = 3  # of each read pattern, or of the peak, in one measurement; the median counts

T = TypeVar("T")


class Limits:
    """Read and copy bandwidth and peak of the CPUs that a plan uses, measured again and again as the run goes on.

    `disk` measures a disk (bytes/s), or gives None where none is read.

    The read bandwidth (bytes/s) is that of the best of several read patterns; the copy bandwidth counts bytes that
    arrive; the peak (FLOP/s) is that of the fastest instructions the machine has, used or not. Raises ResourceError
    where memory for measuring is short.
    """

    def __init__(
        self,
        machine: Machine,
        plan: Sequence[RankPlan],
        *,
        read: bool = False,
        copy: bool = False,
        peak: bool = False,
        disk: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.cpus = sorted({cpu for rank in plan for cpu in rank.cpus})
        self.cache_bytes = _last_level_bytes(machine, self.cpus)
        self.n_bytes = max(READ_BYTES, TIMES_CACHE * self.cache_bytes)
        self._peak_kind = _core.peak_kinds()[0]
        self._wants_read, self._wants_copy, self._wants_peak = read, copy, peak
        self._read: list[float] = []
        self._copy: list[float] = []
        self._peak: list[float] = []
        self._measure_disk, self._disk = disk, list[float]()
        if (read or copy) and self.n_bytes > machine.available_bytes:
            raise ResourceError(
                f"measuring the bandwidth takes {self.n_bytes / 1e9:.1f} GB and "
                f"{machine.available_bytes / 1e9:.1f} GB are free: free some memory"
            )

    def interleave(self, repeats: int, repetition: Callable[[], T]) -> list[T]:
        """The results of `repeats` repetitions, the limits measured before the first, between, and after the last."""
        results = []
        with bar("measuring", unit="repetitions") as report:
            report(0, repeats)
            self._measure()
            for done in range(repeats):
                results.append(repetition())
                self._measure()
                report(done + 1, repeats)
        return results

    def fractions_of_read(self, rates: Sequence[float]) -> dict[str, float]:
        """Spread of each repetition's bytes/s over the read bandwidth around it."""
        return fractions(rates, self._read)

    def fractions_of_copy(self, rates: Sequence[float]) -> dict[str, float]:
        """Spread of each repetition's bytes/s over the copy bandwidth around it."""
        return fractions(rates, self._copy)

    def fractions_of_peak(self, rates: Sequence[float]) -> dict[str, float]:
        """Spread of each repetition's FLOP/s over the peak around it."""
        return fractions(rates, self._peak)

    def fractions_of_disk(self, rates: Sequence[float]) -> dict[str, float]:
        """Spread of each repetition's bytes/s over the disk's around it."""
        return fractions(rates, self._disk)

    def read_around(self) -> list[float]:
        """The read bandwidth (bytes/s) around each repetition: the mean of that before it and that after."""
        return _means(self._read)

    def peak_around(self) -> list[float]:
        """The peak (FLOP/s) around each repetition."""
        return _means(self._peak)

    def describe(self) -> dict[str, Any]:
        """What was measured, JSON-ready."""
        facts: dict[str, Any] = {}
        if self._disk:
            facts["disk_gb_s"] = spread([rate / 1e9 for rate in self._disk])
        if self._wants_read:
            facts["read_gb_s"] = spread([rate / 1e9 for rate in self._read])
        if self._wants_copy:
            facts["copy_gb_s"] = spread([rate / 1e9 for rate in self._copy])
        if self._wants_peak:
            has_amx = self._peak_kind.startswith("amx")
            facts["peak_gflop_s"] = spread([rate / 1e9 for rate in self._peak])
            facts["peak"] = f"{self._peak_kind} peak" + ("" if has_amx else " (no AMX on this machine)")
        return facts

    def cache_notes(self, n_bytes: int) -> list[str]:
        """What to say where so few bytes are read again and again that the caches hold a good part of them."""
        if n_bytes >= TIMES_CACHE * self.cache_bytes:
            return []
        sizes = f"{n_bytes / 1e6:.0f} MB are read again and again and the last-level cache has"
        if n_bytes <= self.cache_bytes:
            return [f"{sizes} {self.cache_bytes / 1e6:.0f} MB, so all may lie there: the ratio is not one to memory."]
        return [f"{sizes} {self.cache_bytes / 1e6:.0f} MB, so part may lie there and the ratio may flatter."]

    def _measure(self) -> None:
        if disk := self._measure_disk():
            self._disk.append(disk)
        try:
            if self._wants_read:
                self._read.append(_core.measure_read_bandwidth(self.cpus, self.n_bytes, TRIALS)["median_gb_s"] * 1e9)
            if self._wants_copy:
                self._copy.append(_core.measure_copy_bandwidth(self.cpus, self.n_bytes, TRIALS)["median_gb_s"] * 1e9)
            if self._wants_peak:
                self._peak.append(_core.measure_peak(self.cpus, self._peak_kind, TRIALS)["median_gflop_s"] * 1e9)
        except RuntimeError as error:  # a probe whose result was wrong
            raise RuntimeFailure(str(error)) from None


def spread(values: Sequence[float]) -> dict[str, float]:
    """What every figure is given as."""
    return {"median": median(values), "min": min(values), "max": max(values)}


@contextmanager
def forced_isa(isa: str | None) -> Iterator[None]:
    """Sets FOURFOLD_ISA, which says what the kernels are chosen from, while the block runs; None leaves it."""
    before = os.environ.get(_ISA)
    if isa is not None:
        os.environ[_ISA] = isa
    try:
        yield
    finally:
        if isa is not None:
            del os.environ[_ISA]
            os.environ.update({} if before is None else {_ISA: before})


def check_counts(**counts: int | None) -> None:
    """Raises UserError for a count below one; None stands for a default."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{name} must be at least 1, not {count}")


def uses_amx(kernels: Sequence[str]) -> bool:
    """Whether one of the kernels of these names computes with AMX tiles."""
    return any(_core.isa_of_kernel(name) == "amx" for name in kernels)


def fractions(rates: Sequence[float], limits: Sequence[float]) -> dict[str, float]:
    """Spread of each repetition's rate over the mean of the limits measured before and after it."""
    return spread([rate / limit for rate, limit in zip(rates, _means(limits), strict=True)])


def _means(values: Sequence[float]) -> list[float]:
    return [(before + after) / 2 for before, after in pairwise(values)]


def _last_level_bytes(machine: Machine, cpus: Sequence[int]) -> int:
    """Of the last-level caches beside these CPUs, all together."""
    level = max((cache.level for cache in machine.caches), default=0)
    caches = [cache for cache in machine.caches if cache.level == level]
    return sum(cache.bytes * sum(not set(cpus).isdisjoint(beside) for beside in cache.sharers) for cache in caches)
