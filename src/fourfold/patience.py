"""Waiting for a disk that may hang: so long and no longer, and open to an interrupt all the while."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

from fourfold.errors import RuntimeFailure

NAP_SECONDS = 0.1
GRACE_SECONDS = 1.0  # for reads under way to end, once nobody waits for them


def patiently(work: Callable[[], None], file: Any, path: Path, patience_seconds: float) -> None:
    """Does `work`, which reads `path` by a native `ReadFile`, on a thread of its own. Raises what that raises.

    A thread that reads may hang in the kernel, where no interrupt reaches it; so the thread that asks does not read. An
    interrupt ends the wait, and so does a disk that gives nothing for `patience_seconds`, with a RuntimeFailure: then
    reading ends, unless the disk hangs, in which case its threads are left alone with what they hold.
    """
    errors: list[BaseException] = []
    done = Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
        done.set()

    try:
        thread = Thread(target=run, name="fourfold-load", daemon=True)  # one that hangs holds up no process's end
        thread.start()
    except RuntimeError:
        raise RuntimeFailure(
            f"the system gives no thread to read {path} with; raise this process's limit of threads"
        ) from None
    try:
        _wait(done, file, path, patience_seconds)
    except BaseException:
        file.stop()
        done.wait(GRACE_SECONDS)
        raise
    thread.join()
    if errors:
        raise errors[0]


def _wait(done: Event, file: Any, path: Path, patience_seconds: float) -> None:
    """Only naps count: a process that was stopped for a minute has not waited for its disk."""
    waited, n_read = 0.0, file.bytes_read
    while not done.wait(NAP_SECONDS):
        waited = waited + NAP_SECONDS if file.bytes_read == n_read else 0.0
        n_read = file.bytes_read
        if waited >= patience_seconds:
            raise RuntimeFailure(f"the disk of {path} gave nothing for {patience_seconds:.3g} s; check the disk")
