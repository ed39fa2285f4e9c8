"""Perplexity and divergence, where the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fourfold.errors import UserError
from fourfold.evaluate import evaluate
from scripted import VOCAB, fixed_llm, scripted_llm


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity() -> None:
    result = evaluate(fixed_llm(np.zeros(VOCAB, np.float32)), text="a" * 150)
    assert result["perplexity"] == pytest.approx(VOCAB)
    assert (result["window"], result["tokens"]) == (100, 149)  # <bos> and 150 bytes in two windows


def test_divergence_from_a_reference_is_what_the_formula_says() -> None:
    p, q = np.zeros(VOCAB, np.float32), np.zeros(VOCAB, np.float32)
    p[7], q[9] = 3, 2
    prob_p, prob_q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum() for x in (p, q))
    heard: list[tuple[int, int]] = []
    result = evaluate(fixed_llm(q), ids=[7] * 41, against=fixed_llm(p), window=10, report=lambda *n: heard.append(n))
    assert result["kl_mean"] == pytest.approx(float((prob_p * np.log(prob_p / prob_q)).sum()))
    assert result["kl_max"] == pytest.approx(result["kl_mean"])
    assert result["top1_agreement"] == 0
    assert result["reference_perplexity"] == pytest.approx(1 / prob_p[7])
    assert result["nll"] == pytest.approx(-math.log(prob_q[7]))
    assert result["tokens"] == 36  # four windows of ten; the last one, of one token, predicts nothing
    assert heard[-1] == (40, 41)
    same = evaluate(fixed_llm(p), ids=[7] * 41, against=fixed_llm(p))
    assert (same["kl_mean"], same["top1_agreement"]) == (0, 1)


def test_what_cannot_be_measured_is_refused() -> None:
    llm, _ = scripted_llm("x")
    for options, message in (
        ({}, "either a text or ids"),
        ({"text": "a", "ids": [1]}, "either a text or ids"),
        ({"ids": [1]}, "nothing to predict: 1 tokens"),
        ({"ids": [0.5, 1]}, "one row of whole numbers"),
        ({"ids": [1, 2], "window": 1}, "windows of 1"),
        ({"ids": [1, 2, 3], "max_tokens": -1}, "max_tokens must be at least 2, not -1"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(llm, **options)  # type: ignore[arg-type]
