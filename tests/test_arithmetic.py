"""Floats are rounded in our mode, whatever that of the thread that calls us, or that starts ours."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import fourfold
import fourfold._core as _core
from chain import Chain, make_team
from fourfold.format import n_panels, panel_bytes

FLUSHES, UPWARD = 0x8040, 0x4000  # subnormals are taken for zero and made zero; rounding to plus infinity


@contextmanager
def mode(bits: int) -> Iterator[None]:
    """With these bits of the register MXCSR set, which C's functions keep as the last word of an environment."""
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    before, changed = (ctypes.c_uint32 * 8)(), (ctypes.c_uint32 * 8)()
    library.fegetenv(before)
    changed[:] = before[:]
    changed[7] |= bits
    library.fesetenv(changed)
    try:
        yield
        library.fegetenv(changed)
        assert changed[7] & bits == bits  # it is the caller's again
    finally:
        library.fesetenv(before)


def small_blocks(n: int, k: int) -> Any:
    """Weights with blocks so small that their scales, and as halves some numbers, are subnormal."""
    weights = np.random.default_rng(n).standard_normal((n, k), np.float32)
    weights[:, 64:128] *= 1e-5
    return weights


@pytest.mark.parametrize("bits", [FLUSHES, UPWARD])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_product_is_the_same_in_any_mode(bits: int, dtype: type) -> None:
    w, x = fourfold.quantize(small_blocks(6000, 1100)), (small_blocks(3, 1100) * 1e-3).astype(dtype)
    expected = fourfold.linear(x, w, threads=1)
    with mode(bits):
        for threads in (1, 2, 41):  # most of which are started now
            np.testing.assert_array_equal(fourfold.linear(x, w, threads=threads), expected)
        values = w.dequantize()
    np.testing.assert_array_equal(values, w.dequantize())
    np.testing.assert_array_equal(fourfold.linear(x, w, threads=41), expected)


@pytest.mark.parametrize("bits", [FLUSHES, UPWARD])
@pytest.mark.parametrize("format", ["nf4", "uint4", "int8", "bf16"])
def test_codes_are_chosen_alike_in_any_mode(bits: int, format: str) -> None:
    weights = small_blocks(40, 200)
    expected = fourfold.quantize(weights, format)
    with mode(bits):
        found = fourfold.quantize(weights, format, threads=3)
    np.testing.assert_array_equal(found.panels, expected.panels)
    np.testing.assert_array_equal(found.scales, expected.scales)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [FLUSHES, UPWARD])
def test_codes_of_a_checkpoint_are_placed_alike_in_any_mode(bits: int) -> None:
    rng = np.random.default_rng(5)
    codes, scales = rng.integers(0, 16, (32, 128), np.uint8), rng.random((32, 2), np.float32)
    scales[:, 1] *= 1e-3

    def place() -> list[Any]:
        panels, panel_scales = np.empty((n_panels(32), panel_bytes("nf4", 128)), np.uint8), np.empty(2, np.float32)
        sums = _core.place(codes, scales, "nf4", panels, panel_scales)
        values = np.empty((32, 128), np.float32)
        _core.unpack(panels, panel_scales, "nf4", values)
        return [panels, panel_scales, values, sums]

    expected = place()
    with mode(bits):
        found = place()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("bits", [FLUSHES, UPWARD])
def test_a_team_computes_alike_whoever_starts_it(bits: int) -> None:
    x, first, second = small_blocks(20, 100), small_blocks(320, 100), small_blocks(48, 320)

    def chain() -> Chain:
        return Chain(make_team(1, 2), x, first, second, [[(0, 320)]], formats=("nf4", "nf4"))

    expected = chain().step()
    with mode(bits):
        work = chain()
        np.testing.assert_array_equal(work.step(), expected)
    np.testing.assert_array_equal(work.step(), expected)
