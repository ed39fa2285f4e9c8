"""The tile format: the numpy statement against the specification's own words, the native packer against both."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold import format as tiles
from fourfold.config import FORMATS, WeightFormat

ISAS = _core.read_machine().isas()
SHAPES = [(1, 1), (16, 64), (15, 63), (17, 65), (33, 256), (48, 257), (5, 576), (16, 700)]


def native_pack(
    rows: NDArray[Any], fmt: WeightFormat, isa: str | None = None, threads: int = 1
) -> tuple[Any, Any, Any]:
    """Panels, scales (float32 zeros where unscaled), and the two sums."""
    n, k = rows.shape
    panels = np.full((tiles.n_panels(n), tiles.panel_bytes(fmt, k)), 0xAA, np.uint8)
    scales = np.zeros(tiles.n_panels(n), np.float32)
    if rows.dtype == ml_dtypes.bfloat16:
        rows = rows.view(np.uint16)
    sums = _core.pack(rows, fmt, panels, scales if fmt in tiles.SCALED else None, threads, isa)
    return panels, scales, sums


def native_unpack(panels: Any, scales: Any, fmt: WeightFormat, shape: tuple[int, int]) -> NDArray[np.float32]:
    out = np.empty(shape, np.float32)
    _core.unpack(panels, scales if fmt in tiles.SCALED else None, fmt, out)
    return out


def assert_native_agrees(weights: NDArray[np.float32], fmt: WeightFormat) -> None:
    panels, scales = tiles.pack(weights, fmt)
    unpacked = tiles.unpack(panels, scales, fmt, weights.shape)
    for isa in ISAS:
        actual, actual_scales, _ = native_pack(weights, fmt, isa)
        np.testing.assert_array_equal(actual, panels, err_msg=f"{fmt} {weights.shape} {isa}")
        if scales is not None:
            np.testing.assert_array_equal(actual_scales, scales)
    actual_values = native_unpack(panels, scales, fmt, weights.shape)
    np.testing.assert_array_equal(actual_values.view(np.uint32), unpacked.view(np.uint32))


def gaussian(shape: tuple[int, int], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def special(name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    w = gaussian(shape)
    w /= np.abs(w).max()
    if name == "zero rows and columns":
        w[::2] = 0
        w[:, :70] = 0
    elif name == "constant":
        w[:] = -0.3
    elif name == "all zero":
        w[:] = 0
    elif name == "negative zero":
        w = np.where(w > 0, w, np.float32(-0.0))
    elif name == "one large":
        w[0, 0] = 1e6
    elif name == "wide range":
        w *= np.float32(10) ** np.random.default_rng(1).integers(-40, 38, shape)
    else:
        w = (w.astype(np.float64) * float(name)).astype(np.float32)
    return w.astype(np.float32)


SPECIALS = ["zero rows and columns", "constant", "all zero", "negative zero", "one large", "wide range"]
MAGNITUDES = ["3.4e38", "1e30", "1e19", "1e-20", "1e-36", "1e-38", "1e-42", "3e-45"]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_is_the_numpy_statement_bit_for_bit(fmt: WeightFormat, shape: tuple[int, int]) -> None:
    assert_native_agrees(gaussian(shape), fmt)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", SPECIALS + MAGNITUDES)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_native_is_the_numpy_statement_on_odd_weights(fmt: WeightFormat, name: str) -> None:
    assert_native_agrees(special(name, (33, 200)), fmt)


@pytest.mark.parametrize("fmt", FORMATS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_native_is_the_numpy_statement_on_any_finite_weights(fmt: WeightFormat, data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 18), st.integers(1, 70)))
    any_finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    nearby = st.floats(-1, 1, width=32)
    with np.errstate(all="ignore"):
        assert_native_agrees(data.draw(hnp.arrays(np.float32, shape, elements=any_finite | nearby)), fmt)


def test_block_scales_round_to_the_nearest_e4m3_half_to_even() -> None:
    values = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = (values[:-1] + values[1:]) / 2
    around = [np.nextafter(middles, np.float32(0)), middles, np.nextafter(middles, np.float32(448)), values]
    largest = np.concatenate(around)  # of a block each; a panel scale of 1 leaves them as they are
    weights = np.zeros((16, 64 * len(largest)), np.float32)
    weights[0, 0] = 448
    weights[1, ::64] = largest
    weights[1, 1::64] = largest / 2
    for fmt in tiles.SCALED:
        assert_native_agrees(weights, fmt)


@pytest.mark.parametrize("fmt", ["nf4", "int4", "fp4", "fp4_bnb"])
def test_weights_on_thresholds_and_beside_them_get_their_codes(fmt: WeightFormat) -> None:
    """Where a quicker way to a code might err: midpoints and the edges of even buckets, under every scale tried."""
    values = np.unique(tiles.CODEBOOKS[fmt])
    places = np.concatenate(
        [(values[:-1] + values[1:]) * np.float32(0.5), (np.arange(-18, 18, dtype=np.float32) + 0.5) / 15.8]
    )
    rng = np.random.default_rng(3)
    steps = np.arange(8, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for g in (1.0, 3e-7, 1e30):
        scales = np.float32(g) * rng.choice(steps, (160, 8))
        weights = (rng.choice(places, (160, 8, 64)) * scales[:, :, None]).astype(np.float32)
        beside = np.nextafter(weights, rng.choice(np.float32([-np.inf, np.inf]), weights.shape))
        weights = np.where(rng.random(weights.shape) < 0.5, weights, beside).reshape(160, -1)
        weights[::16, 0] = 448 * np.float32(g)  # makes g the panel's scale
        assert_native_agrees(weights, fmt)


def test_every_lane_of_every_format_lies_where_the_specification_says() -> None:
    """The formulas of docs/format.md, one weight at a time, on random bytes."""
    rng = np.random.default_rng(2)
    shape = (20, 64 * 6 + 10)
    p, t = 2, 7
    for fmt in FORMATS:
        c = tiles.CODE_BYTES[fmt]
        a = 32 if fmt == "uint4" else 16 if fmt in tiles.SCALED else 0
        # No NaN as scales, as bf16 or as f32; only uint4 has bytes that may be anything, its zero points among them.
        panels = rng.integers(0, 120, (p, t * (a + c)), np.uint8)
        if fmt == "uint4":
            panels[rng.random(panels.shape) < 0.3] ^= 0x80
        scales = np.array([0.5, 3.0], np.float32)
        values = tiles.unpack(panels, scales if a else None, fmt, shape)
        np.testing.assert_array_equal(native_unpack(panels, scales, fmt, shape), values)
        for row, column in zip(rng.integers(0, shape[0], 300), rng.integers(0, shape[1], 300), strict=True):
            panel, n, tile, k = panels[row // 16].tobytes(), int(row) % 16, int(column) // 64, int(column) % 64
            g, i = divmod(tile, 4)
            in_group = min(4, t - 4 * g)
            codes = panel[g * 4 * (a + c) + a * in_group + i * c :][:c]
            if fmt in tiles.CODEBOOKS:
                byte = codes[k // 8 * 64 + n * 4 + k % 4]
                value = tiles.CODEBOOKS[fmt][byte & 15 if k % 8 < 4 else byte >> 4]
                if fmt == "uint4":
                    value -= np.float32(np.uint8(panel[g * 4 * (a + c) + a * i + 16 + n]).view(np.int8))
            elif fmt == "int8":
                value = np.float32(np.int8(codes[k // 4 * 64 + n * 4 + k % 4])) / np.float32(127)
            elif fmt == "bf16":
                place = [0, 2, 4, 6, 1, 3, 5, 7].index(k % 8)
                word = (k // 8 * 4 + place // 2) * 32 + n * 2 + place % 2
                value = np.frombuffer(codes, ml_dtypes.bfloat16)[word].astype(np.float32)
            else:
                value = np.frombuffer(codes, np.float32)[k * 16 + n]
            if a:
                byte = panel[g * 4 * (a + c) + a * i + n]
                value = scales[row // 16] * np.uint8(byte).view(ml_dtypes.float8_e4m3fn).astype(np.float32) * value
            assert values[row, column] == value, (fmt, row, column)


@pytest.mark.parametrize("fmt", [fmt for fmt in tiles.SCALED if fmt != "uint4"])
def test_weights_on_the_grid_come_back_exactly(fmt: WeightFormat) -> None:
    rng = np.random.default_rng(3)
    book = tiles.CODEBOOKS.get(fmt, np.arange(-127, 128, dtype=np.float32) / np.float32(127))
    g, scale_bytes = np.float32(2**-10), rng.integers(1, 127, (16, 4)).astype(np.uint8)
    scale_bytes[0, 0] = 126  # with it the panel's largest weight is 448 g
    codes = book[rng.integers(0, len(book), (16, 4, 64))]
    codes[..., 0] = -1  # and each block's is its scale
    weights = (g * scale_bytes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)[..., None] * codes).reshape(16, 256)
    panels, scales, (error, _) = native_pack(weights, fmt)
    assert scales == [g]
    assert error == 0
    np.testing.assert_array_equal(native_unpack(panels, scales, fmt, weights.shape), weights)


def test_weights_on_a_grid_with_zero_points_come_back_exactly() -> None:
    """Every zero point from 0 to 15, in blocks that have all 16 codes and in some that lack one at an end."""
    rng = np.random.default_rng(3)
    g, scale_bytes = np.float32(2**-10), rng.integers(1, 127, (16, 4)).astype(np.uint8)
    scale_bytes[0, 0] = 126  # with it the panel's widest block is 15 · 448 g wide
    zeros = np.arange(16)[:, None, None]
    codes = rng.integers(0, 16, (16, 4, 64))
    codes[..., :2] = 0, 15
    codes[1:15, 2] = rng.integers(1, 16, (14, 64))  # one scale fits all the same
    scales = g * scale_bytes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    weights = (scales[..., None] * (codes - zeros).astype(np.float32)).reshape(16, 256)
    panels, panel_scales, (error, _) = native_pack(weights, "uint4")
    assert panel_scales == [g]
    assert error == 0
    np.testing.assert_array_equal(native_unpack(panels, panel_scales, "uint4", weights.shape), weights)
    stored = panels[0, :128].reshape(4, 2, 16)
    np.testing.assert_array_equal(stored[[0, 1, 3], 0], scale_bytes.T[[0, 1, 3]])
    np.testing.assert_array_equal(stored[[0, 1, 3], 1], np.broadcast_to(np.arange(16), (3, 16)))


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float32, (3, 70), elements=st.floats(-1, 1, width=32) | st.just(0)), st.floats(-2, 2, width=32))
def test_zero_stays_zero_beside_any_weights(weights: NDArray[np.float32], offset: float) -> None:
    """What is padding, and what somebody pruned: in a format whose codes need not have a 0."""
    weights = np.where(weights == 0, 0, weights + np.float32(offset)).astype(np.float32)
    panels, scales, _ = native_pack(weights, "uint4")
    values = native_unpack(panels, scales, "uint4", (16, 128))
    assert (values[:3, :70][weights == 0] == 0).all()
    assert (values[3:] == 0).all()
    assert (values[:, 70:] == 0).all()


def test_one_block_packed_by_hand() -> None:
    """Codes 15, 0, 12 and 4 under the block scale 448 · 2^-9: byte 126, panel scale 2^-9. Zeros are code 7."""
    weights = np.zeros((1, 64), np.float32)
    weights[0, [0, 1, 4, 9]] = tiles.CODEBOOKS["nf4"][[15, 0, 12, 4]] * np.float32(448 * 2**-9)
    panels, scales, (error, _) = native_pack(weights, "nf4")
    assert error == 0
    assert scales == [2**-9]
    assert panels.shape == (1, 528)
    assert panels[0, :16].tolist() == [126] + [0] * 15
    expected = np.full((8, 16, 4), 0x77, np.uint8)
    expected[0, 0, :2] = 0xCF, 0x70
    expected[1, 0, 1] = 0x74
    np.testing.assert_array_equal(panels[0, 16:].reshape(8, 16, 4), expected)


def test_a_block_is_mirrored_where_that_is_closer() -> None:
    """INT4 has -1 but not 1, so a block whose largest weight is positive fits better upside down."""
    weights = np.zeros((16, 64), np.float32)
    weights[:, 0] = 1
    weights[1:, 0] = -1
    panels, scales, _ = native_pack(weights, "int4")
    assert (panels[0, :16] >> 7).tolist() == [1] + [0] * 15
    assert (native_unpack(panels, scales, "int4", (16, 64))[:, 0] > 0).tolist() == [True] + [False] * 15


def test_relative_error_on_gaussian_weights() -> None:
    weights = gaussian((256, 1024))
    measured = {}
    for fmt in FORMATS:
        panels, scales, (error, reference) = native_pack(weights, fmt)
        measured[fmt] = np.sqrt(error / reference)
        actual = tiles.unpack(panels, scales if fmt in tiles.SCALED else None, fmt, weights.shape).astype(np.float64)
        # Float32 sums of 64 terms each, so a relative error of at most 64 · 2^-24 and that of the terms.
        assert error == pytest.approx(((weights - actual) ** 2).sum(), rel=1e-5, abs=1e-12)
        assert reference == pytest.approx((weights.astype(np.float64) ** 2).sum(), rel=1e-5)
    assert measured["nf4"] < measured["uint4"] < measured["int4"] < measured["fp4"]
    expected = {"nf4": 0.085, "uint4": 0.0887, "int4": 0.0915, "fp4": 0.099, "int8": 0.0062, "bf16": 0.00166}
    assert {fmt: measured[fmt] for fmt in expected} == pytest.approx(expected, rel=0.02)
    assert measured["f32"] == 0


@pytest.mark.parametrize("fmt", FORMATS)
def test_bf16_and_f16_rows_are_the_same_as_their_float32(fmt: WeightFormat) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every_half = np.where(np.isfinite(halves), halves, np.float16(0)).reshape(64, 1024)
    for rows in (every_half, gaussian((40, 300)).astype(ml_dtypes.bfloat16)):
        expected = native_pack(rows.astype(np.float32), fmt)
        actual = native_pack(rows, fmt)
        np.testing.assert_array_equal(actual[0], expected[0])
        np.testing.assert_array_equal(actual[1], expected[1])


@pytest.mark.parametrize("fmt", FORMATS)
def test_threads_and_isas_change_nothing(fmt: WeightFormat) -> None:
    weights = gaussian((333, 130))
    expected = native_pack(weights, fmt)
    for threads in (1, 2, 5, 100):
        for isa in ISAS:
            actual = native_pack(weights, fmt, isa, threads)
            np.testing.assert_array_equal(actual[0], expected[0])
            assert actual[2] == expected[2]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused_with_its_row(dtype: Any, value: float) -> None:
    weights = gaussian((70, 100)).astype(dtype)
    weights[37, 99] = value
    weights[60, 0] = value
    for threads in (1, 4):
        with pytest.raises(ValueError, match="row 37 holds NaN or infinity"):
            native_pack(weights, "nf4", threads=threads)


def test_wrong_arguments_are_refused() -> None:
    rows, panels, scales = gaussian((16, 64)), np.empty((1, 528), np.uint8), np.empty(1, np.float32)
    for bad in (
        (rows, "nf5", panels, scales),
        (rows, "nf4", panels[:, :500].copy(), scales),
        (rows, "nf4", np.empty((2, 528), np.uint8), scales),
        (rows, "nf4", panels, np.empty(2, np.float32)),
        (rows, "nf4", panels, None),
        (rows.astype(np.float64), "nf4", panels, scales),
        (rows, "nf4", panels, scales, 1, "sse9"),
    ):
        with pytest.raises(ValueError):  # noqa: PT011 (each says another thing)
            _core.pack(*bad)


def test_bits_per_weight_count_everything() -> None:
    assert tiles.bits_per_weight("nf4", (8192, 8192)) == 4 + 8 / 64 + 32 / (16 * 8192)
    assert tiles.bits_per_weight("nf4", (576, 576)) == pytest.approx(4.1285, abs=1e-4)
    assert tiles.bits_per_weight("uint4", (8192, 8192)) == 4 + 16 / 64 + 32 / (16 * 8192)
    assert tiles.bits_per_weight("int8", (16, 64)) == 8 + 8 / 64 + 32 / (16 * 64)
    assert tiles.bits_per_weight("bf16", (16, 64)) == 16
    assert tiles.bits_per_weight("f32", (8, 64)) == 64  # half of the panel is padding
