"""Codes that a checkpoint brings, placed into tiles: not one of them changes, and their scales lose little."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold import format as tiles
from fourfold.config import WeightFormat
from fourfold.format import SCALED, ZEROED

SHAPES = [(1, 64), (16, 64), (33, 256), (48, 320), (5, 576), (16, 704)]
Codes, Scales = NDArray[np.uint8], NDArray[np.float32]


def native(codes: Codes, scales: Scales, fmt: WeightFormat) -> tuple[Any, Any, Any]:
    n, k = codes.shape
    panels = np.full((tiles.n_panels(n), tiles.panel_bytes(fmt, k)), 0xAA, np.uint8)
    panel_scales = np.zeros(tiles.n_panels(n), np.float32)
    sums = _core.place(codes, scales, fmt, panels, panel_scales, zeros_of(scales, fmt))
    return panels, panel_scales, sums


def random_codes(shape: tuple[int, int], fmt: WeightFormat, seed: int = 0) -> tuple[Codes, Scales]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, shape).astype(np.uint8)
    if fmt == "int8":
        codes = rng.integers(-15, 16, shape).astype(np.int8).view(np.uint8)
    scales = rng.standard_normal((shape[0], shape[1] // 64)).astype(np.float32)
    return codes, scales


def zeros_of(scales: Scales, fmt: WeightFormat) -> NDArray[np.int8] | None:
    """The zero points that go with these scales, where the format has any: bytes of all kinds."""
    if fmt not in ZEROED:
        return None
    return np.random.default_rng(scales.size).integers(-128, 128, scales.shape).astype(np.int8)


def values(codes: Codes, scales: Scales, fmt: WeightFormat) -> NDArray[np.float64]:
    """What they stand for."""
    points = codes.view(np.int8) / 127 if fmt == "int8" else tiles.CODEBOOKS[fmt].astype(np.float64)[codes]
    if (zeros := zeros_of(scales, fmt)) is not None:
        points = points - np.repeat(zeros, 64, axis=1)
    return points * np.repeat(scales, 64, axis=1).astype(np.float64)


def assert_native_agrees(codes: Codes, scales: Scales, fmt: WeightFormat) -> None:
    expected, expected_scales = tiles.place(codes, scales, fmt, zeros_of(scales, fmt))
    actual, actual_scales, _ = native(codes, scales, fmt)
    np.testing.assert_array_equal(actual_scales, expected_scales)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("fmt", SCALED)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_is_the_numpy_statement_bit_for_bit(fmt: WeightFormat, shape: tuple[int, int]) -> None:
    assert_native_agrees(*random_codes(shape, fmt), fmt)


@pytest.mark.parametrize("fmt", SCALED)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_native_is_the_numpy_statement_for_any_finite_scales(fmt: WeightFormat, data: st.DataObject) -> None:
    n, t = data.draw(st.integers(1, 18)), data.draw(st.integers(1, 5))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.floats(-1, 1, width=32)
    codes, _ = random_codes((n, 64 * t), fmt, seed=data.draw(st.integers(0, 9)))
    assert_native_agrees(codes, data.draw(hnp.arrays(np.float32, (n, t), elements=finite)), fmt)


@pytest.mark.parametrize("fmt", ["nf4", "int4", "fp4", "uint4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_code_is_there_as_it_was(fmt: WeightFormat, shape: tuple[int, int]) -> None:
    codes, scales = random_codes(shape, fmt)
    panels, _, _ = native(codes, scales, fmt)
    zeros = zeros_of(scales, fmt)
    # Read by the specification's own words (docs/format.md, sections 1 and 3), not by the code that placed them.
    n, k = shape
    scale_bytes = 16 if zeros is None else 32
    for row in range(n):
        for i in range(0, k, 7):
            tile, within = divmod(i, 64)
            group, lane = tile // 4, row % 16
            in_group = min(4, k // 64 - 4 * group)
            begin = group * 4 * (scale_bytes + 512)
            at = begin + scale_bytes * in_group + (tile - 4 * group) * 512
            byte = int(panels[row // 16, at + within // 8 * 64 + lane * 4 + within % 4])
            assert (byte & 15 if within % 8 < 4 else byte >> 4) == codes[row, i]
            if zeros is not None:
                zero = panels[row // 16, begin + 32 * (tile - 4 * group) + 16 + lane]
                assert zero.view(np.int8) == zeros[row, tile]


@pytest.mark.parametrize("fmt", SCALED)
def test_scales_that_the_format_has_come_back_exactly(fmt: WeightFormat) -> None:
    rng = np.random.default_rng(3)
    codes, _ = random_codes((32, 256), fmt)
    bytes_ = rng.integers(1, 127, (32, 4)).astype(np.uint8)
    bytes_[::16, 0] = 126  # of every panel one is the largest
    scales = np.float32(2) ** -9 * tiles._E4M3[bytes_] * rng.choice(np.float32([-1, 1]), (32, 4))
    panels, panel_scales, (error, _) = native(codes, scales, fmt)
    assert error == 0
    unpacked = tiles.unpack(panels, panel_scales, fmt, (32, 256))
    np.testing.assert_allclose(unpacked, values(codes, scales, fmt), rtol=1e-6)


@pytest.mark.parametrize(
    ("fmt", "most"), [("nf4", 0.026), ("int4", 0.026), ("fp4", 0.026), ("uint4", 0.026), ("int8", 0.013)]
)
def test_the_sums_are_what_is_lost_and_that_is_little(fmt: WeightFormat, most: float) -> None:
    codes, scales = random_codes((64, 1024), fmt)
    panels, panel_scales, (error, reference) = native(codes, scales, fmt)
    true = values(codes, scales, fmt)
    stored = tiles.unpack(panels, panel_scales, fmt, codes.shape).astype(np.float64)
    assert error == pytest.approx(np.square(true - stored).sum(), rel=1e-4)
    assert reference == pytest.approx(np.square(true).sum(), rel=1e-6)
    assert 0 < np.sqrt(error / reference) < most


def test_a_panel_scale_is_searched_for() -> None:
    """One scale for a whole output, and all the same: some panel scale hits it exactly."""
    codes, _ = random_codes((16, 512), "int4")
    _, _, (error, reference) = native(codes, np.full((16, 8), np.float32(0.0123)), "int4")
    assert np.sqrt(error / reference) < 1e-6


@pytest.mark.parametrize("fmt", SCALED)
def test_what_is_no_code_and_no_scale_is_refused(fmt: WeightFormat) -> None:
    codes, scales = random_codes((16, 128), fmt)
    for wrong in (np.nan, np.inf, -np.inf):
        scales[3, 1] = wrong
        with pytest.raises(ValueError, match="NaN or infinite"):
            native(codes, scales, fmt)
    scales[3, 1] = 1
    codes[7, 9] = 128 if fmt == "int8" else 16
    with pytest.raises(ValueError, match="not one of the format's"):
        native(codes, scales, fmt)


def test_shapes_that_do_not_fit_are_refused() -> None:
    codes, scales = random_codes((16, 128), "nf4")
    panels, panel_scales = np.empty((1, 2 * 528), np.uint8), np.empty(1, np.float32)
    for wrong in (
        (codes[:, :100].copy(), scales, "nf4", panels, panel_scales),
        (codes, scales[:, :1].copy(), "nf4", panels, panel_scales),
        (codes, scales, "bf16", panels, panel_scales),
        (codes, scales, "nf4", panels[:, :-1].copy(), panel_scales),
        (codes, scales, "nf4", panels, np.empty(2, np.float32)),
    ):
        with pytest.raises(ValueError, match=r"must have shape|formats with scales"):
            _core.place(*wrong)


def test_zero_points_are_there_where_the_format_has_them() -> None:
    codes, scales = random_codes((16, 128), "uint4")
    panels, panel_scales, zeros = np.empty((1, 2 * 544), np.uint8), np.empty(1, np.float32), np.zeros((16, 2), np.int8)
    with pytest.raises(ValueError, match="uint4 needs zero points"):
        _core.place(codes, scales, "uint4", panels, panel_scales)
    with pytest.raises(ValueError, match="must have shape"):
        _core.place(codes, scales, "uint4", panels, panel_scales, zeros[:, :1].copy())
    with pytest.raises(ValueError, match="int4 has no zero points"):
        _core.place(codes, scales, "int4", panels[:, : 2 * 528].copy(), panel_scales, zeros)
