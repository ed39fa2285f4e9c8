"""One matrix in a peer's hands: as many copies as make the caches useless, multiplied in turn, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from orders import resident_bytes

Floats = NDArray[np.float32]

ROWS = 512  # of random numbers; the matrix repeats them, which no peer can know
TOKENS_OVER_ALL = 16  # up to these a pass goes over every copy; beyond, where reading costs little, over the next one
PASSES = 3  # so short ones, in a turn; the median counts
WORST_ERROR = 0.2  # of the outputs' size; four bits cost 0.09 to 0.12


class Copies(Protocol):
    """Equal matrices (N, K) that share no byte."""

    n_copies: int
    n_bytes: int  # of one, packed, scales included
    path: str  # what multiplies
    version: str

    def activations(self, x: Floats) -> Any:
        """x (M, K) in the form that the peer multiplies."""

    def multiply(self, copy: int, x: Any) -> Any:
        """y = x W^T with that copy of W, in the peer's own form."""

    def floats(self, y: Any) -> Floats:
        """The same, (M, N)."""


def block(k: int) -> Floats:
    """The random rows (ROWS, K) that every matrix repeats."""
    return 0.02 * np.random.default_rng(0).standard_normal((ROWS, k), dtype=np.float32)


def whole(k: int, n: int) -> Floats:
    """The matrix (N, K)."""
    return np.tile(block(k), (n // ROWS, 1))


def passes(n_tokens: int) -> int:
    """In a turn."""
    return PASSES if n_tokens <= TOKENS_OVER_ALL else 1


def copies_for(rotating_bytes: int, n_bytes: int) -> int:
    """Copies that together hold at least `rotating_bytes`."""
    return max(2, -(-rotating_bytes // n_bytes))


def activations(n_tokens: int, k: int) -> Floats:
    """The same random rows (M, K) for every peer."""
    return np.random.default_rng(1).standard_normal((n_tokens, k), dtype=np.float32)


def product_error(y: Floats, x: Floats) -> float:
    """How far y (M, N) is from x W^T in float32: root mean square, of the size of the latter.

    Raises RuntimeError where that is more than four bits cost.
    """
    truth = x @ block(x.shape[1]).T
    off = y.reshape(len(y), -1, ROWS) - truth[:, None]
    error = float(np.sqrt(np.mean(off**2) / np.mean(truth**2)))
    if not error < WORST_ERROR:
        raise RuntimeError(f"the product of {len(y)} tokens is off by {error:.2f} of its size")
    return error


class Rotation:
    """Turns over the copies: each has multiplied one token rightly, and the first every number of them."""

    def __init__(self, copies: Copies, subject: Mapping[str, Any]) -> None:
        self._copies, self._next = copies, 0
        self._inputs: dict[int, Any] = {}
        self._errors: dict[str, float] = {}
        for n_tokens in subject["tokens"]:
            plain = activations(n_tokens, subject["k"])
            self._inputs[n_tokens] = x = copies.activations(plain)
            self._errors[str(n_tokens)] = product_error(copies.floats(copies.multiply(0, x)), plain)
        for copy in range(1, copies.n_copies):
            one = activations(1, subject["k"])
            product_error(copies.floats(copies.multiply(copy, copies.activations(one))), one)
        rotating = copies.n_bytes * copies.n_copies
        if resident_bytes() < rotating:
            raise RuntimeError(f"copies of {rotating / 1e9:.2f} GB take {resident_bytes() / 1e9:.2f} GB: one is shared")

    def facts(self) -> dict[str, Any]:
        copies = self._copies
        return {
            "bytes": copies.n_bytes,
            "rotating_bytes": copies.n_bytes * copies.n_copies,
            "path": copies.path,
            "version": copies.version,
            "errors": self._errors,
        }

    def turn(self, load: Mapping[str, Any]) -> float:
        """Seconds a matrix, for load["tokens"] rows of activations: the median of its passes."""
        n_tokens = load["tokens"]
        return median(self._pass(n_tokens) for _ in range(passes(n_tokens)))

    def _pass(self, n_tokens: int) -> float:
        x, count = self._inputs[n_tokens], self._n_read(n_tokens)
        turns = [(self._next + i) % self._copies.n_copies for i in range(count)]
        self._next = (turns[-1] + 1) % self._copies.n_copies
        start = perf_counter()
        for copy in turns:
            self._copies.multiply(copy, x)
        return (perf_counter() - start) / count

    def _n_read(self, n_tokens: int) -> int:
        """Copies in a pass."""
        return self._copies.n_copies if n_tokens <= TOKENS_OVER_ALL else 1
