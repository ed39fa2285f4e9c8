"""How long work shows itself, on stderr where that is a terminal; and warnings, which always show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

Report = Callable[[int, int], None]  # done, in all


@contextmanager
def bar(title: str, unit: str = "bytes") -> Iterator[Report]:
    """A function to call as the work goes on: a bar with time left, and GB/s where the unit is bytes.

    It appears with the first call, so work that proves to be done already shows nothing.
    """
    progress: Progress | None = None

    def report(done: int, total: int) -> None:
        nonlocal progress
        if progress is None:
            progress = _progress(unit)
            progress.add_task(title, total=total)
            progress.start()
        progress.update(progress.task_ids[0], completed=done, total=total)

    try:
        yield report
    finally:
        if progress is not None:
            progress.stop()


def warn(sentence: str) -> None:
    """A sentence on stderr, marked as doctor marks its own."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble(("!", "yellow"), f" {sentence}"))


def note(sentence: str) -> None:
    """A sentence on stderr that warns of nothing."""
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(sentence)


def _progress(unit: str) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn())
    if unit != "bytes":
        amount = (MofNCompleteColumn(), TextColumn(unit))
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *amount,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
