"""Work ahead: in order, so much at a time, and what goes wrong comes out."""

from __future__ import annotations

import threading
import time

import pytest

from fourfold.pipeline import ahead


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
    assert reached.wait(60)
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


def test_several_threads_work_at_once_and_the_order_stays() -> None:
    together = threading.Barrier(3, timeout=60)

    def work(i: int) -> int:
        together.wait()  # passed only by three at a time
        time.sleep(0.001 * (3 - i % 3))
        return i

    assert list(ahead(range(9), work, 3, threads=3)) == list(range(9))


def test_one_stage_feeds_another() -> None:
    first = ahead(range(50), lambda i: i + 1, 3)
    assert list(ahead(first, lambda i: i * 2, 4, threads=2)) == list(range(2, 102, 2))


def test_closing_ends_what_is_under_way_and_begins_nothing() -> None:
    done: list[int] = []

    def work(i: int) -> None:
        time.sleep(0.02)
        done.append(i)

    results = ahead(range(100), work, 5)
    next(results)
    results.close()
    n_done = len(done)
    time.sleep(0.05)
    assert len(done) == n_done <= 2
