"""Step loops for tests: requests, what becomes of them, and a pool of pages of any size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from fourfold.engine import Engine
from fourfold.kvcache import PagePool
from fourfold.request import Request, Update
from fourfold.sampling import SamplingParams
from fourfold.scheduler import Limits
from fourfold.steploop import StepLoop, lookup
from fourfold.tokenizer import NoTokenizer

VOCAB = 512
IDS = np.random.default_rng(5).integers(0, VOCAB, 400).tolist()
NEVER_SHARED = Limits(prefix_cache="off")


def with_pages(engine: Engine, monkeypatch: pytest.MonkeyPatch, n_pages: int) -> None:
    """The engine has only so many pages, all of them free."""
    monkeypatch.setattr(engine, "pool", PagePool(n_pages, engine.pool.n_slots, 64))


def loop_of(engine: Engine, limits: Limits | None = None, *, speculates: bool = False) -> StepLoop:
    tokenizer = NoTokenizer(VOCAB, ())
    return StepLoop(engine, tokenizer, limits=limits, speculation=lookup() if speculates else None)


def request(n_prompt: int, n_tokens: int, start: int = 0, **options: Any) -> Request:
    grammar, scores = options.pop("grammar", None), options.pop("prompt_logprobs", False)
    prompt = tuple(IDS[start : start + n_prompt])
    return Request(prompt, SamplingParams(max_tokens=n_tokens, **options), grammar, prompt_logprobs=scores)


def finish(loop: StepLoop, steps: int = 10_000) -> list[Update]:
    """Every update until nobody is left."""
    updates = []
    while not loop.is_idle:
        updates += loop.step()
        steps -= 1
        assert steps, "the loop does not end"
    loop.check_integrity()
    return updates


def texts(loop: StepLoop, requests: Iterable[Request]) -> list[list[int]]:
    """What each is continued with, all together."""
    generations = [loop.add(r) for r in requests]
    finish(loop)
    return [g.ids[g.prompt_tokens :] for g in generations]


def alone(engine: Engine, requests: Iterable[Request], limits: Limits = NEVER_SHARED) -> list[list[int]]:
    return [texts(loop_of(engine, limits), [r])[0] for r in requests]
