"""This process's threads as the kernel shows them, and what is said of time on a machine that does other work too."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def allowed_cpus() -> dict[str, str]:
    """The CPUs that each thread may run on, by thread id."""
    lists = {}
    for status in Path("/proc/self/task").glob("*/status"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread may end while we look
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
            lists[status.parent.name] = fields["Cpus_allowed_list"]
    return lists


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether it comes true in the end: a thread that was joined stays listed for a moment."""
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def once_in_time(attempt: Callable[[], bool], tries: int = 5) -> bool:
    """Whether one of some tries was in time: any of them may be held up by others."""
    return any(attempt() for _ in range(tries))
