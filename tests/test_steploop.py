"""Many texts over one engine: each is what it would be alone, whoever comes and goes, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.engine import Engine
from fourfold.errors import QueueFull, UserError
from fourfold.generation import Generation
from fourfold.request import Request
from fourfold.sampling import SamplingParams
from fourfold.scheduler import Limits
from fourfold.steploop import StepLoop, lookup
from fourfold.tokenizer import NoTokenizer
from loops import IDS, NEVER_SHARED, VOCAB, alone, finish, loop_of, request, texts, with_pages

SHAPES = [
    (1, 0, 0.0),
    (5, 9, 0.8),
    (32, 0, 0.0),
    (33, 0, 0.0),
    (64, 0, 0.9),
    (65, 0, 0.0),
    (129, 0, 0.0),
    (20, 100, 0.0),
]
SHAPES += [(200, 50, 0.0), (300, 0, 0.0), (128, 0, 1.0), (90, 7, 0.0)]
MIXED = [request(n, 30, start, temperature=heat, seed=3) for n, start, heat in SHAPES]


@pytest.fixture(scope="module")
def engine(shared: Path, converted: Callable[[Path, str], Path]) -> Engine:
    return Engine(converted(shared / "golden" / "yuan-d64", "nf4"), ranks=2, sequences=12)


@pytest.fixture(scope="module")
def expected(engine: Engine) -> dict[Request, list[int]]:
    """What each of MIXED is continued with where it is alone."""
    return dict(zip(MIXED, alone(engine, MIXED), strict=True))


@pytest.fixture(autouse=True)
def a_pool_of_its_own(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with_pages(engine, monkeypatch, 60)


# ---- the same text in any company


@pytest.mark.parametrize("speculates", [False, True])
@pytest.mark.parametrize("prefix_cache", ["off", "prompts", "all"])
def test_a_text_is_the_same_alone_and_among_others(
    engine: Engine, expected: dict[Request, list[int]], prefix_cache: Any, speculates: bool
) -> None:
    loop = loop_of(engine, Limits(prefix_cache=prefix_cache, prompt_chunk=100), speculates=speculates)
    assert texts(loop, MIXED) == [*expected.values()]
    stats = loop.stats()
    assert (stats.tokens_reused > 0) == (prefix_cache != "off")
    assert (stats.accepted > 0) == speculates
    assert stats.tokens_generated == 30 * len(MIXED)
    assert texts(loop, MIXED[::-1]) == [*expected.values()][::-1]  # from what is kept of the first time


def test_texts_that_lose_their_pages_go_on_as_if_nothing_had_been(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(n, 150, n) for n in (40, 60, 100, 20, 80)]
    expected = alone(engine, requests)
    with_pages(engine, monkeypatch, 8)
    for limits in (NEVER_SHARED, Limits(prefix_cache="prompts")):
        loop = loop_of(engine, limits, speculates=True)
        assert texts(loop, requests) == expected
        assert loop.stats().preemptions > 0


@given(st.data())
@settings(max_examples=25)
def test_whoever_comes_and_goes_the_rest_are_undisturbed(
    engine: Engine, expected: dict[Request, list[int]], data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        with_pages(engine, patch, data.draw(st.sampled_from([7, 12, 40])))
        limits = Limits(max_running=data.draw(st.integers(1, 6)), prompt_chunk=70, prefix_cache="prompts")
        loop = loop_of(engine, limits, speculates=data.draw(st.booleans()))
        live: list[Generation] = []
        for _ in range(data.draw(st.integers(1, 60))):
            action = data.draw(st.sampled_from(["add", "step", "step", "step", "cancel"]))
            if action == "add":
                live.append(loop.add(data.draw(st.sampled_from(MIXED))))
            elif action == "step":
                loop.step()
            elif live:
                loop.cancel(live.pop(data.draw(st.integers(0, len(live) - 1))))
            loop.check_integrity()
        finish(loop)
        for g in live:
            assert g.ids[g.prompt_tokens :] == expected[g.request]
        assert engine.pool.n_held == 0


def test_smollm2_says_the_same_alone_and_among_31_others(smollm2: Path, converted: Callable[[Path, str], Path]) -> None:
    engine = Engine(converted(smollm2, "nf4"), sequences=32)
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 49152, int(n)).tolist()) for n in rng.integers(1, 90, 32)]  # of one page or two
    requests = [Request(prompt, SamplingParams(max_tokens=8)) for prompt in prompts]

    def answers(several: list[Request]) -> list[list[int]]:
        loop = StepLoop(engine, NoTokenizer(49152, ()), speculation=lookup())
        return texts(loop, several)

    together = answers(requests)
    engine.pool.forget()
    for i in (0, 7, 13, 31):
        assert answers([requests[i]]) == [together[i]]


def test_drafts_change_no_text_that_is_sampled(engine: Engine) -> None:
    hot = [request(60, 80, i, temperature=0.4, top_p=0.9, seed=i, frequency_penalty=0.3) for i in range(6)]
    assert texts(loop_of(engine, speculates=True), hot) == alone(engine, hot)


# ---- shared beginnings


def test_a_beginning_is_computed_once_for_all_who_come_at_once(engine: Engine) -> None:
    loop = loop_of(engine)
    generations = [loop.add(request(200, 5, seed=i, temperature=1.0)) for i in range(8)]
    finish(loop)
    assert [g.cached_tokens for g in generations] == [0] + [192] * 7
    assert loop.stats().tokens_prompt == 200 + 7 * 8
    assert loop.stats().tokens_reused == 7 * 192


@pytest.mark.parametrize("prefix_cache", ["off", "prompts", "all"])
def test_a_prompt_that_is_computed_again_counts_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, prefix_cache: Any
) -> None:
    with_pages(engine, monkeypatch, 9)
    loop = loop_of(engine, Limits(prefix_cache=prefix_cache, prompt_chunk=64))
    generations = [loop.add(request(n, 150, i)) for i, n in enumerate((40, 300, 20))]
    for _ in range(4):
        loop.step()
    amid_its_prompt = generations[1]
    assert 0 < amid_its_prompt.computed < 300
    loop._scheduler.preempt(amid_its_prompt)
    finish(loop)
    stats = loop.stats()
    assert stats.preemptions > 1  # answers, too
    assert stats.tokens_prompt == 360
    assert stats.tokens_reused == 0  # what it had computed itself was no other's
    assert [g.cached_tokens for g in generations] == [0, 0, 0]


def test_the_next_turn_of_a_chat_goes_on_from_the_last(engine: Engine) -> None:
    loop = loop_of(engine)
    first = loop.add(request(100, 60))
    finish(loop)
    turn = Request((*first.ids, *IDS[:30]), SamplingParams(max_tokens=3))
    second = loop.add(turn)
    finish(loop)
    assert second.cached_tokens == 128  # the answer's full page among them; its last id was never fed
    loop = loop_of(engine, Limits(prefix_cache="prompts"))
    engine.pool.forget()
    first = loop.add(request(100, 60))
    finish(loop)
    second = loop.add(turn)
    finish(loop)
    assert second.cached_tokens == 64  # the prompt's alone


# ---- turns


def test_a_long_prompt_does_not_stop_the_others(engine: Engine) -> None:
    loop = loop_of(engine, Limits(stall_seconds=1e-6))
    talking = [loop.add(request(10, 200, i)) for i in range(3)]
    while any(not g.completion_tokens for g in talking):
        loop.step()
    loop.add(request(400, 1))
    loop.step()
    long = loop.add(request(390, 1, 5))
    silent = 0
    while not long.completion_tokens:
        heard = {u.generation for u in loop.step()}
        silent = 0 if heard >= set(talking) else silent + 1
        assert silent < 2
    steps = -(-400 // 64) + -(-390 // 64)
    assert loop.stats().steps >= steps, "the chunk was to be as small as it may"


def test_nobody_overtakes(engine: Engine) -> None:
    loop = loop_of(engine, Limits(max_running=2))
    generations = [loop.add(request(5, n, n)) for n in (9, 3, 4, 5, 2)]
    begun: list[Generation] = []
    while not loop.is_idle:
        begun += [u.generation for u in loop.step() if u.generation not in begun]
    assert begun == generations


def test_a_text_that_needs_all_pages_gets_them_in_its_turn(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with_pages(engine, monkeypatch, 6)
    loop = loop_of(engine, NEVER_SHARED)
    small = [loop.add(request(60, 60, i)) for i in range(2)]
    large = loop.add(request(380, 3))
    later = loop.add(request(60, 5))
    order = [u.generation for u in finish(loop) if u.finish]
    assert order == [*small, large, later]


def test_the_queue_has_an_end(engine: Engine) -> None:
    loop = loop_of(engine, Limits(max_running=2, max_waiting=1))
    for _ in range(3):
        last = loop.add(request(5, 2))
    with pytest.raises(QueueFull, match="try again later"):
        loop.add(request(5, 2))
    loop.cancel(last)
    loop.add(request(5, 2))
    finish(loop)


def test_waiting_has_an_end(engine: Engine) -> None:
    loop = loop_of(engine, Limits(max_running=1, max_wait_seconds=0.0))
    first = loop.add(request(5, 300))
    loop._added[first] += 1000
    loop.step()
    second = loop.add(request(5, 2))
    (update,) = [u for u in loop.step() if u.generation is second]
    assert (update.finish, update.error) == ("error", "no room was found for the request in 0 s")
    assert update.error_kind == "waited"
    assert {u.finish for u in finish(loop)} == {None, "length"}


def test_whoever_has_waited_too_long_is_not_taken_after_all(engine: Engine) -> None:
    loop = loop_of(engine, Limits(max_running=1, max_wait_seconds=100.0))
    late = loop.add(request(5, 2))
    loop._added[late] -= 1000  # and there is a place
    (update,) = finish(loop)
    assert (update.generation, update.finish, update.ids) == (late, "error", ())


def test_a_text_that_gave_way_does_not_expire(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with_pages(engine, monkeypatch, 6)
    loop = loop_of(engine, Limits(max_wait_seconds=1000.0, prefix_cache="off"))
    generations = [loop.add(request(30, 180, i)) for i in range(3)]
    for _ in range(20):
        loop.step()
    for g in generations:
        loop._added[g] -= 10_000
    assert {u.finish for u in finish(loop)} == {None, "length"}
    assert loop.stats().preemptions > 0


def test_an_answers_positions_are_never_anothers_prompt(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only prompts are shared: what a text computes again after giving way is computed by the same kernels."""
    first, third = request(100, 200), request(60, 180, 9)
    (answer,) = alone(engine, [first])
    branch = Request((*first.prompt, *answer[:110]), SamplingParams(max_tokens=150))
    expected = alone(engine, [branch, first, third])
    for n_pages in (9, 11):
        with_pages(engine, monkeypatch, n_pages)
        loop = loop_of(engine, Limits(prefix_cache="prompts"))
        assert texts(loop, [branch, first, third]) == expected
        assert loop.stats().preemptions > 0
    going_on = Generation(first, NoTokenizer(VOCAB, ()), 512)
    going_on.ids += answer
    assert len(loop._scheduler._shareable(going_on)) == 100 // 64


def test_more_texts_than_a_step_has_rows_for_are_refused() -> None:
    for n in (0, 257):
        with pytest.raises(UserError, match=f"max_running must be from 1 to 256, not {n}"):
            Limits(max_running=n)
    with pytest.raises(UserError, match="prefix_cache must be one of all, prompts, off, not 'none'"):
        Limits(prefix_cache="none")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [((), "the prompt is empty"), ((512,), "are not all the model's"), ((1,) * 513, "513 tokens but the context only")],
)
def test_what_could_never_run_is_refused(engine: Engine, prompt: tuple[int, ...], message: str) -> None:
    loop = loop_of(engine)
    with pytest.raises(UserError, match=message):
        loop.add(Request(prompt))
    assert loop.is_idle
    assert loop.step() == []
