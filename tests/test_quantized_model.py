"""Whole models in 4 bits: the same words for every cut, and kernels that lose nothing worth mentioning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold.config import FORMATS
from fourfold.engine import Engine
from fourfold.llm import LLM
from fourfold.sampling import SamplingParams, make_sampler

Converted = Callable[[Path, str], Path]
needs_avx512 = pytest.mark.skipif("avx512" not in _core.read_machine().isas(), reason="the kernels need avx512")


def greedy(engine: Engine, prompt: list[int], n: int) -> list[int]:
    sequence, out = engine.new_sequence(), []
    fresh = prompt
    for _ in range(n):
        fresh = [int(engine.extend(sequence, fresh).argmax())]
        out += fresh
    engine.free(sequence)
    return out


# ---- SmolLM2


def test_what_is_the_capital_of_france(smollm2: Path, converted: Converted) -> None:
    with LLM(converted(smollm2, "nf4")) as llm:
        answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}])
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"


def test_greedy_words_are_the_same_for_every_number_of_ranks_and_on_every_run(
    shared: Path, smollm2: Path, converted: Converted
) -> None:
    prompts = json.loads((shared / "smollm2" / "ref_gen.json").read_text())
    words: dict[int, Any] = {}
    for ranks in (1, 2, 3, 4):
        engine = Engine(converted(smollm2, "nf4"), ranks=ranks)
        words[ranks] = [greedy(engine, prompts[f"{kind}_prompt_ids"], 64) for kind in ("chat", "plain")]
        assert greedy(engine, prompts["plain_prompt_ids"], 64) == words[ranks][1]
        engine.close()
    assert words[2] == words[3] == words[4] == words[1]


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_same_prompt_has_the_same_logits_bit_by_bit(smollm2: Path, converted: Converted, ranks: int) -> None:
    ids = list(range(1000, 1040))
    first = Engine(converted(smollm2, "nf4"), ranks=ranks).logits(ids)
    assert (Engine(converted(smollm2, "nf4"), ranks=ranks).logits(ids) == first).all()


# ---- stories15M: what 4 bits lose, and what kernels and caches add to that


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Mean KL(p || q) a token, in nats."""
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


class Stories:
    """Two stories by the model itself in float32, and what it thought at every token of them."""

    def __init__(self, source: Path, converted: Converted) -> None:
        self._directory = lambda fmt: converted(source, fmt)
        engine = Engine(self._directory("f32"))
        self.texts = [self._tell(engine, seed) for seed in (0, 1)]
        self.exact = np.concatenate([log_softmax(engine.logits(text)) for text in self.texts])

    def _tell(self, engine: Engine, seed: int) -> list[int]:
        sampler = make_sampler(SamplingParams(temperature=1.0, seed=seed))
        sequence, ids = engine.new_sequence(), [1]
        while len(ids) < 256:
            ids.append(sampler(engine.extend(sequence, ids[sequence.length :]), ids))
        engine.free(sequence)
        return ids

    def read(self, fmt: str, **options: Any) -> NDArray[np.float64]:
        engine = Engine(self._directory(fmt), **options)
        return np.concatenate([log_softmax(engine.logits(text)) for text in self.texts])


@pytest.fixture(scope="module")
def stories(shared: Path, converted: Converted) -> Stories:
    return Stories(shared / "stories15M", converted)


@needs_avx512
@pytest.mark.parametrize("kernel", ["", "linear_nf4_i16_avx512", "linear_nf4_bf16_avx512", "linear_nf4_u8_avx512"])
def test_a_fast_kernel_adds_less_than_a_fiftieth_to_what_4_bits_lose(stories: Stories, kernel: str) -> None:
    exact = stories.read("nf4", kernel="linear_nf4_f32_avx512", kv="f32")
    fast = stories.read("nf4", kernel=kernel, kv="f32")
    lost = divergence(stories.exact, exact)
    assert divergence(stories.exact, fast) < 1.02 * lost
    assert divergence(exact, fast) < 0.02 * lost
    assert not np.array_equal(exact, fast), "the kernel was not used"


@pytest.mark.parametrize(("kv", "most"), [("bf16", 1e-4), ("int8", 1e-3)])
def test_a_smaller_cache_hardly_matters(stories: Stories, kv: str, most: float) -> None:
    assert 0 < divergence(stories.exact, stories.read("f32", kv=kv)) < most


def test_formats_lose_what_their_bits_allow(stories: Stories) -> None:
    lost = {fmt: divergence(stories.exact, stories.read(fmt)) for fmt in FORMATS}
    assert lost["f32"] == 0
    assert lost["bf16"] < 2e-4
    assert lost["int8"] < 1e-3
    assert lost["nf4"] < 0.15
    assert lost["nf4"] < min(lost["int4"], lost["fp4"])
    assert lost["uint4"] < lost["int4"]
