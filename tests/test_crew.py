"""How threads of our own divide the panels of a call."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import fourfold
import preload
from fourfold import _core
from threads import once_in_time


@pytest.mark.parametrize(("count", "most", "threads"), [(0, 4, 3), (1, 4, 3), (7, 1, 2), (1000, 4, 5), (999, 64, 16)])
def test_every_unit_is_taken_once(count: int, most: int, threads: int) -> None:
    for _ in range(50):
        taken = _core.take_shares(count, most, threads, threads, 0)
        units = [unit for own in taken for begin, end in own for unit in range(begin, end)]
        assert sorted(units) == list(range(count))
        assert max((end - begin for own in taken for begin, end in own), default=0) <= most


def test_a_slow_thread_is_helped_from_the_back() -> None:
    """It goes on from the front of its own share; the other computes much of it."""
    slow, quick = _core.take_shares(400, 4, 2, 0, 0.05)
    assert [begin for begin, _ in slow] == list(range(0, 4 * len(slow), 4))
    assert len(slow) < 50  # that are its share
    helped = [begin for begin, _ in quick if begin < 200]
    assert helped == sorted(helped, reverse=True)
    assert len(helped) + len(slow) == 50


def test_nobody_waits_for_a_thread_that_comes_late() -> None:
    """The caller takes its part, once; the thread, when it comes, finds nothing to do, and serves the next call."""
    for late in (1, 2):

        def is_left_behind(late: int = late) -> bool:
            begin = time.monotonic()
            parts = _core.call_late(3, late, 2.0)
            taken = time.monotonic() - begin
            assert [len(taken) for taken in parts] == [1, 1, 1]
            assert parts[late] == [True]
            time.sleep(2.2)
            assert [len(taken) for taken in _core.call_late(3, 0, 0)] == [1, 1, 1]
            return taken < 1.9

        assert once_in_time(is_left_behind)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_same_bits_whoever_computes_them(rows: int) -> None:
    """More threads than there are cores, so that some come late and are helped."""
    rng = np.random.default_rng(0)
    w = fourfold.quantize(rng.standard_normal((3000, 1100), dtype=np.float32))
    x = rng.standard_normal((rows, 1100), dtype=np.float32)
    expected = fourfold.linear(x, w, threads=1)
    for i in range(60):
        np.testing.assert_array_equal(fourfold.linear(x, w, threads=2 + i % 9), expected)


def test_callers_interleave() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 512), dtype=np.float32)
    weights = [rng.standard_normal((1024, 512), dtype=np.float32) for _ in range(4)]
    kept = [fourfold.quantize(some) for some in weights]
    expected = [fourfold.linear(x, w, threads=1) for w in kept]

    def walk(i: int) -> None:
        for step in range(20):
            which = (i + step) % 4
            w = fourfold.quantize(weights[which], threads=1) if step % 2 else kept[which]
            np.testing.assert_array_equal(fourfold.linear(x, w, threads=1 + i), expected[which])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(walk, range(6)))


NO_THREADS = """
import ctypes
import numpy as np
import fourfold
from fourfold.errors import ResourceError
from fourfold.machine import RankPlan, read_machine
from fourfold.placement import start_team
weights, x = np.ones((4000, 640), np.float32), np.ones((3, 640), np.float32)
w = fourfold.quantize(weights, threads=1)
expected = fourfold.linear(x, w, threads=1)
fourfold.linear(x, w, threads=3)
ctypes.CDLL(None).setenv(b"NO_THREADS", b"1", 1)
for threads in (2, 3, 9, 2, 30):
    assert (fourfold.linear(x, w, threads=threads) == expected).all()
assert (fourfold.quantize(weights, threads=9).panels == w.panels).all()
cpu = read_machine().allowed_cpus[0]
try:
    start_team(read_machine(), [RankPlan(0, [cpu] * 3)])
except ResourceError as error:
    print(error)
ctypes.CDLL(None).unsetenv(b"NO_THREADS")
assert (fourfold.linear(x, w, threads=12) == expected).all()
start_team(read_machine(), [RankPlan(0, [cpu] * 3)])
"""


def test_a_product_takes_the_threads_that_there_are_and_a_team_says_that_it_lacks_some(tmp_path: Path) -> None:
    assert preload.run(NO_THREADS, tmp_path) == (
        "the system does not give this process 3 threads (Resource temporarily unavailable); "
        "ask for fewer, or raise its limit\n"
    )
