"""What a step loop says of a text: scores, grammars, and what it does where something fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourfold.engine import Engine
from fourfold.errors import RuntimeFailure
from fourfold.generation import FEW_PROMPT
from fourfold.kvcache import PagePool
from fourfold.scheduler import Limits
from loops import IDS, VOCAB, alone, finish, loop_of, request, with_pages


@pytest.fixture(scope="module")
def engine(shared: Path, converted: Callable[[Path, str], Path]) -> Engine:
    return Engine(converted(shared / "golden" / "yuan-d64", "nf4"), ranks=2, sequences=12)


@pytest.fixture(autouse=True)
def a_pool_of_its_own(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with_pages(engine, monkeypatch, 60)


# ---- logprobs


def log_softmax(rows: Any) -> Any:
    rows = rows.astype(np.float64)
    return (
        rows - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True)) - rows.max(-1, keepdims=True)
    )


@pytest.mark.parametrize("n_prompt", [1, FEW_PROMPT, FEW_PROMPT + 1, 300])
def test_a_prompt_is_scored_id_by_id(shared: Path, converted: Callable[[Path, str], Path], n_prompt: int) -> None:
    engine = Engine(converted(shared / "golden" / "yuan-d64", "f32"), ranks=1)
    expected = log_softmax(engine.logits(IDS[:n_prompt]))
    for n_tokens in (0, 1, 3):
        loop = loop_of(engine, Limits(prompt_chunk=130))
        loop.add(request(n_prompt, n_tokens, prompt_logprobs=True, logprobs=2))
        first, *rest = finish(loop)
        assert [t.id for t in first.prompt_logprobs] == IDS[:n_prompt]
        assert first.prompt_logprobs[0].logprob is None
        for row, t in zip(expected, first.prompt_logprobs[1:], strict=False):
            assert t.logprob == pytest.approx(row[t.id], abs=1e-4)
            assert [i for i, _ in t.top] == np.argsort(-row)[:2].tolist()
        assert len(rest) == max(0, n_tokens - 1)
        assert first.finish == ("length" if n_tokens < 2 else None)
        if n_tokens:
            (sampled,) = first.logprobs
            assert (sampled.id, sampled.logprob) == (first.ids[0], pytest.approx(expected[-1].max(), abs=1e-4))
            assert sampled.top[0] == (sampled.id, sampled.logprob)


def test_logprobs_are_the_models_own_whatever_the_sampling(engine: Engine) -> None:
    plain, biased = request(50, 1, logprobs=1), request(50, 1, logprobs=0, logit_bias={7: 100.0}, temperature=2.0)
    loop = loop_of(engine)
    loop.add(plain)
    (first,) = finish(loop)
    loop.add(biased)
    (second,) = finish(loop)
    assert second.ids == (7,)
    assert second.logprobs[0].top == ()
    assert second.logprobs[0].logprob < first.logprobs[0].logprob  # type: ignore[operator]


# ---- grammars


class Cycle:
    """Allows one id after another."""

    def __init__(self, ids: list[int], fails_at: int = 1000) -> None:
        self.ids, self.at, self.fails_at = ids, 0, fails_at

    def mask(self) -> Any:
        allowed = np.zeros(VOCAB, np.bool_)
        allowed[self.ids[self.at % len(self.ids)]] = True
        return allowed

    def accept(self, token_id: int) -> None:
        assert token_id == self.ids[self.at % len(self.ids)]
        self.at += 1
        if self.at == self.fails_at:
            raise ValueError("no such state")


@pytest.mark.parametrize("speculates", [False, True])
def test_a_grammar_constrains_its_own_text_alone(engine: Engine, speculates: bool) -> None:
    free = request(40, 20)
    loop = loop_of(engine, speculates=speculates)
    constrained = loop.add(dataclasses.replace(free, grammar=Cycle([3, 1, 4])))
    broken = loop.add(dataclasses.replace(free, grammar=Cycle([3, 1, 4], fails_at=5)))
    other = loop.add(free)
    updates = finish(loop)
    assert constrained.ids[40:] == ([3, 1, 4] * 7)[:20]
    assert [other.ids[40:]] == alone(engine, [free])
    (last,) = [u for u in updates if u.generation is broken and u.finish]
    assert (last.finish, last.error) == ("error", "sampling failed: ValueError: no such state")
    assert last.error_kind == "failure"


# ---- failures


def test_an_interrupt_amid_a_step_loses_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request(150, 20), request(20, 20, 5)]
    expected = alone(engine, requests)
    loop, step, calls = loop_of(engine, speculates=True), engine.step, [0]

    def interrupted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        logits = step(*args, **options)
        if calls[0] % 4 == 2:
            raise KeyboardInterrupt
        return logits

    monkeypatch.setattr(engine, "step", interrupted)
    generations = [loop.add(r) for r in requests]
    while not loop.is_idle:
        try:
            loop.step()
        except KeyboardInterrupt:
            loop.check_integrity()
    assert [g.ids[g.prompt_tokens :] for g in generations] == expected


def test_leaving_amid_a_step_waits_for_its_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, step = loop_of(engine), engine.step
    going, staying = loop.add(request(20, 20)), loop.add(request(20, 20, 5))

    def leaves(*args: Any, **options: Any) -> Any:
        loop.cancel(going)
        return step(*args, **options)

    monkeypatch.setattr(engine, "step", leaves)
    loop.step()
    loop.check_integrity()
    assert engine.pool.n_held == 1
    monkeypatch.undo()
    finish(loop)
    assert len(staying.ids) == 40


def test_a_rank_that_stalls_ends_every_step(shared: Path, converted: Callable[[Path, str], Path]) -> None:
    engine = Engine(converted(shared / "golden" / "yuan-d64", "nf4"), ranks=2, timeout_seconds=0.3)
    loop = loop_of(engine)
    loop.add(request(20, 20))
    loop.step()
    engine._team.stall_next(1, 0, 1.0)
    for _ in range(2):
        with pytest.raises(RuntimeFailure):
            loop.step()


def test_memory_that_runs_out_ends_the_only_text_with_a_sentence(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = PagePool(60, 12, 64, may_touch=lambda n: pool._touched + n <= 2)
    monkeypatch.setattr(engine, "pool", pool)
    loop = loop_of(engine)
    loop.add(request(100, 100))
    last = finish(loop)[-1]
    assert (last.finish, last.error_kind) == ("error", "memory")
    assert "memory has no room" in str(last.error)
