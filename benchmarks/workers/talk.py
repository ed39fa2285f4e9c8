"""A whole model in a peer's hands: a prompt at once, or one token after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from time import perf_counter
from typing import Any, Protocol

CONTEXT = 16  # ids before the first token that is timed: a short context


class Model(Protocol):
    """A loaded model that holds one text."""

    n_bytes: int  # of weights that a token must read
    path: str  # what computes
    version: str

    def begin(self, ids: Sequence[int]) -> int:
        """Forgets the text, reads ids at once, and gives the likeliest next id."""

    def go_on(self, id: int) -> int:
        """Adds one id to the text, and gives the likeliest next one."""


class Talk:
    """Turns with a model, which has answered one short prompt before: rightly, where the right answer is known."""

    def __init__(self, model: Model, subject: Mapping[str, Any]) -> None:
        self._model, self._prompts = model, prompts(subject["vocab_size"])
        check_answer(subject, model.begin(first_prompt(subject)))
        model.go_on(0)

    def facts(self) -> dict[str, Any]:
        return {"bytes": self._model.n_bytes, "path": self._model.path, "version": self._model.version}

    def turn(self, load: Mapping[str, Any]) -> float:
        """Seconds of a prompt of load["prompt"] tokens, or of one of load["decode"] tokens after one another."""
        if "prompt" in load:
            ids = self._prompts(load["prompt"])
            start = perf_counter()
            self._model.begin(ids)
            return perf_counter() - start
        id = self._model.begin(self._prompts(CONTEXT))
        start = perf_counter()
        for _ in range(load["decode"]):
            id = self._model.go_on(id)
        return (perf_counter() - start) / float(load["decode"])


def prompts(vocab_size: int) -> Callable[[int], list[int]]:
    """Gives so many random ids: the same ones to every peer, and never the same beginning twice, lest it be cached."""
    random = Random(0)
    return lambda n_tokens: random.choices(range(vocab_size // 2, vocab_size), k=n_tokens)  # no special ids there


def first_prompt(subject: Mapping[str, Any]) -> list[int]:
    """The one with a known answer, where the subject has one."""
    return list(subject["known"]["ids"]) if "known" in subject else prompts(subject["vocab_size"])(CONTEXT)


def check_answer(subject: Mapping[str, Any], answer: int) -> None:
    """Raises RuntimeError where `answer` is not the id that is known to follow."""
    if "known" in subject and answer != subject["known"]["next"]:
        raise RuntimeError(f"the model answers with token {answer} where {subject['known']['next']} is right")
