"""Every row of the table of linear kernels, against float64 sums over the unpacked weights.

Tolerances are computed for each output, from the units of error that its row declares (csrc/kernels/kernels.h).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold import format as tiles

ROWS: dict[str, dict[str, Any]] = {row["name"]: row for row in _core.linear_kernels()}
ISAS = _core.read_machine().isas()
EPS = 2.0**-24  # of float32, to nearest
SMALLEST = 2.0**-126  # of normal float32; some instructions take smaller numbers for zero

MS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64)
NS = (1, 16, 17, 40, 100)
KS = (1, 63, 64, 65, 200, 256, 320, 576)
SHAPES = list(product(MS, NS, KS))[::3]  # 3 divides no length, so that any two sizes meet

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Matrix:
    """A weight in the tile format and as the numbers that it stands for."""

    panels: NDArray[np.uint8]
    panel_scales: Floats | None
    values: NDArray[np.float64]  # (N, K)
    scales: NDArray[np.float64]  # (N, K): the scale of each weight's block; 0 where unscaled


def pack(weights: Floats, fmt: Any) -> Matrix:
    n, k = weights.shape
    panels = np.empty((tiles.n_panels(n), tiles.panel_bytes(fmt, k)), np.uint8)
    panel_scales = np.empty(len(panels), np.float32) if fmt in tiles.SCALED else None
    _core.pack(weights, fmt, panels, panel_scales, 1, ISAS[-1])
    values = tiles.unpack(panels, panel_scales, fmt, (n, k)).astype(np.float64)
    return Matrix(panels, panel_scales, values, _block_scales(panels, panel_scales, fmt, n, k))


def _block_scales(panels: Any, panel_scales: Floats | None, fmt: Any, n: int, k: int) -> NDArray[np.float64]:
    """docs/format.md, section 3."""
    if panel_scales is None:
        return np.zeros((n, k))
    step = 32 if fmt == "uint4" else 16
    tile = step + tiles.CODE_BYTES[fmt]
    at = [t // 4 * 4 * tile + t % 4 * step for t in range(tiles.n_tiles(k))]
    columns = [panels[:, i : i + 16].reshape(-1) for i in at]  # for each tile a byte per output
    scales = np.stack(columns, axis=1).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return np.abs(np.repeat(scales * np.repeat(panel_scales, 16)[:, None], 64, axis=1)[:n, :k])


def run(name: str, x: Floats, matrix: Matrix, pack_isa: str | None = None) -> Floats:
    """y (M, 16 panels) by the row of that name, which must leave what lies before and behind y as it was."""
    isa = ROWS[name]["isa"]
    if isa not in ISAS:
        pytest.skip(f"{name} needs {isa}")
    m, width, margin = len(x), 16 * len(matrix.panels), 512
    around = np.full(margin + m * width + 16 * width, -77, np.float32)
    y = around[margin : margin + m * width].reshape(m, width)
    _core.linear(name, pack_isa or isa, matrix.panels, matrix.panel_scales, x, y)
    outside = np.delete(around, np.s_[margin : margin + m * width])
    assert (outside == -77).all(), f"{name} wrote outside of y at M = {m}"
    return y


def tolerance(name: str, x: Floats, matrix: Matrix) -> NDArray[np.float64]:
    """What the row's declared units allow each output (M, N)."""
    row, size, k = ROWS[name], np.abs(x.astype(np.float64)), x.shape[1]
    w = np.abs(matrix.values)
    largest = np.stack([size[:, t : t + 64].max(axis=1) for t in range(0, k, 64)], axis=1)  # (M, T)
    product_size = size @ w.T
    declared = (row["weight_rel"] + row["x_rel"]) * product_size
    declared += row["weight_abs"] * (size @ matrix.scales.T)
    declared += row["x_abs"] * (np.repeat(largest, 64, axis=1)[:, :k] @ w.T)
    return declared + EPS * (k + 16) * (product_size + declared) + k * SMALLEST


def check(name: str, x: Floats, matrix: Matrix) -> None:
    n = len(matrix.values)
    got, expected = run(name, x, matrix), x.astype(np.float64) @ matrix.values.T
    _compare(f"{name} at {(*x.shape, n)}", got[:, :n], expected, tolerance(name, x, matrix))
    assert (got[:, n:] == 0).all(), f"{name}: outputs beyond N are not zero"


