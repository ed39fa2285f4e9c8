"""What a server's process holds, as the system sees it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Holdings:
    """While nobody asks for anything."""

    descriptors: int
    threads: int

    @classmethod
    def at_rest(cls, pid: int) -> Holdings:
        """The least of two seconds: connections of a moment ago are still being closed. Of a process that lives."""
        root, seen = Path(f"/proc/{pid}"), []
        for _ in range(20):
            time.sleep(0.1)
            seen.append([sum(1 for _ in (root / kind).iterdir()) for kind in ("fd", "task")])
        return cls(*map(min, *seen))


def resident_mb(pid: int) -> float:
    """Memory of its own that a process has in use: pages of files are not counted."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024 / 1e6


async def watch_memory(pid: int, samples: list[float]) -> None:
    """Adds to the samples until it is cancelled."""
    while True:
        samples.append(resident_mb(pid))
        await asyncio.sleep(SAMPLE_SECONDS)


def growth_mb(samples: list[float]) -> float:
    """From the middle of a run to its end, by medians of a tenth each."""
    tenth, middle = max(1, len(samples) // 10), len(samples) // 2
    return median(samples[-tenth:]) - median(samples[middle : middle + tenth])
