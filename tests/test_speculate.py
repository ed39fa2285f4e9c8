"""Drafting: what is proposed, how much of it pays, and a small model that follows texts that turn out otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.draft import DraftModel, check_same_tokenizer
from fourfold.engine import MOST_BACK, Engine, Feed
from fourfold.errors import UserError
from fourfold.generation import Generation
from fourfold.kvcache import PagePool
from fourfold.request import Request
from fourfold.sampling import SamplingParams
from fourfold.scheduler import Limits
from fourfold.speculate import PromptLookup, Speculation, StepCost
from fourfold.steploop import StepLoop, lookup, speculation
from fourfold.tokenizer import NoTokenizer, Tokenizer
from scripted import byte_tokenizer

IDS = NoTokenizer(512, ())


def text(ids: Sequence[int]) -> Generation:
    return Generation(Request(tuple(ids)), IDS, 10_000)


# ---- look-up


def test_what_followed_the_last_ids_before_is_proposed() -> None:
    proposer, g = PromptLookup(), text([1, 2, 3, 4, 5, 6, 9, 1, 2, 3])
    assert proposer.propose([g], [4]) == [[4, 5, 6, 9]]
    assert proposer.propose([g], [2]) == [[4, 5]]
    assert proposer.propose([g], [0]) == [[]]
    g.ids += [4, 5]
    assert proposer.propose([g], [3]) == [[6, 9, 1]]
    g.ids += [8]
    assert proposer.propose([g], [3]) == [[]]
    assert proposer.propose([text([1, 2])], [3]) == [[]]


def test_of_several_places_the_one_that_agrees_longest_is_taken_and_of_those_the_last() -> None:
    g = text([7, 1, 2, 3, 4, 0, 8, 1, 2, 3, 5, 0, 6, 1, 2, 3, 6, 0, 7, 1, 2, 3])
    assert PromptLookup().propose([g], [1]) == [[4]]
    g = text([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 9, 1, 2, 3])
    assert PromptLookup().propose([g], [1]) == [[5]]


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 15))
def test_a_proposal_is_always_what_stood_there(ids: list[int], most: int) -> None:
    g, proposer = text([0]), PromptLookup()
    for i in ids:
        g.ids.append(i)
        (found,) = proposer.propose([g], [most])
        assert len(found) <= most
        n = PromptLookup.N
        places = range(n, len(g.ids))
        followed = [g.ids[at : at + most] for at in places if g.ids[at - n : at] == g.ids[-n:]]
        assert (found in followed) if followed else found == []


def test_a_text_that_has_ended_is_forgotten() -> None:
    proposer, g = PromptLookup(), text([1, 2, 3] * 5)
    drafts = Speculation(proposer, 4)
    drafts.draft([g], [4], 1, 100)
    drafts.learn(g, 4, 2)
    drafts.forget(g)
    assert not proposer._places
    assert not proposer._indexed
    assert not drafts._records


# ---- how much


def test_the_cost_of_a_step_is_what_was_measured_and_straight_lines_between() -> None:
    cost = StepCost()
    assert cost.seconds(np.array(3)) == pytest.approx(1.5)
    cost.observe(2, 10.0)
    assert cost.seconds(np.array(2)) == 10.0
    assert cost.seconds(np.array(6)) == pytest.approx(10 + 4 * 0.25 * 8)
    assert cost.seconds(np.array(1)) == pytest.approx(8)
    cost.observe(6, 30.0)
    assert cost.seconds(np.array(3)) == pytest.approx(15)
    assert cost.seconds(np.array(7)) > 30
    cost.observe(6, 20.0)
    assert 20 < cost.seconds(np.array(6)) < 30


def test_a_cost_that_was_not_measured_for_long_is_forgotten() -> None:
    cost = StepCost()
    cost.observe(4, 100.0)  # the machine was busy
    for _ in range(StepCost.MEMORY + 1):
        cost.observe(1, 1.0)
    assert cost.seconds(np.array(4)) < 2


def counts(acceptances: list[float], *, row: float = 0.1, room: int = 15, seconds: Sequence[float] = ()) -> list[int]:
    """Drafts for texts of these acceptances. A step costs 1 and `row` for each row, or `seconds` by rows."""
    cost = StepCost()
    for rows, measured in enumerate(seconds or [1 + row * rows for rows in range(1, 100)], 1):
        cost.observe(rows, measured)
    drafts = Speculation(PromptLookup(), 15, cost)
    texts = [text([1]) for _ in acceptances]
    for g, acceptance in zip(texts, acceptances, strict=True):
        drafts._record(g).acceptance = acceptance
    return drafts._counts(texts, [room] * len(texts), len(texts), 500)


def test_blocks_of_rows_are_filled() -> None:
    by_blocks = [1.0, 1.0, 1.6, 1.6, 2.3, 2.5, 2.7, 3.0]  # as kernels for 2, 4 and 8 rows have it
    assert counts([0.3], seconds=by_blocks, room=7) == [1]
    assert counts([0.8], seconds=by_blocks, room=7) == [3]
    assert counts([0.97], seconds=by_blocks, room=7) == [7]
    assert counts([0.97], seconds=by_blocks, room=2) == [1]


def test_cheap_rows_and_sure_texts_are_drafted_far_dear_rows_and_wild_texts_not() -> None:
    assert counts([0.95], row=0.01) == [15]
    assert counts([0.95], row=0.01, room=3) == [3]
    assert counts([0.1], row=0.2) == [0]
    assert counts([0.5], row=1.0) == [0]  # two rows take as long as two steps
    (some,) = counts([0.7], row=0.1)
    assert 1 <= some <= 8
    sure, wild = counts([0.9, 0.2], row=0.1)
    assert sure > wild


def test_a_full_step_leaves_less_to_gain() -> None:
    assert counts([0.8] * 32, row=0.2) == [0] * 32  # its rows cost more than what they share
    assert sum(counts([0.8] * 2, row=0.2)) > 0


@pytest.mark.parametrize("row", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("acceptance", [0.1, 0.4, 0.8, 0.97])
def test_the_count_is_the_best_there_is(row: float, acceptance: float) -> None:
    def rate(n: int) -> float:
        return sum(acceptance**i for i in range(n + 1)) / (1 + row * (n + 1))

    (found,) = counts([acceptance], row=row)
    assert rate(found) >= 0.995 * max(rate(n) for n in range(16))


def test_a_text_that_refuses_drafts_is_left_alone_ever_longer_and_tried_again() -> None:
    drafts, g = Speculation(PromptLookup(), 4), text([1, 2, 3] * 10)
    for rows in range(1, 6):
        drafts.observe(rows, 1 + 0.8 * rows)
    attempts = []
    for step in range(600):
        (ids,) = drafts.draft([g], [4], 1, 100)
        if ids:
            attempts.append(step)
            drafts.learn(g, len(ids), 0)
    gaps = np.diff(attempts[-4:])
    assert len(attempts) < 20
    assert (gaps >= 64).all()
    for _ in range(4):
        drafts.learn(g, 4, 4)
    assert drafts.draft([g], [4], 1, 100)[0]


# ---- a small model


@pytest.fixture(scope="module")
def large(shared: Path, converted: Callable[[Path, str], Path]) -> Engine:
    return Engine(converted(shared / "golden" / "yuan-d64", "f32"), ranks=2, sequences=6)


@pytest.fixture(scope="module")
def small(shared: Path, converted: Callable[[Path, str], Path], large: Engine) -> Engine:
    """The same model, quantized: often right, and often not."""
    return Engine(converted(shared / "golden" / "yuan-d64", "nf4"), beside=large, sequences=6)


PROMPTS = [tuple(np.random.default_rng(n).integers(0, 512, n).tolist()) for n in (1, 20, 70, 300, 64)]


def answers(loop: StepLoop, **options: float) -> list[list[int]]:
    texts = [loop.add(Request(p, SamplingParams(max_tokens=60, seed=1, **options))) for p in PROMPTS]  # type: ignore[arg-type]
    while not loop.is_idle:
        loop.step()
    loop.check_integrity()
    return [g.ids for g in texts]


class Eager(Speculation):
    """Drafts up to six ids, whatever came of it before."""

    def _counts(self, texts: Sequence[Generation], room: Sequence[int], n_rows: int, most_rows: int) -> list[int]:
        return [min(1 + len(g.ids) % 6, n) for g, n in zip(texts, room, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 20.0])
def test_a_small_model_changes_no_text(large: Engine, small: Engine, temperature: float) -> None:
    large.pool.forget()
    expected = answers(StepLoop(large, IDS), temperature=temperature)
    for drafts in (Eager, Speculation):
        large.pool.forget()
        helper = DraftModel.of(small, IDS, IDS)
        loop = StepLoop(large, IDS, limits=Limits(max_running=4), speculation=drafts(helper, MOST_BACK))
        assert answers(loop, temperature=temperature) == expected
        stats = loop.stats()
        assert stats.drafted > 0
        assert temperature == 0 or stats.accepted < stats.drafted
        assert helper.row_seconds() > 0
        assert small.pool.n_held == 0
        small.check_integrity()


def test_a_small_model_that_is_the_same_model_is_always_right(
    shared: Path, converted: Callable[[Path, str], Path], large: Engine
) -> None:
    twin = Engine(converted(shared / "golden" / "yuan-d64", "f32"), beside=large)
    loop = StepLoop(large, IDS, speculation=speculation(DraftModel.of(twin, IDS, IDS)))
    answers(loop)
    stats = loop.stats()
    assert stats.accepted >= 0.95 * stats.drafted > 0  # prompts of over 32 ids go through other kernels in the cache


def test_a_small_model_without_room_is_no_help_and_no_harm(
    large: Engine, small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    large.pool.forget()
    expected = answers(StepLoop(large, IDS))
    for pool in (PagePool(3, 6, 64), PagePool(60, 1, 64)):
        monkeypatch.setattr(small, "pool", pool)
        large.pool.forget()
        assert answers(StepLoop(large, IDS, speculation=speculation(DraftModel.of(small, IDS, IDS)))) == expected
        pool.check_integrity()
        assert pool.n_held == 0


def test_a_small_model_without_room_does_not_read_in_vain(
    large: Engine, small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "pool", PagePool(10, 6, 64))
    fed, step = [0], small.step

    def counted(feeds: Sequence[Feed], **options: Any) -> Any:
        fed[0] += sum(len(feed.ids) for feed in feeds)
        return step(feeds, **options)

    monkeypatch.setattr(small, "step", counted)
    large.pool.forget()
    loop = StepLoop(large, IDS, speculation=Eager(DraftModel.of(small, IDS, IDS), MOST_BACK))
    answers(loop)
    assert loop.stats().drafted > 0
    assert fed[0] < 3 * sum(len(p) + 60 for p in PROMPTS)


def test_models_of_two_tokenizers_are_refused(shared: Path) -> None:
    llama = Tokenizer.from_directory(shared / "stories15M")
    check_same_tokenizer(llama, llama)
    with pytest.raises(UserError, match="the draft model has another tokenizer"):
        check_same_tokenizer(llama, byte_tokenizer())
    with pytest.raises(UserError, match="only be helped by one that has none"):
        check_same_tokenizer(llama, IDS)
    check_same_tokenizer(IDS, IDS)


def test_lookup_drafts_as_far_as_an_engine_goes_back() -> None:
    assert lookup()._most == MOST_BACK