def _compare(what: str, got: Any, expected: Any, allowed: Any) -> None:
    """Every element, and where one is wrong the worst of them in full."""
    miss = np.abs(got - expected)
    excess = np.where(np.isfinite(got), miss - allowed, np.inf)
    i, j = np.unravel_index(excess.argmax(), excess.shape)
    assert excess[i, j] <= 0, (
        f"{what}: y[{i}][{j}] is {got[i, j]:.9g}, not {expected[i, j]:.9g}: "
        f"{miss[i, j]:.3g} off where {allowed[i, j]:.3g} is allowed; {(excess > 0).sum()} of {excess.size} are wrong"
    )


@cache
def some_matrix(fmt: str, n: int, k: int) -> Matrix:
    rng = np.random.default_rng(n * 1000 + k)
    spread = np.exp2(rng.uniform(-4, 4, (n, 1)))  # outputs of different size share a panel
    return pack((rng.standard_normal((n, k)) * spread).astype(np.float32), fmt)


def some_rows(m: int, k: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed + m).standard_normal((m, k), dtype=np.float32)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_as_exact_as_it_declares_at_every_shape(name: str) -> None:
    for m, n, k in SHAPES:
        check(name, some_rows(m, k), some_matrix(ROWS[name]["format"], n, k))


@pytest.mark.parametrize("name", ROWS)
def test_inputs_with_known_answers(name: str) -> None:
    matrix = some_matrix(ROWS[name]["format"], 40, 200)
    check(name, np.ones((3, 200), np.float32), matrix)
    check(name, np.full((17, 200), -1, np.float32), matrix)
    assert (run(name, np.zeros((9, 200), np.float32), matrix) == 0).all()
    one_hot = np.eye(200, dtype=np.float32)
    check(name, one_hot, matrix)  # every input picks its column of the weights
    if ROWS[name]["activation"] == "f32":
        np.testing.assert_allclose(run(name, one_hot, matrix)[:, :40], matrix.values.T, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("name", ROWS)
def test_large_and_small_inputs(name: str) -> None:
    matrix = some_matrix(ROWS[name]["format"], 40, 320)
    x = some_rows(17, 320)
    for factor in (1e-20, 1e-6, 1e6, 1e20):
        check(name, x * np.float32(factor), matrix)
    outliers = x.copy()
    outliers[:, 64:128] *= 1e4  # one tile: the others must not lose digits to it
    check(name, outliers, matrix)
    outliers[::2] = x[::2]  # nor rows to their neighbours
    outliers[5, 300] = 1e8
    check(name, outliers, matrix)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("size", [1e-8, 1e4, 1e7])
def test_large_and_small_weights(name: str, size: float) -> None:
    weights = np.random.default_rng(3).standard_normal((33, 130), dtype=np.float32) * np.float32(size)
    weights[:, 64:] *= 1e-3  # a tile of small scales
    weights[4] = 0
    weights[16:32] = 0  # a panel of zeros
    check(name, some_rows(9, 130), pack(weights, ROWS[name]["format"]))


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["format"] == "uint4"])
def test_zero_points_may_be_any_byte_and_scales_of_either_sign(name: str) -> None:
    rng = np.random.default_rng(7)
    panels = rng.integers(0, 256, (3, tiles.panel_bytes("uint4", 700)), np.uint8)
    for t in range(11):
        at = t // 4 * 4 * 544 + t % 4 * 32
        panels[:, at : at + 16] = rng.integers(8, 127, (3, 16)) | rng.choice([0, 128], (3, 16))
    panels[0, 16:32] = np.arange(16) - 128
    panels[0, 48:64] = np.arange(16) + 112
    panel_scales = np.float32([1e-3, 1, 30])
    values = tiles.unpack(panels, panel_scales, "uint4", (48, 704)).astype(np.float64)
    matrix = Matrix(panels, panel_scales, values, _block_scales(panels, panel_scales, "uint4", 48, 704))
    for m in (1, 2, 5, 9, 35):
        check(name, some_rows(m, 704), matrix)
    check(name, np.full((17, 704), 1e6, np.float32), matrix)  # the largest sums of codes and of zero points


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["activation"].startswith("i16")])
def test_fixed_point_inputs_are_as_exact_as_declared_where_all_lie_between_two_steps(name: str) -> None:
    x = ((np.arange(1, 65) * 500 + 0.5) / 32512).astype(np.float32)
    x[-1] = 1
    check(name, np.tile(x, (2, 1)), pack(np.ones((16, 64), np.float32), ROWS[name]["format"]))


