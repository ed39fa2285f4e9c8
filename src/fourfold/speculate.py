"""Drafting: guess the next ids cheaply, and let one step check them all.

A step over a few rows costs little more than over one, since it reads the same weights. Guesses that turn out right
save steps; those that do not cost their rows. `Speculation` weighs the two by what it has seen: how often a text's
drafts were right, and what a row adds to a step. Drafts change no text (`generation.Generation.sample`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

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

    N, PLACES = 2, 4  # ids that must agree; earlier places that are compared

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


class StepCost:
    """Seconds of a step by its rows: what was measured lately, and between that straight lines.

    A table rather than a formula, because kernels take rows in blocks: four may cost what three do, and five far more.
    """

    WEIGHT, MEMORY = 0.3, 500  # of the newest measurement; steps after which one is forgotten
    GUESS = 0.25  # of a step of one row, for each more, where nothing better is known

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._measured: dict[int, int] = {}  # at which step
        self._n_steps = 0

    def observe(self, rows: int, seconds: float) -> None:
        """A step took so long."""
        self._n_steps += 1
        known = self._seconds.get(rows, seconds)
        self._seconds[rows] = known + self.WEIGHT * (seconds - known)
        self._measured[rows] = self._n_steps
        for old in [r for r, step in self._measured.items() if step < self._n_steps - self.MEMORY]:
            del self._seconds[old], self._measured[old]

    def seconds(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """What steps of so many rows take, each."""
        if not self._seconds:
            return np.asarray(1 + self.GUESS * (rows - 1), np.float64)
        known = np.array(sorted(self._seconds))
        measured = np.array([self._seconds[r] for r in known])
        nearest = np.clip(rows, known[0], known[-1])  # beyond what is known, so much more a row
        one = np.interp(nearest, known, measured) / (1 + self.GUESS * (nearest - 1))
        return np.asarray(np.interp(rows, known, measured) + self.GUESS * one * (rows - nearest), np.float64)


class Speculation:
    """How many ids to draft for each text, and by whom."""

    MOST_PATIENCE = 128

    def __init__(self, proposer: Proposer, most: int, cost: StepCost | None = None) -> None:
        """`most`: ids drafted for a text at a time, no more than the engine can go back by. `cost`: as known so far."""
        self._proposer, self._most = proposer, most
        self._cost = cost or StepCost()
        self._typical = 0.6  # acceptance lately, of all texts: what a new one begins with
        self._records: dict[Generation, _Record] = {}

    def draft(self, texts: Sequence[Generation], room: Sequence[int], n_rows: int, most_rows: int) -> list[list[int]]:
        """Ids to try after each text's last. `room`: how many it could take; `n_rows`: of the step without drafts."""
        room = [min(n, self._most) for n in room]
        if self._proposer.row_seconds() == 0:  # then it is known beforehand whether there is anything to propose
            drafts = self._proposer.propose(texts, room)
            counts = self._counts(texts, [len(drafted) for drafted in drafts], n_rows, most_rows)
            drafts = [drafted[:n] for drafted, n in zip(drafts, counts, strict=True)]
        else:
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
        """Drafts for each text: of all numbers of rows the one that promises most ids a second.

        The n-th draft of a text is of use where it and all before it are right: with its acceptance to the power of n.
        Whatever the number of rows, they go to the drafts that are likeliest to be of use.
        """
        records = [self._record(text) for text in texts]
        gains = sorted(
            ((record.acceptance**n, i) for i, record in enumerate(records) for n in range(1, room[i] + 1)),
            key=lambda gain: -gain[0],
        )[: most_rows - n_rows]
        extra = np.arange(len(gains) + 1)
        expected = len(texts) + np.cumsum([0.0, *(chance for chance, _ in gains)])
        seconds = self._cost.seconds(n_rows + extra) + extra * self._proposer.row_seconds()
        n_best = int(np.argmax(expected / seconds))
        counts = [0] * len(texts)
        for _, i in gains[:n_best]:
            counts[i] += 1
        left = most_rows - n_rows - n_best
        for i, record in enumerate(records):  # or a text that begins to repeat itself would never be noticed
            if counts[i] == 0 and record.idle >= record.patience and room[i] > 0 and left > 0:
                counts[i], left = 1, left - 1
        return counts
