"""Threads that work in lock-step: the same bits every time, on their own CPUs, and never a hang."""

from __future__ import annotations

import ctypes
import ctypes.util
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fourfold._core as _core
import preload
from chain import Chain, make_team
from threads import allowed_cpus, eventually, once_in_time

SIZES = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (4, 2)]  # ranks, threads of each


def numbers(*shape: int) -> Any:
    return np.random.default_rng(shape).standard_normal(shape, dtype=np.float32)


def chain(team: Any) -> Chain:
    cut = [[(64 * rank, 64 * rank + 64)] for rank in range(team.n_ranks)]
    cut[-1] = [(64 * team.n_ranks - 64, 320)]
    return Chain(team, numbers(20, 100), numbers(320, 100), numbers(48, 320), cut)


@pytest.mark.parametrize(("n_ranks", "n_threads"), [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_a_thread_that_stalls_is_named_and_the_team_gives_up(n_ranks: int, n_threads: int) -> None:
    # The first thread of all is the caller, who is told when it goes on; by then the others know.
    for rank, thread, seconds, told_after in ((0, 0, 4, 6), (n_ranks - 1, n_threads - 1, 3, 2.5)):
        assert once_in_time(partial(_gives_up, n_ranks, n_threads, rank, thread, seconds, told_after))


def _gives_up(n_ranks: int, n_threads: int, rank: int, thread: int, seconds: float, told_after: float) -> bool:
    """Whether it does so in time, of a thread that sleeps for so long."""
    work = chain(team := make_team(n_ranks, n_threads, timeout=0.5))
    work.step()
    team.stall_next(rank, thread, seconds)
    start = time.monotonic()
    with pytest.raises(_core.StallError, match=f"^rank {rank}, thread {thread} did not arrive within .* s; the st"):
        work.step()
    told = time.monotonic() - start
    start = time.monotonic()
    for _ in range(3):
        with pytest.raises(_core.StallError, match="the team is broken by an earlier failure; load the model"):
            work.step()
    del work, team  # nobody waits for the sleeper
    return told < told_after and time.monotonic() - start < 1


@pytest.mark.parametrize(("n_ranks", "n_threads"), SIZES)
def test_a_step_gives_the_same_bits_every_time(n_ranks: int, n_threads: int) -> None:
    work = chain(make_team(n_ranks, n_threads))
    first = work.step()
    exact = numbers(20, 100).astype(float) @ numbers(320, 100).astype(float).T @ numbers(48, 320).astype(float).T
    np.testing.assert_allclose(first, exact, atol=1e-3)
    for _ in range(50):
        assert (work.step() == first).all()
    again = chain(make_team(n_ranks, 3 - n_threads))  # the number of threads changes nothing either
    assert (again.step() == first).all()


BUSY = "import os, sys; os.sched_setaffinity(0, [int(sys.argv[1])])\nprint(flush=True)\nwhile True: pass"


def test_a_stall_is_found_in_its_time_where_others_want_the_cpu_too() -> None:
    cpus = sorted(cpu for node in _core.read_machine().usable_cpus() for cpu in node)

    def is_found() -> bool:
        work = chain(team := make_team(2, 1, timeout=0.3))
        work.step()
        team.stall_next(1, 0, 8)
        start = time.monotonic()
        with pytest.raises(_core.StallError, match=r"^rank 1, thread 0 did not arrive within"):
            work.step()
        return time.monotonic() - start < 4

    command = [sys.executable, "-c", BUSY, str(cpus[0])]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(10)]
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.read(1)
        assert once_in_time(is_found)
    finally:
        for other in others:
            other.kill()
            other.communicate()


LATE = """
import time
import fourfold._core as _core
from chain import make_team
from test_team import chain

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(1.5)

slow = Slow()  # the interpreter is still ending when the sleeper wakes up
work = chain(team := make_team(2, timeout=0.2))
work.step()
team.stall_next(1, 0, 1)
try:
    work.step()
except _core.StallError:
    del work, team
"""


def test_a_thread_that_wakes_up_while_the_process_ends_does_no_harm() -> None:
    ended = subprocess.run([sys.executable, "-c", LATE], cwd=Path(__file__).parent, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, b"")


FORK = """
import os, sys, threading
import fourfold._core as _core
from chain import make_team
from test_team import chain

work = chain(team := make_team(2, 2))
first = work.step()
if sys.argv[1] == "amid a step":
    team.stall_next(1, 1, 2)
    stepping = threading.Thread(target=work.step)
    stepping.start()
    stepping.join(0.5)  # it holds what callers take turns with
if child := os.fork():
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(status if (work.step() == first).all() else "the parent's team is not what it was")
try:
    work.step()
except _core.StallError as error:
    print(error, flush=True)
del work, team
os._exit(0)
"""


@pytest.mark.parametrize("when", ["between steps", "amid a step"])
def test_a_forked_process_is_told_that_it_has_no_team(when: str) -> None:
    """At once: it waits neither for threads that are not there, nor for a turn that one of them would have to end."""
    command = [sys.executable, "-c", FORK, when]
    ended = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("this process was forked from the one that has the model's threads; load the model")


def test_a_short_delay_is_not_a_stall() -> None:
    work = chain(team := make_team(2, 2))
    first = work.step()
    for rank, thread in ((0, 0), (0, 1), (1, 0), (1, 1)):
        team.stall_next(rank, thread, 0.05)
        assert (work.step() == first).all()


def test_an_idle_team_uses_no_cpu() -> None:
    work = chain(make_team(2, 2))
    work.step()
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(1)
    assert time.process_time() - before < 0.1
    work.step()  # and wakes up again


@pytest.mark.parametrize(("n_ranks", "n_threads"), [(1, 2), (2, 1), (3, 2)])
def test_every_thread_is_pinned_to_its_cpu_and_ends_with_its_team(n_ranks: int, n_threads: int) -> None:
    cpus = sorted(cpu for node in _core.read_machine().usable_cpus() for cpu in node)
    before = allowed_cpus()
    work = chain(make_team(n_ranks, n_threads))
    work.step()
    ours = [allowed for thread, allowed in allowed_cpus().items() if thread not in before]
    # The first of all is the caller.
    assert sorted(ours) == sorted(str(cpus[i % len(cpus)]) for i in range(1, n_ranks * n_threads))
    del work
    assert eventually(lambda: set(allowed_cpus()) <= set(before))


MANY_CPUS = """
import ctypes
import numpy as np
from fourfold import _core

ctypes.CDLL(None).setenv(b"MANY_CPUS", b"1", 1)
team = _core.Team([(-1, [1500, 1500])], 60.0)
weight = _core.make_weight("f32", 16, 64, [([(0, 16)], [(0, 64)])], team)
weight.load(team, np.zeros((1, 4096), np.uint8), None)
_core.measure_peak([1500, 1500], _core.peak_kinds()[-1], 1)
"""


def test_a_machine_may_have_more_than_1024_cpus(tmp_path: Path) -> None:
    """A team's thread and its caller are bound to one of those, and so are two that measure."""
    assert preload.run(MANY_CPUS, tmp_path) == "bound\n" * 4


def test_the_caller_works_on_the_first_cpu_and_is_free_again_afterwards() -> None:
    cpus = sorted(cpu for node in _core.read_machine().usable_cpus() for cpu in node)
    work = chain(team := make_team(1, 2))
    work.step()
    caller: list[str] = []

    def step() -> None:
        caller.append(str(threading.get_native_id()))
        work.step()
        caller.append(allowed_cpus()[caller[0]])

    before = allowed_cpus()
    team.stall_next(0, 1, 0.5)  # the caller waits for it at a barrier
    (thread := threading.Thread(target=step)).start()
    assert eventually(lambda: allowed_cpus().get(caller[0] if caller else "") == str(cpus[0]))
    thread.join()
    assert caller[1] == before[str(threading.get_native_id())]


def test_the_caller_computes_as_every_thread_does() -> None:
    """Whatever its own mode of rounding, which it has again afterwards."""
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    fegetround, fesetround = library.fegetround, library.fesetround
    work = chain(make_team(1, 1))
    expected = work.step()
    upward = 0x800
    assert fesetround(upward) == 0
    try:
        result = work.step()
        mode = fegetround()
    finally:
        fesetround(0)
    assert mode == upward
    assert (result == expected).all()


@pytest.mark.parametrize(("ranks", "message"), [([], "1 to 64 ranks"), ([(-1, [])], "at least one CPU")])
def test_a_team_without_threads_is_refused(ranks: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.Team(ranks, 60.0)