@pytest.mark.parametrize("name", ROWS)
def test_the_same_call_gives_the_same_bits(name: str) -> None:
    matrix, x = some_matrix(ROWS[name]["format"], 40, 576), some_rows(33, 576)
    first = run(name, x, matrix)
    assert (run(name, x, matrix) == first).all()
    for isa in ISAS:
        assert (run(name, x, matrix, pack_isa=isa) == first).all(), f"inputs packed by {isa} differ"


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["activation"] == "u8"])
def test_inputs_far_from_zero_and_close_to_each_other(name: str) -> None:
    matrix, x = some_matrix(ROWS[name]["format"], 40, 320), some_rows(9, 320)
    check(name, x / 1e3 + np.float32(5), matrix)
    least = run(name, np.float32(1e-32) * x, matrix)[:, :40]  # no step at all
    assert (np.abs(least) <= 1e-30 * np.abs(matrix.values).sum(axis=1)).all()
    check(name, np.sign(x) * np.float32(1e31), pack(some_rows(40, 320), ROWS[name]["format"]))
    assert not np.isfinite(run(name, np.sign(x) * np.float32(3e38), matrix)).any()  # farther apart than any float32


def _outlier_channels(rng: np.random.Generator, shape: tuple[int, int]) -> Any:
    factors = np.ones(shape[1])
    factors[rng.choice(shape[1], shape[1] // 100, replace=False)] = 20
    return rng.standard_normal(shape) * factors


ACTIVATIONS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "all of a sign": lambda rng, shape: rng.standard_normal(shape) + 3,
    "outliers in some channels": _outlier_channels,
    "heavy tails": lambda rng, shape: rng.standard_t(2, shape),
    "gated": lambda rng, shape: (g := rng.standard_normal(shape)) / (1 + np.exp(-g)) * rng.standard_normal(shape),
}


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["format"] == "nf4"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_rounding_stays_below_a_tenth_of_what_nf4_loses(name: str, kind: str) -> None:
    rng = np.random.default_rng(4)
    weights = rng.standard_normal((128, 2048), dtype=np.float32)
    x = ACTIVATIONS[kind](rng, (48, 2048)).astype(np.float32)
    matrix = pack(weights, "nf4")
    exact = x.astype(np.float64) @ matrix.values.T
    lost = np.sqrt(np.mean((exact - x.astype(np.float64) @ weights.T.astype(np.float64)) ** 2))
    assert np.sqrt(np.mean((run(name, x, matrix) - exact) ** 2)) < 0.1 * lost


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["activation"].startswith("i16")])
def test_a_token_alone_has_the_same_bits_as_among_others(name: str) -> None:
    matrix, x = some_matrix(ROWS[name]["format"], 100, 576), some_rows(8, 576)
    alone = np.concatenate([run(name, row[None], matrix) for row in x])
    for m in range(2, 9):
        assert (run(name, x[:m], matrix) == alone[:m]).all()


EMULATED = {a: [r["format"] for name, r in ROWS.items() if name.endswith(f"{a}_amx_emulated")] for a in ("bf16", "i16")}


TILED_SHAPES = ((1, 17, 65), (17, 40, 320), (33, 100, 576), (64, 16, 1100))


@pytest.mark.parametrize("fmt", EMULATED["bf16"])
def test_emulated_tiles_differ_from_vectors_by_the_order_of_sums_alone(fmt: str) -> None:
    for m, n, k in TILED_SHAPES:
        matrix, x = some_matrix(fmt, n, k), some_rows(m, k)
        emulated = run(f"linear_{fmt}_bf16_amx_emulated", x, matrix)[:, :n]
        vectors = run(f"linear_{fmt}_bf16_avx512", x, matrix)[:, :n]
        size = np.abs(x.astype(np.float64)) @ np.abs(matrix.values.T)
        _compare(f"{fmt} at {(m, n, k)}", emulated, vectors, 2 * EPS * (k + 16) * 1.02 * size)


@pytest.mark.parametrize("fmt", EMULATED["bf16"])
def test_the_tile_unit_sums_as_its_manual_says(fmt: str) -> None:
    for m, n, k in TILED_SHAPES:
        matrix, x = some_matrix(fmt, n, k), some_rows(m, k)
        assert (run(f"linear_{fmt}_bf16_amx", x, matrix) == run(f"linear_{fmt}_bf16_amx_emulated", x, matrix)).all()


@pytest.mark.parametrize("fmt", EMULATED["i16"])
@pytest.mark.parametrize("tiles_of", ["amx_emulated", "amx"])
def test_byte_tiles_give_the_bits_of_the_vector_kernel(fmt: str, tiles_of: str) -> None:
    for m, n, k in ((1, 17, 65), (4, 16, 64), (5, 40, 320), (8, 40, 576), (16, 33, 200), (17, 40, 320), (35, 16, 1100)):
        matrix, x = some_matrix(fmt, n, k), some_rows(m, k)
        assert (run(f"linear_{fmt}_i16_{tiles_of}", x, matrix) == run(f"linear_{fmt}_i16_avx512", x, matrix)).all()


