"""Drafting: guess the next ids cheaply, and let one step check them all.

A step over a few rows costs little more than over one, since it reads the same weights. Guesses that turn out right
save steps; those that do not cost their rows. `Speculation` weighs the two by what it has seen: how often a text's
drafts were right, and what a row adds to a step. Drafts change no text (`generation.Generation.sample`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fourfold.generation import Generation


class Proposer(Protocol):
    """Guesses what follows."""

    def propose(self, texts: Sequence[Generation], most: Sequence[int]) -> list[list[int]]:
        """For each text at most so many ids; none where nothing suggests itself."""

    def forget(self, text: Generation) -> None:
        """The text has ended."""

    def row_seconds(self) -> float:
        """What one guessed id costs."""


class PromptLookup:
    """Looks up the last few ids earlier in the same text, and proposes what followed them there.

    Saxena, "Prompt Lookup Decoding" (2023): of use where an answer repeats its prompt or itself.
    """

    N, PLACES = 3, 4  # ids that must agree; earlier places that are compared

    def __init__(self) -> None:
        self._places: dict[Generation, dict[tuple[int, ...], list[int]]] = {}
        self._indexed: dict[Generation, int] = {}

    def propose(self, texts: Sequence[Generation], most: Sequence[int]) -> list[list[int]]:
        """What followed where the longest run of the last ids stood before."""
        return [self._follow(text, n) if n else [] for text, n in zip(texts, most, strict=True)]

    def forget(self, text: Generation) -> None:
        """Its index is dropped."""
        self._places.pop(text, None)
        self._indexed.pop(text, None)

    def row_seconds(self) -> float:
        """Nothing beside a step."""
        return 0.0

    def _follow(self, text: Generation, most: int) -> list[int]:
        ids, places = text.ids, self._places.setdefault(text, {})
        for end in range(self._indexed.get(text, self.N), len(ids)):  # not the last ids themselves
            places.setdefault(tuple(ids[end - self.N : end]), []).append(end)
        self._indexed[text] = max(self.N, len(ids))
        candidates = places.get(tuple(ids[-self.N :]), [])[-self.PLACES :]
        if len(ids) < self.N or not candidates:
            return []
        at = max(reversed(candidates), key=lambda end: _agreeing(ids, end))
        return ids[at : at + most]


def _agreeing(ids: Sequence[int], end: int, most: int = 32) -> int:
    """How many ids before `end` are the last ids of all."""
    n = 0
    while n < min(most, end) and ids[end - 1 - n] == ids[-1 - n]:
        n += 1
    return n


@dataclass
class _Record:
    """How a text's drafts fared."""

    acceptance: float  # of a drafted id, where all before it were right
    idle: int = 0  # steps without a draft
    patience: int = 8  # such steps before another attempt


@dataclass
class StepCost:
    """Seconds of a step as a line over its rows, fitted to what was measured, the last 50 steps or so weighing most."""

    decay: float = 0.98
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # of 1, rows, seconds, rows^2, rows * seconds

    def observe(self, rows: int, seconds: float) -> None:
        """A step took so long."""
        values = (1.0, rows, seconds, rows * rows, rows * seconds)
        self._sums = [self.decay * s + v for s, v in zip(self._sums, values, strict=True)]

    def line(self) -> tuple[float, float]:
        """Seconds of a step without rows, and of a row. A row is a quarter of a step while only one size was seen."""
        n, r, s, rr, rs = self._sums
        if n == 0:
            return 0.8, 0.2
        spread = rr - r * r / n
        if spread < 0.1 * n:  # of one size, nearly: the slope would be noise
            one = s / n / (1 + 0.25 * max(0.0, r / n - 1))
            return 0.8 * one, 0.2 * one
        row = min(max((rs - r * s / n) / spread, 0.005 * s / n), s / max(r, 1.0))
        return max(0.0, s / n - row * r / n), row


class Speculation:
    """How many ids to draft for each text, and by whom."""

    MOST_PATIENCE = 128

    def __init__(self, proposer: Proposer, most: int) -> None:
        """`most`: ids drafted for a text at a time, no more than the engine can go back by."""
        self._proposer, self._most = proposer, most
        self._cost = StepCost()
        self._typical = 0.6  # acceptance lately, of all texts: what a new one begins with
        self._records: dict[Generation, _Record] = {}

    def draft(self, texts: Sequence[Generation], room: Sequence[int], n_rows: int, most_rows: int) -> list[list[int]]:
        """Ids to try after each text's last. `room`: how many it could take; `n_rows`: of the step without drafts."""
        counts = self._counts(texts, room, n_rows, most_rows)
        drafts = self._proposer.propose(texts, counts) if any(counts) else [[] for _ in texts]
        for text, drafted in zip(texts, drafts, strict=True):
            record = self._record(text)
            record.idle = 0 if drafted else record.idle + 1
        return drafts

    def learn(self, text: Generation, n_drafted: int, n_accepted: int) -> None:
        """So many of a text's drafted ids were right, and the one after them, if it was drafted, was not."""
        record = self._record(text)
        for right in [True] * n_accepted + [False] * (n_accepted < n_drafted):
            record.acceptance += 0.2 * (right - record.acceptance)
            self._typical += 0.02 * (right - self._typical)
        record.patience = 8 if n_accepted else min(2 * record.patience, self.MOST_PATIENCE)

    def observe(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        self._cost.observe(rows, seconds)

    def forget(self, text: Generation) -> None:
        """The text has ended."""
        self._records.pop(text, None)
        self._proposer.forget(text)

    def _record(self, text: Generation) -> _Record:
        return self._records.setdefault(text, _Record(self._typical))

    def _counts(self, texts: Sequence[Generation], room: Sequence[int], n_rows: int, most_rows: int) -> list[int]:
        """Drafts for each text, added one by one, the most promising first, while they raise ids a second.

        With E ids expected of a step of T seconds, one more that is right with probability p and costs c raises E / T
        where p / c > E / T.
        """
        fixed, row = self._cost.line()
        expected, seconds, cost = float(len(texts)), fixed + row * n_rows, row + self._proposer.row_seconds()
        counts = [0] * len(texts)
        records = [self._record(text) for text in texts]
        chances = [record.acceptance for record in records]  # that the next draft and all before it are right
        left = most_rows - n_rows
        while left > 0:
            i = max(range(len(texts)), key=lambda i: chances[i] if counts[i] < min(self._most, room[i]) else -1.0)
            if counts[i] >= min(self._most, room[i]) or chances[i] * seconds <= expected * cost:
                break
            counts[i] += 1
            expected, seconds, left = expected + chances[i], seconds + cost, left - 1
            chances[i] *= records[i].acceptance
        for i, record in enumerate(records):  # or a text that begins to repeat itself would never be noticed
            if counts[i] == 0 and record.idle >= record.patience and room[i] > 0 and left > 0:
                counts[i], left = 1, left - 1
        return counts
