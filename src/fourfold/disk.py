"""The file that weights are read from at every step: the rate that its disk gives, and what the steps took of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import fourfold._core as _core
from fourfold.checkpoint.fourfold_dir import FourfoldDirectory
from fourfold.residency import Residency, gb

SAMPLE_BYTES, SAMPLE_SECONDS = 1 << 30, 1.0  # what the disk's rate is measured over, at most


def disk_rate(path: Path, offset: int = 0) -> float:
    """Bytes/s of reading a file in order from there on, with nothing else to do, measured now.

    The page cache forgets what is read. Raises _core.StallError where the disk gives nothing.
    """
    n_bytes = min(path.stat().st_size - offset, SAMPLE_BYTES)
    return float(_core.measure_disk(str(path), offset, n_bytes, SAMPLE_SECONDS))


class WeightDisk:
    """Made when the weights in memory are loaded. Raises _core.StallError where the disk gives nothing."""

    def __init__(self, stored: FourfoldDirectory, residency: Residency) -> None:
        read = [stored.weights[name] for name in residency.on_disk]
        self._path = stored.weights_path
        self._weight_bytes = sum(stored.weights[name].data_bytes for name in residency.on_disk | residency.looked_up)
        self._bytes_per_step = sum(weight.data_bytes for weight in read)
        self._offset = min((weight.data_offset for weight in read), default=0)
        with self._path.open("rb") as file:  # what was loaded is not needed twice
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._measured = self.measure()
        self._seconds, self._bytes = 0.0, 0

    def measure(self) -> float:
        """What the disk gives now, in bytes/s."""
        return disk_rate(self._path, self._offset)

    @contextmanager
    def counted(self, program: Any) -> Iterator[None]:
        """Count a step's time and what was read meanwhile."""
        begin, n_bytes = perf_counter(), program.disk_bytes_read
        yield
        self._seconds += perf_counter() - begin
        self._bytes += program.disk_bytes_read - n_bytes

    def slowness(self) -> str:
        """A sentence that says what bounds a step."""
        seconds = self._bytes_per_step / self._measured
        return (
            f"{gb(self._bytes_per_step)} of weights are not in memory and are read from disk for every token: at the "
            f"{self._measured / 1e9:.2f} GB/s measured that takes {seconds:.2g} s, whatever the cores can do."
        )

    def describe(self) -> dict[str, Any]:
        """JSON-ready; `gb_s` is what all steps so far read a second, None before the first."""
        rate = self._bytes / self._seconds if self._seconds else None
        return {
            "weight_bytes": self._weight_bytes,
            "bytes_per_step": self._bytes_per_step,
            "measured_gb_s": self._measured / 1e9,
            "gb_s": None if rate is None else rate / 1e9,
            "of_measured": None if rate is None else rate / self._measured,
        }
