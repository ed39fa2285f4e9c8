"""What clients ask for: the same for the same seed, whoever serves it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHORTEST, LONGEST = 16, 2000  # ids of a prompt, lengths even on a logarithmic scale
FEWEST, MOST = 16, 128  # ids of an answer, even


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt: list[int]
    n_tokens: int
    think_seconds: float  # that its client waits before it sends it: exponential, so that arrivals are Poisson
    leaves_after: int | None  # tokens after which the client hangs up; None: it stays


def traffic(n: int, vocab_size: int, think_seconds: float, leaving: float, seed: int = 0) -> list[Ask]:
    """Prompts of random ids: no two begin alike, so that nothing but speed is measured."""
    rng = np.random.default_rng(seed)
    asks = []
    for _ in range(n):
        length = round(np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST))))
        n_tokens = int(rng.integers(FEWEST, MOST + 1))
        leaves = int(rng.integers(0, n_tokens)) if rng.random() < leaving else None
        prompt = rng.integers(0, vocab_size, length).tolist()
        asks.append(Ask(prompt, n_tokens, float(rng.exponential(think_seconds)), leaves))
    return asks
