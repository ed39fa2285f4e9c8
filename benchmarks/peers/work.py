"""What the peers are given to do: subjects that are loaded once, and loads of which each turn does one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peers.catalogue import Kind

Unit = Literal["matrix", "token", "prompt"]

TOKENS = (1, 4, 16, 512)
PROMPT = 512
ROTATING_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Load:
    """What one turn does."""

    name: str
    title: str
    request: Mapping[str, int]
    unit: Unit  # what its seconds are of
    tokens: int  # in a unit
    flop: float  # of a unit's matrices, two for each weight and token


@dataclass(frozen=True)
class Work:
    """A subject that every peer loads, and its loads."""

    name: str
    title: str
    kind: Kind
    subject: Mapping[str, Any]
    loads: tuple[Load, ...]
    memory_bytes: int  # that a worker may take while it loads

    def describe(self) -> dict[str, Any]:
        """What a table of its results needs, JSON-ready."""
        loads = {load.name: {"title": load.title, "unit": load.unit, "tokens": load.tokens} for load in self.loads}
        return {"title": self.title, "kind": self.kind, "loads": loads}


def matrix(k: int, n: int) -> Work:
    """y = x W^T, W (N, K), for a few and for many rows of x."""
    loads = tuple(
        Load(f"{m}", f"{m} token{'s' if m > 1 else ''}", {"tokens": m}, "matrix", m, 2.0 * m * k * n) for m in TOKENS
    )
    subject = {"k": k, "n": n, "tokens": TOKENS, "rotating_bytes": ROTATING_BYTES}
    memory = 2 * ROTATING_BYTES + 12 * k * n  # copies as they come and as they are packed; quantizing one of floats
    return Work(f"matrix-{n}", f"One matrix, {k} × {n}", "matrix", subject, loads, memory)


def model(
    name: str, title: str, subject: Mapping[str, Any], *, decode: int, flop: tuple[float, float], memory_bytes: int
) -> Work:
    """A whole model: `decode` tokens after one another, or a prompt, in a turn; `flop` of a token and of the prompt."""
    loads = (
        Load("decode", "one token after another", {"decode": decode}, "token", 1, flop[0]),
        Load("prompt", f"prompt of {PROMPT}", {"prompt": PROMPT}, "prompt", PROMPT, flop[1]),
    )
    return Work(name, title, "model", subject, loads, memory_bytes)
