"""Which id comes next, and when to stop: pure functions of the logits, the ids so far and a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fourfold.errors import RuntimeFailure, UserError

Logits = NDArray[np.float32]  # (vocab,), or (candidates,) once a filter has left some out
Ids = NDArray[np.int64]
Allowed = NDArray[np.bool_]  # (vocab,): the ids that may come next
Filter = Callable[[Ids, Logits], tuple[Ids, Logits]]  # candidates, ids ascending, and their logits -> those that stay


class Sampler(Protocol):
    """Chooses the next id."""

    def __call__(self, logits: Logits, history: Sequence[int], allowed: Allowed | None = None) -> int:
        """From logits (vocab,), every id so far, prompt included, and the ids that may come next: None is all."""


DRAW_BLOCK = 256  # adding up all of a vocabulary one by one would take longer than everything else
MOST_LOGPROBS = 20  # alternatives to an id


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a text. The defaults are greedy: exact, and the same on every run.

    They apply in this order: logit_bias, the penalties, temperature, top_k, top_p, min_p.
    """

    max_tokens: int = 512  # 0: nothing is sampled
    temperature: float = 0.0  # 0: always the likeliest id
    top_k: int | None = None  # among the k likeliest, and all that tie with the k-th
    top_p: float = 1.0  # among the fewest likeliest that have this probability together
    min_p: float = 0.0  # among those at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # divides a positive logit, multiplies a negative one, of every id so far
    presence_penalty: float = 0.0  # subtracted from the logit of every id sampled so far
    frequency_penalty: float = 0.0  # the same, as many times as it was sampled
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, hash=False
    )  # added to the logit of an id, -100 to 100
    logprobs: int | None = None  # of each sampled id, and of so many of the likeliest; None: none
    stop: tuple[str, ...] = ()  # the text ends before any of these
    seed: int | None = None  # None: different on every run, where temperature is not 0
    ignore_eos: bool = False  # go on to max_tokens

    def __post_init__(self) -> None:
        """Raises UserError for a value out of its interval."""
        if not isinstance(self.stop, str | list | tuple):
            raise UserError(f"stop must be a text or several, not {self.stop!r}")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        _check("max_tokens", self.max_tokens, 0, 2**31 - 1, whole=True)
        _check("temperature", self.temperature, 0, 100)
        _check("top_k", 1 if self.top_k is None else self.top_k, 1, 2**31 - 1, whole=True)
        _check("top_p", self.top_p, 0, 1, above=True)
        _check("min_p", self.min_p, 0, 1)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check("presence_penalty", self.presence_penalty, -2, 2)
        _check("frequency_penalty", self.frequency_penalty, -2, 2)
        _check("logprobs", 0 if self.logprobs is None else self.logprobs, 0, MOST_LOGPROBS, whole=True)
        _check("seed", 0 if self.seed is None else self.seed, 0, 2**64 - 1, whole=True)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop must be texts of at least one character, not {self.stop!r}")
        if not isinstance(self.logit_bias, Mapping):
            raise UserError(f"logit_bias must map ids to numbers, not {self.logit_bias!r}")
        for token_id, bias in self.logit_bias.items():
            _check("an id of logit_bias", token_id, 0, 2**31 - 1, whole=True)
            _check(f"the logit_bias of id {token_id}", bias, -100, 100)
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))


def _check(name: str, value: object, low: float, high: float, *, above: bool = False, whole: bool = False) -> None:
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or (above and value == low):  # type: ignore[operator]
        interval = f"{'above' if above else 'from'} {low} to {high}"
        raise UserError(f"{name} must be a {'whole ' if whole else ''}number {interval}, not {value!r}")


def make_sampler(params: SamplingParams, limit: int | None = None, n_prompt: int = 0) -> Sampler:
    """A sampler of only the filters asked for; it carries the random state, so make one for each text.

    `limit`: ids from here on are padding of the vocabulary and never sampled. `n_prompt`: ids of the text's beginning,
    which were not sampled.
    """
    filters, adjust = _filters(params), _adjustments(params, n_prompt)
    generator = np.random.Generator(np.random.PCG64(params.seed))

    def sample(logits: Logits, history: Sequence[int], allowed: Allowed | None = None) -> int:
        logits = logits[:limit]
        for change in adjust:
            logits = change(logits, history)
        if allowed is not None:
            logits = np.where(allowed[: len(logits)], logits, np.float32(-np.inf))
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


def _adjustments(params: SamplingParams, n_prompt: int) -> list[Callable[[Logits, Sequence[int]], Logits]]:
    """What changes single ids' logits: each returns a copy."""
    changes: list[Callable[[Logits, Sequence[int]], Logits]] = []
    if params.logit_bias:
        biased = np.fromiter(params.logit_bias, np.int64)
        biases = np.fromiter(params.logit_bias.values(), np.float32)
        changes.append(lambda logits, _: add_to(logits, biased, biases))
    if params.repetition_penalty != 1:
        changes.append(lambda logits, history: penalize(logits, history, params.repetition_penalty))
    if params.presence_penalty or params.frequency_penalty:

        def discourage(logits: Logits, history: Sequence[int]) -> Logits:
            ids, counts = np.unique(np.asarray(history[n_prompt:], dtype=np.int64), return_counts=True)
            return add_to(logits, ids, -params.presence_penalty - params.frequency_penalty * counts)

        changes.append(discourage)
    return changes


