"""Random numbers, and how near results must be to what is expected."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def numbers(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def close(got: Any, expected: Any, allowed: Any) -> None:
    """Within `allowed`, element by element; the worst is shown."""
    got, expected, allowed = (np.broadcast_to(x, np.shape(expected)) for x in (got, expected, allowed))
    assert np.isfinite(got).all()
    excess = np.abs(got - expected) - allowed
    i = np.unravel_index(excess.argmax(), excess.shape)
    assert excess[i] <= 0, f"at {i}: {got[i]:.9g}, not {expected[i]:.9g} within {allowed[i]:.3g}"
