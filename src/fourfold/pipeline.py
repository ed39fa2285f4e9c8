"""Work done ahead of its use, and behind its making: one more thread each, the order kept, so much of it at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
Job = Callable[[], None]


def ahead(items: Iterable[T], work: Callable[[T], R], depth: int) -> Generator[R]:
    """work(item) of each item, in order, up to `depth` of them begun before they are asked for.

    Close the iterator where it is not read to its end. What `work` raises is raised here, in its place in the order.
    """
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(thread.submit(work, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def behind(depth: int) -> Iterator[Callable[[Job], None]]:
    """A function that has jobs done in order by another thread, and returns once at most `depth` are not done.

    It, or the end of the block, raises what a job raises. After that, or when the block is left by an exception, no
    further job begins; the one that is under way ends first.
    """
    stopped = False
    waiting: deque[Future[Any]] = deque()

    def run(job: Job) -> None:
        nonlocal stopped
        if stopped:
            return
        try:
            job()
        except BaseException:
            stopped = True
            raise

    def do(job: Job) -> None:
        waiting.append(thread.submit(run, job))
        while len(waiting) > depth:
            waiting.popleft().result()

    with ThreadPoolExecutor(1) as thread:
        try:
            yield do
            for future in waiting:
                future.result()
        finally:
            stopped = True
