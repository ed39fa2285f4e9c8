"""How good a model is at a text: perplexity, and how far it is from another model that should say the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fourfold.errors import UserError

if TYPE_CHECKING:
    from fourfold.llm import LLM

WINDOW = 512  # tokens: enough that most are predicted from a real context; 135,040 logits of each are 277 MB
ROWS = 32  # positions compared at once, in float64: 35 MB at that vocabulary


def evaluate(
    llm: LLM,
    *,
    text: str | None = None,
    ids: ArrayLike | None = None,
    against: LLM | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure a model on a text, or on ids.

    The tokens are cut into windows that do not overlap (`window`, at most the context; default 512), each begun afresh;
    every token of a window but its first is predicted from those before it in the window. `max_tokens` cuts the text
    short; `report` hears of tokens done and in all.

    Returns `tokens` (predicted), `window`, `nll` (mean, in nats) and `perplexity`; with `against` also
    `reference_perplexity`, `kl_mean` and `kl_max` (Kullback-Leibler divergence of `llm` from it, nats a token)
    and `top1_agreement` (the fraction of positions at which both think the same token likeliest).
    Raises UserError for too short a text, or for models of two vocabularies.
    """
    if max_tokens is not None and max_tokens < 2:
        raise UserError(f"max_tokens must be at least 2, not {max_tokens}: the first token is not predicted")
    tokens = _tokens(llm, text, ids, against)[:max_tokens]
    if against is not None and against.vocab_size != llm.vocab_size:
        raise UserError(f"the models have {llm.vocab_size} and {against.vocab_size} ids, so they cannot be compared")
    contexts = [model.context for model in (llm, against) if model is not None]
    size = min(WINDOW if window is None else window, *contexts)
    if size < 2 or len(tokens) < 2:
        raise UserError(f"nothing to predict: {len(tokens)} tokens in windows of {size}; both must be at least 2")

    done = 0
    nll: list[NDArray[np.float64]] = []
    reference_nll: list[NDArray[np.float64]] = []
    divergence: list[NDArray[np.float64]] = []
    agreement: list[NDArray[np.bool_]] = []
    for part in _windows(tokens, size):
        logits = llm.logits(part)
        reference = logits if against is None else against.logits(part)
        for start in range(0, len(part) - 1, ROWS):
            rows = slice(start, min(start + ROWS, len(part) - 1))
            targets = np.asarray(part[rows.start + 1 : rows.stop + 1])[:, None]
            q = _log_softmax(logits[rows])
            nll.append(-np.take_along_axis(q, targets, axis=1)[:, 0])
            if against is not None:
                p = _log_softmax(reference[rows])
                reference_nll.append(-np.take_along_axis(p, targets, axis=1)[:, 0])
                divergence.append((np.exp(p) * (p - q)).sum(axis=1))
                agreement.append(p.argmax(axis=1) == q.argmax(axis=1))
        if report is not None:
            report(done := done + len(part), len(tokens))

    mean = float(np.concatenate(nll).mean())
    count = sum(map(len, nll))
    result: dict[str, Any] = {"tokens": count, "window": size, "nll": mean, "perplexity": _exp(mean)}
    if against is not None:
        result |= {
            "reference_perplexity": _exp(float(np.concatenate(reference_nll).mean())),
            "kl_mean": float(np.concatenate(divergence).mean()),
            "kl_max": float(np.concatenate(divergence).max()),
            "top1_agreement": float(np.concatenate(agreement).mean()),
        }
    return result


def _tokens(llm: LLM, text: str | None, ids: ArrayLike | None, against: LLM | None) -> list[int]:
    if (text is None) == (ids is None):
        raise UserError("give either a text or ids to evaluate on")
    if ids is not None:
        array = np.asarray(ids)
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"ids must be one row of whole numbers, not {array.dtype} of shape {array.shape}")
        return [int(i) for i in array]
    assert text is not None
    tokens = llm.tokenizer.encode(text)
    if against is not None and against.tokenizer.encode(text) != tokens:
        raise UserError("the two models cut this text into different tokens, so they cannot be compared on it")
    return tokens


def _windows(tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(tokens), size):
        if len(part := tokens[start : start + size]) > 1:
            yield part


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
