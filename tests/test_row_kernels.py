"""Norm, rotary embedding, gated activation and sums on every instruction set, against float64.

Tolerances are computed: float32 rounds each of the operations that lead to a result once.
"""

from __future__ import annotations

import numpy as np
import pytest

import fourfold._core as _core
from closeness import close, numbers

EPS = 2.0**-24  # of float32, to nearest
E_87 = 1.7e-38  # exp() stops here: what is smaller need not be
SIZES = (1, 7, 15, 16, 17, 48, 64, 100, 576)

by_isa = pytest.mark.parametrize("isa", [isa for isa in _core.read_machine().isas() if isa != "amx"])


@by_isa
@pytest.mark.parametrize("n", SIZES)
def test_rms_norm(isa: str, n: int) -> None:
    w = numbers(n, seed=1)
    for x in (numbers(n), numbers(n) * np.float32(1e-4), numbers(n) * np.float32(1e15), np.zeros(n, np.float32)):
        y = np.empty(n, np.float32)
        _core.rms_norm(isa, x, w, 1e-5, y)
        wide = x.astype(np.float64)
        expected = wide / np.sqrt((wide * wide).mean() + np.float32(1e-5)) * w
        close(y, expected, EPS * (n + 8) * np.abs(expected))


@by_isa
@pytest.mark.parametrize("d", [2 * n for n in SIZES])
def test_rotary_embedding(isa: str, d: int) -> None:
    x, angles = numbers(d), numbers(d // 2, seed=1) * 10
    c, s = np.cos(angles), np.sin(angles)
    y = x.copy()
    _core.rope(isa, y, c, s)
    a, b, c, s = (v.astype(np.float64) for v in (*np.split(x, 2), c, s))
    close(y[: d // 2], a * c - b * s, 2 * EPS * (abs(a * c) + abs(b * s)))
    close(y[d // 2 :], b * c + a * s, 2 * EPS * (abs(b * c) + abs(a * s)))


@by_isa
@pytest.mark.parametrize("n", SIZES)
def test_silu_gate(isa: str, n: int) -> None:
    b = numbers(n, seed=1)
    for a in (
        numbers(n) * 3,
        numbers(n) * 40,
        numbers(n) * np.float32(1e4),
        np.zeros(n, np.float32),
        -(numbers(n) ** 2),
    ):
        y = np.empty(n, np.float32)
        _core.gate_mul(isa, "silu", a, b, y)
        wide = a.astype(np.float64)
        expected = wide / (1 + np.exp(np.minimum(-wide, 700))) * b
        close(y, expected, 8 * EPS * abs(expected) + E_87 * (1 + abs(wide * b)))


@by_isa
@pytest.mark.parametrize("n", SIZES)
def test_gelu_gate(isa: str, n: int) -> None:
    """gelu(a) = a sigmoid(s): s is rounded some four times, and exp(-|s|) is off by |s| times as much, relatively."""
    b = numbers(n, seed=1)
    for a in (
        numbers(n) * 3,
        numbers(n) * 40,
        numbers(n) * np.float32(1e4),
        numbers(n) * np.float32(1e20),
        np.zeros(n, np.float32),
        -(numbers(n) ** 2),
    ):
        y = np.empty(n, np.float32)
        _core.gate_mul(isa, "gelu_tanh", a, b, y)
        wide = a.astype(np.float64)
        s = np.sqrt(8 / np.pi) * (wide + 0.044715 * wide**3)
        expected = wide / (1 + np.exp(np.minimum(-s, 700))) * b
        off = (8 + 4 * np.minimum(abs(s), 87)) * EPS
        close(y, expected, off * abs(expected) + E_87 * (1 + abs(wide * b)))
    with pytest.raises(ValueError, match="unknown gate: relu"):
        _core.gate_mul(isa, "relu", b, b, b)


@by_isa
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("n_parts", [0, 1, 2, 4, 7])
@pytest.mark.parametrize("has_bias", [False, True])
def test_sums_are_added_from_left_to_right_bit_by_bit(isa: str, n: int, n_parts: int, has_bias: bool) -> None:
    base, parts, bias = numbers(n), numbers(n_parts, n, seed=1) * 100, numbers(n, seed=2) if has_bias else None
    y = np.empty(n, np.float32)
    _core.add_parts(isa, base, parts, bias, y)
    expected = base
    for part in parts:
        expected = expected + part
    assert (y == (expected if bias is None else expected + bias)).all()
    _core.add_parts(isa, base, parts, bias, base)  # in place
    assert (base == y).all()
