"""Threads that work in lock-step: the same bits every time, on their own CPUs, and never a hang."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import fourfold._core as _core
import numpy as np
import pytest

from chain import Chain, make_team

SIZES = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (4, 2)]  # ranks, threads of each


def numbers(*shape: int) -> Any:
    return np.random.default_rng(shape).standard_normal(shape, dtype=np.float32)


def chain(team: Any) -> Chain:
    cut = [[(64 * rank, 64 * rank + 64)] for rank in range(team.n_ranks)]
    cut[-1] = [(64 * team.n_ranks - 64, 320)]
    return Chain(team, numbers(20, 100), numbers(320, 100), numbers(48, 320), cut)


@pytest.mark.parametrize(("n_ranks", "n_threads"), [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_a_thread_that_stalls_is_named_and_the_team_gives_up(n_ranks: int, n_threads: int) -> None:
    for rank, thread in ((0, 0), (n_ranks - 1, n_threads - 1)):
        work = chain(team := make_team(n_ranks, n_threads, timeout=0.5))
        work.step()
        team.stall_next(rank, thread, 3)
        start = time.monotonic()
        with pytest.raises(_core.StallError, match=f"^rank {rank}, thread {thread} did not arrive within .* s; the st"):
            work.step()
        assert time.monotonic() - start < 2.5
        start = time.monotonic()
        for _ in range(3):
            with pytest.raises(_core.StallError, match="the team is broken by an earlier failure; load the model"):
                work.step()
        del work, team  # nobody waits for the sleeper
        assert time.monotonic() - start < 1


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


def _threads() -> dict[str, str]:
    """CPUs that each thread of this process may run on, by thread id."""
    lists = {}
    for status in Path("/proc/self/task").glob("*/status"):
        fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
        lists[status.parent.name] = fields["Cpus_allowed_list"]
    return lists


@pytest.mark.parametrize(("n_ranks", "n_threads"), [(1, 2), (2, 1), (3, 2)])
def test_every_thread_is_pinned_to_its_cpu_and_ends_with_its_team(n_ranks: int, n_threads: int) -> None:
    cpus = sorted(cpu for node in _core.read_machine().usable_cpus() for cpu in node)
    before = _threads()
    work = chain(make_team(n_ranks, n_threads))
    work.step()
    ours = [allowed for thread, allowed in _threads().items() if thread not in before]
    assert sorted(ours) == sorted(str(cpus[i % len(cpus)]) for i in range(n_ranks * n_threads))
    del work
    assert set(_threads()) <= set(before)


@pytest.mark.parametrize(("ranks", "message"), [([], "at least one rank"), ([(-1, [])], "at least one CPU")])
def test_a_team_without_threads_is_refused(ranks: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.Team(ranks, 60.0)