def add_to(logits: Logits, ids: Ids, values: NDArray[np.floating]) -> Logits:
    """A copy of the logits with a value added to each of the ids; those beyond the vocabulary are left out."""
    inside = ids < len(logits)
    changed = logits.copy()
    changed[ids[inside]] += values[inside].astype(np.float32)
    return changed


def log_probabilities(logits: Logits, token_id: int, n_likeliest: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The natural logarithm of an id's probability, and the likeliest ids with theirs, likeliest first."""
    highest = logits.max()
    total = highest + np.log(np.exp(logits - highest).sum(dtype=np.float64))
    n = min(n_likeliest, len(logits))
    some = np.argpartition(-logits, n - 1)[:n] if n else np.empty(0, np.int64)
    some = some[np.lexsort((some, -logits[some]))]
    return float(logits[token_id] - total), tuple((int(i), float(logits[i] - total)) for i in some)


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
        total = _weights(logits).sum(dtype=np.float64)
        count = 256  # the likeliest few nearly always suffice: sorting them all is the exception
        while True:
            some_ids, some = top_k(count)(ids, logits)
            order = np.argsort(-some, kind="stable")
            reached = np.cumsum(_weights(some[order]), dtype=np.float64) >= p * total
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
    """An index, with the probabilities that the logits stand for; first a block of indices, then one of it."""
    weights = _weights(logits).astype(np.float64)
    sums = np.add.reduceat(weights, np.arange(0, len(weights), DRAW_BLOCK))
    ends = np.cumsum(sums)
    point = generator.random() * ends[-1]
    block = min(int(np.searchsorted(ends, point, side="right")), len(ends) - 1)
    inside = weights[block * DRAW_BLOCK : (block + 1) * DRAW_BLOCK]
    reached = np.flatnonzero(np.cumsum(inside) > point - (ends[block] - sums[block]))
    at = reached[0] if len(reached) else np.flatnonzero(inside)[-1]  # rounding: the last that can be drawn at all
    return block * DRAW_BLOCK + int(at)


def _weights(logits: Logits) -> NDArray[np.float32]:
    """Unnormalized probabilities; logits come with their maximum at 0, so nothing overflows. Sum them in float64."""
    return np.exp(logits)  # as exact as the logits are, and eight times as fast as in float64


@dataclass(frozen=True)
class Uncut:
    """Parts of a text that no stop string ends, and in which none counts: each from `begin` to the end of `end`."""

    begin: str
    end: str
    most: int  # such parts; what looks like one later is text


class StopChecker:
    """Passes a text on in pieces, up to the first stop string that is complete, and never any part of that."""

    def __init__(self, stops: Sequence[str], uncut: Uncut | None = None) -> None:
        """`stops`: texts of at least one character."""
        self._stops, self._uncut = tuple(stops), uncut if stops else None
        self._parts_left = self._uncut.most if self._uncut else 0
        self._is_within = False  # a part that is uncut
        self._held = ""  # may be the beginning of a stop string, or of where such a part begins or ends
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain not to begin a stop string; nothing once one was found."""
        return self._take(text, is_last=False)

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return self._take("", is_last=True)

    def _take(self, text: str, *, is_last: bool) -> str:
        shown, rest = "", self._held + text
        self._held = ""
        while rest and not self.stopped:
            piece, rest, is_whole = (self._within if self._is_within else self._outside)(rest, is_last)
            shown += piece
            if not is_whole:
                self._held = "" if self.stopped else rest
                break
        return shown

    def _within(self, text: str, is_last: bool) -> tuple[str, str, bool]:
        """What of an uncut part is certain, the rest, and whether the part is whole."""
        assert self._uncut
        before, end, after = text.partition(self._uncut.end)
        self._is_within = not end
        if end:
            return before + end, after, True
        n = len(text) - (0 if is_last else _overlap(text, self._uncut.end))
        return text[:n], text[n:], False

    def _outside(self, text: str, is_last: bool) -> tuple[str, str, bool]:
        """The same of what comes before an uncut part, or before a stop string."""
        begin = self._uncut.begin if self._uncut and self._parts_left else ""
        free, begun, after = text.partition(begin) if begin else (text, "", "")
        unsure = 0 if begun or is_last or not begin else _overlap(free, begin)  # whether it begins such a part
        ends = [(free.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in free]
        if ends and min(ends)[0] <= len(free) - unsure:
            self.stopped = True
            end, minus_length = min(ends)
            return free[: end + minus_length], "", False
        if begun:
            self._is_within, self._parts_left = True, self._parts_left - 1
            return free + begun, after, True
        starts = [end + minus_length for end, minus_length in ends]
        held = 0 if is_last else max((_overlap(free, stop) for stop in self._stops), default=0)
        n = min([len(free) - max(held, unsure), *starts])
        return free[:n], free[n:], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, short of all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
