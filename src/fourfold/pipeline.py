"""Work done ahead of its use: by other threads, in order, so much of it at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(items: Iterable[T], work: Callable[[T], R], depth: int, threads: int = 1) -> Generator[R]:
    """work(item) of each item, in the order of the items, up to `depth` of them begun before they are asked for.

    Items are taken by the thread that asks. What `work` raises is raised in its place in the order; then, or when the
    generator is closed, no further work begins, and what is under way ends first.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
