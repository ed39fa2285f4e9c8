"""Which id comes next, and when to stop: pure functions of the logits, the ids so far and a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fourfold.errors import RuntimeFailure, UserError

Logits = NDArray[np.float32]  # (vocab,), or (candidates,) once a filter has left some out
Ids = NDArray[np.int64]
Sampler = Callable[[Logits, Sequence[int]], int]  # logits (vocab,) and every id so far, prompt included -> the next id
Filter = Callable[[Ids, Logits], tuple[Ids, Logits]]  # candidates, ids ascending, and their logits -> those that stay


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a text. The defaults are greedy: exact, and the same on every run.

    The filters apply in this order: repetition_penalty, temperature, top_k, top_p, min_p.
    """

    max_tokens: int = 512
    temperature: float = 0.0  # 0: always the likeliest id
    top_k: int | None = None  # among the k likeliest, and all that tie with the k-th
    top_p: float = 1.0  # among the fewest likeliest that have this probability together
    min_p: float = 0.0  # among those at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # divides a positive logit, multiplies a negative one, of every id so far
    stop: tuple[str, ...] = ()  # the text ends before any of these
    seed: int | None = None  # None: different on every run, where temperature is not 0
    ignore_eos: bool = False  # go on to max_tokens

    def __post_init__(self) -> None:
        """Raises UserError for a value out of its interval."""
        if not isinstance(self.stop, str | list | tuple):
            raise UserError(f"stop must be a text or several, not {self.stop!r}")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        _check("max_tokens", self.max_tokens, 1, 2**31 - 1, whole=True)
        _check("temperature", self.temperature, 0, 100)
        _check("top_k", 1 if self.top_k is None else self.top_k, 1, 2**31 - 1, whole=True)
        _check("top_p", self.top_p, 0, 1, above=True)
        _check("min_p", self.min_p, 0, 1)
        _check("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _check("seed", 0 if self.seed is None else self.seed, 0, 2**64 - 1, whole=True)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop must be texts of at least one character, not {self.stop!r}")


def _check(name: str, value: object, low: float, high: float, *, above: bool = False, whole: bool = False) -> None:
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or (above and value == low):  # type: ignore[operator]
        interval = f"{'above' if above else 'from'} {low} to {high}"
        raise UserError(f"{name} must be a {'whole ' if whole else ''}number {interval}, not {value!r}")


def make_sampler(params: SamplingParams, limit: int | None = None) -> Sampler:
    """A sampler of only the filters asked for; it carries the random state, so make one for each text.

    `limit`: ids from here on are padding of the vocabulary and never sampled.
    """
    penalty = params.repetition_penalty
    filters = _filters(params)
    generator = np.random.Generator(np.random.PCG64(params.seed))

    def sample(logits: Logits, history: Sequence[int]) -> int:
        logits = logits[:limit]
        if penalty != 1:
            logits = penalize(logits, history, penalty)
        likeliest = int(np.argmax(logits))  # the lowest id where some tie; the first NaN where there is one
        if not np.isfinite(logits[likeliest]):
            raise RuntimeFailure(f"the model's logits are not finite (id {likeliest}: {logits[likeliest]})")
        if params.temperature == 0:
            return likeliest
        scaled = (logits - logits[likeliest]) / np.float32(max(params.temperature, 1e-6))  # no overflow
        ids = np.arange(len(scaled), dtype=np.int64)
        for choose in filters:
            ids, scaled = choose(ids, scaled)
        return int(ids[draw(scaled, generator)])

    return sample


def _filters(params: SamplingParams) -> list[Filter]:
    filters: list[Filter] = []
    if params.top_k is not None:
        filters.append(top_k(params.top_k))
    if params.top_p < 1:
        filters.append(top_p(params.top_p))
    if params.min_p > 0:
        filters.append(min_p(params.min_p))
    return filters


def penalize(logits: Logits, history: Sequence[int], penalty: float) -> Logits:
    """A copy of the logits, with those of the ids in `history` pushed towards less likely."""
    seen = np.unique(np.asarray(history, dtype=np.int64))
    seen = seen[seen < len(logits)]
    penalized = logits.copy()
    values = logits[seen]
    penalized[seen] = np.where(values > 0, values / np.float32(penalty), values * np.float32(penalty))
    return penalized


def top_k(k: int) -> Filter:
    """Keep the k largest, and those equal to the k-th."""

    def choose(ids: Ids, logits: Logits) -> tuple[Ids, Logits]:
        if k >= len(ids):
            return ids, logits
        kept = logits >= np.partition(logits, len(ids) - k)[len(ids) - k]
        return ids[kept], logits[kept]

    return choose


def top_p(p: float) -> Filter:
    """Keep the shortest run of likeliest ids (lower ids first where some tie) whose probability reaches p."""

    def choose(ids: Ids, logits: Logits) -> tuple[Ids, Logits]:
        total = _weights(logits).sum()
        count = 256  # the likeliest few nearly always suffice: sorting them all is the exception
        while True:
            some_ids, some = top_k(count)(ids, logits)
            order = np.argsort(-some, kind="stable")
            reached = np.cumsum(_weights(some[order])) >= p * total
            if reached.any() or len(some) == len(ids):
                kept = np.sort(order[: int(np.argmax(reached)) + 1 if reached.any() else len(order)])
                return some_ids[kept], some[kept]
            count *= 16

    return choose


def min_p(p: float) -> Filter:
    """Keep those at least p times as likely as the likeliest."""

    def choose(ids: Ids, logits: Logits) -> tuple[Ids, Logits]:
        kept = logits >= logits.max() + np.float32(math.log(p))
        return ids[kept], logits[kept]

    return choose


def draw(logits: Logits, generator: np.random.Generator) -> int:
    """An index, with the probabilities that the logits stand for."""
    cumulative = np.cumsum(_weights(logits))
    point = generator.random() * cumulative[-1]
    return min(int(np.searchsorted(cumulative, point, side="right")), len(logits) - 1)


def _weights(logits: Logits) -> NDArray[np.float64]:
    """Unnormalized probabilities; logits come with their maximum at 0, so nothing overflows."""
    return np.exp(logits.astype(np.float64))


class StopChecker:
    """Passes a text on in pieces, up to the first stop string that is complete, and never any part of that."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: texts of at least one character."""
        self._stops = tuple(stops)
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain not to begin a stop string; nothing once one was found."""
        if self.stopped:
            return ""
        text = self._held + text
        ends = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in text]
        if ends:
            self.stopped, self._held = True, ""
            end, minus_length = min(ends)
            return text[: end + minus_length]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, short of all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
