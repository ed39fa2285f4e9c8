"""Work ahead and behind: in order, so much at a time, and what goes wrong comes out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from fourfold.pipeline import ahead, behind


def test_ahead_keeps_the_order_and_its_distance() -> None:
    begun: list[int] = []

    def work(i: int) -> int:
        begun.append(i)
        return -i

    for n_read, result in enumerate(ahead(range(20), work, 2), 1):
        assert result == 1 - n_read
        assert len(begun) <= n_read + 2


def test_ahead_works_while_nobody_asks() -> None:
    reached = threading.Event()
    results = ahead([0, 1, 2], lambda i: reached.set() if i == 2 else None, 2)
    next(results)
    assert reached.wait(5)
    results.close()


def test_ahead_raises_in_its_place_and_stops_when_closed() -> None:
    def work(i: int) -> int:
        begun.append(i)
        return 6 // (3 - i)

    begun: list[int] = []
    results = ahead(range(100), work, 1)
    assert [next(results), next(results), next(results)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert len(begun) <= 5


def test_behind_does_jobs_in_order_and_waits_for_the_last() -> None:
    done: list[int] = []
    with behind(2) as do:
        for i in range(10):
            do(lambda i=i: (time.sleep(0.001), done.append(i)))  # type: ignore[misc]
            assert len(done) >= i - 1
    assert done == list(range(10))


def test_behind_raises_what_a_job_raises_and_begins_no_other() -> None:
    done: list[str] = []

    def fail() -> None:
        time.sleep(0.01)
        raise OSError("full")

    def both() -> None:
        with behind(2) as do:
            do(fail)
            do(lambda: done.append("after"))

    with pytest.raises(OSError, match="full"):
        both()
    assert done == []


def test_behind_drops_what_waits_when_the_block_is_left() -> None:
    done: list[str] = []
    release = threading.Event()

    def slow() -> None:
        release.wait(5)
        done.append("under way")

    def leave(do: Callable[[Callable[[], None]], None]) -> None:
        do(slow)
        do(lambda: done.append("waiting"))
        time.sleep(0.01)
        threading.Timer(0.02, release.set).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), behind(3) as do:
        leave(do)
    assert done == ["under way"]