@pytest.mark.parametrize("name", [name for name in ROWS if name.endswith(("_avx512_vnni", "_i16_avx2"))])
def test_a_lower_level_has_the_bits_of_avx512(name: str) -> None:
    """Alone, by twos and fours and what is left of them, and beyond the rows and inputs that are taken together."""
    same = re.sub("_(avx512_vnni|avx2)$", "_avx512", name)
    for m, n, k in ((1, 80, 700), (3, 40, 320), (7, 40, 1100), (17, 40, 576), (49, 48, 640)):
        matrix, x = some_matrix(ROWS[name]["format"], n, k), some_rows(m, k)
        assert (run(name, x, matrix) == run(same, x, matrix)).all()


@pytest.mark.parametrize("tiles_of", ["amx_emulated", "amx"])
def test_i16_tiles_in_parts_where_factors_do_not_fit_in_scratch(tiles_of: str) -> None:
    m, n, k = 35, 16, 64 * 5075  # room for 16 tokens' factors in 5,072 tiles
    rng = np.random.default_rng(3)
    matrix = pack(rng.standard_normal((n, k), np.float32), "nf4")
    x = rng.standard_normal((m, k), np.float32)
    y = run(f"linear_nf4_i16_{tiles_of}", x, matrix)
    assert np.array_equal(y, run("linear_nf4_i16_avx512", x, matrix))


@pytest.mark.parametrize("name", [name for name in ROWS if "_bf16_amx" in name])
@pytest.mark.parametrize("shape", [(530, 290, 700), (33, 530, 1100), (520, 16, 1030)])
def test_tokens_outputs_and_inputs_beyond_one_block_of_tiles(name: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    check(name, some_rows(m, k), some_matrix(ROWS[name]["format"], n, k))


# What a step of M tokens runs in the 4-bit formats; in int8, to which bytes of activations would cost too much; and in
# bf16, where there is nothing to decode.
SCALED = {
    "scalar": {(1, 8, 9, 16, 17, 512): "linear_{}_f32_scalar"},
    "avx2": {(1, 8, 9, 16, 17, 512): "linear_{}_i16_avx2"},
    "avx512_vnni": {(1, 8, 9, 12): "linear_{}_i16_avx512_vnni", (13, 16, 512): "linear_{}_u8_avx512_vnni"},
    "avx512": {(1, 8, 9, 12): "linear_{}_i16_avx512", (13, 16, 512): "linear_{}_u8_avx512"},
    "amx": {(1, 3): "linear_{}_i16_avx512", (4, 16, 32): "linear_{}_i16_amx", (33, 512): "linear_{}_bf16_amx"},
}
INT8 = SCALED | {
    "avx512_vnni": {(1, 8, 9, 16, 17, 512): "linear_{}_i16_avx512_vnni"},
    "avx512": {(1, 8, 9, 16, 17, 32): "linear_{}_i16_avx512", (33, 512): "linear_{}_bf16_avx512"},
}
BF16 = SCALED | {
    "avx2": {(1, 8, 9, 16, 17, 512): "linear_{}_f32_avx2"},
    "avx512_vnni": {(1, 8, 9, 512): "linear_{}_f32_avx512_vnni"},
    "avx512": {(1, 8): "linear_{}_f32_avx512", (9, 512): "linear_{}_bf16_avx512"},
    "amx": {(1, 8): "linear_{}_f32_avx512", (9, 16): "linear_{}_bf16_avx512", (17, 512): "linear_{}_bf16_amx"},
}


@pytest.mark.parametrize("isa", SCALED)
@pytest.mark.parametrize("fmt", tiles.CODE_BYTES)
def test_the_table_chooses_these_rows(isa: str, fmt: str) -> None:
    expected = {"int8": INT8, "bf16": BF16}.get(fmt, SCALED)[isa]
    if fmt == "f32":  # exact at any M
        expected = {(1, 16, 17, 512): f"linear_{{}}_f32_{'avx512' if isa == 'amx' else isa}"}
    for ms, pattern in expected.items():
        assert {m: _core.choose_linear(isa, fmt, m) for m in ms} == dict.fromkeys(ms, pattern.format(fmt))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_stays_so(name: str, bad: float) -> None:
    matrix = some_matrix(ROWS[name]["format"], 16, 200)
    x = np.random.default_rng(5).standard_normal((3, 200), dtype=np.float32)
    x[1, 70] = bad
    got = run(name, x, matrix)
    assert not np.isfinite(got[1]).any()
    assert np.isfinite(got[[0, 2]]).all()
