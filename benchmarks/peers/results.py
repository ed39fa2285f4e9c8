"""What was measured, as one JSON file that grows, and what it says: medians, spread, shares of limits."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from fourfold.bench.limits import spread
from fourfold.errors import CheckpointError, UserError

VERSION = 1


@dataclass(frozen=True)
class Sample:
    """One turn of one peer at one load, and the limits around it."""

    work: str
    load: str
    peer: str
    round: str  # turns of one round ran within minutes of each other, and compare with each other
    seconds: float  # of one unit: a matrix, a token, a prompt
    of_limit: float  # bytes/s over the read bandwidth or FLOP/s over the peak, whichever is more


@dataclass
class Results:
    """Everything that the table and the chart are made from.

    `machine` is where the samples come from; `works` and `peers` are the titles of what was measured, in order; `facts`
    what each peer said of itself ("WORK/PEER": bytes, version, path); `failures` why it has no samples ("WORK/PEER").
    """

    machine: dict[str, Any]
    works: dict[str, dict[str, Any]] = field(default_factory=dict)
    peers: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    def forget(self, work: str) -> None:
        """Drops everything about a work but its title."""
        self.samples = [sample for sample in self.samples if sample.work != work]
        for kept in (self.facts, self.failures):
            for key in [key for key in kept if key.startswith(f"{work}/")]:
                del kept[key]

    def seconds(self, work: str, load: str, peer: str) -> dict[str, float] | None:
        """Spread of the seconds of a unit; None where there are no samples."""
        values = [sample.seconds for sample in self._of(work, load, peer)]
        return spread(values) if values else None

    def of_limit(self, work: str, load: str, peer: str) -> float:
        """The median share of the limit."""
        return median(sample.of_limit for sample in self._of(work, load, peer))

    def speedup(self, work: str, load: str, peer: str, over: str) -> float | None:
        """How many times as fast as `over`: the median of the rounds that both were in; None where there are none."""
        theirs = {sample.round: sample.seconds for sample in self._of(work, load, over)}
        ratios = [theirs[s.round] / s.seconds for s in self._of(work, load, peer) if s.round in theirs]
        return median(ratios) if ratios else None

    def _of(self, work: str, load: str, peer: str) -> Sequence[Sample]:
        return [s for s in self.samples if (s.work, s.load, s.peer) == (work, load, peer)]


def read(path: Path, machine: Mapping[str, Any] | None = None) -> Results:
    """The results kept at `path`. Raises UserError where they are of another machine than `machine`, or there are none.

    With a machine, results that are not there yet are empty ones. Raises CheckpointError for a damaged file.
    """
    if not path.exists():
        if machine is None:
            raise UserError(f"there are no results at {path}: measure something first, such as --work matrix-8192")
        return Results(dict(machine))
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.pop("version") != VERSION:
            raise ValueError("another version")
        results = Results(**{**kept, "samples": [Sample(**sample) for sample in kept["samples"]]})
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} is not a file of results ({error}): delete it, or name another") from None
    if machine is not None and results.machine != dict(machine):
        raise UserError(
            f"{path} holds results of {results.machine}, not of {dict(machine)}: delete it, or give another --cache"
        )
    return results


def write(results: Results, path: Path) -> None:
    """Replaces the file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"version": VERSION, **asdict(results)}, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces a file whole: whoever reads it finds the old or the new one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
