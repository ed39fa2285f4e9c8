"""The tile format in plain numpy: docs/format.md as code, slow and obvious. The native packer is tested against it.

Shape letters: N outputs (rows of a weight), K inputs, P panels of 16 outputs, T tiles of 64 inputs.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fourfold.config import WeightFormat

TILE_N = 16  # outputs a tile
TILE_K = 64  # inputs a tile: the quantization block
GROUP_TILES = 4  # tiles whose scales lie together

CODE_BYTES: dict[WeightFormat, int] = {
    **{"nf4": 512, "int4": 512, "fp4": 512, "fp4_bnb": 512, "uint4": 512},
    **{"int8": 1024, "bf16": 2048, "f32": 4096},
}
# Those with a byte per output and tile, and a float32 per panel.
SCALED: tuple[WeightFormat, ...] = ("nf4", "int4", "fp4", "fp4_bnb", "uint4", "int8")
ZEROED: tuple[WeightFormat, ...] = ("uint4",)  # with a second byte per output and tile, the zero point
SCALE_BYTES: dict[WeightFormat, int] = {
    fmt: TILE_N * ((fmt in SCALED) + (fmt in ZEROED)) for fmt in CODE_BYTES
}  # a tile
MIRRORED: tuple[WeightFormat, ...] = ("nf4", "int4")  # whose codebooks are not symmetric

# Value of each code as stored.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32) / np.float32(6)
_TWELFTHS = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
# fmt: off
CODEBOOKS: dict[WeightFormat, NDArray[np.float32]] = {
    # QLoRA, arXiv 2305.14314, appendix E.
    "nf4": np.array([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ], np.float32),
    "int4": (np.arange(16, dtype=np.float32) - 8) / np.float32(8),
    "fp4": np.concatenate([_E2M1, -_E2M1]),
    "fp4_bnb": np.concatenate([_TWELFTHS, -_TWELFTHS]),  # the FP4 of bitsandbytes
    "uint4": np.arange(16, dtype=np.float32),  # less the zero point
}
# fmt: on
PAIR_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # how bf16 holds the 8 inputs of a group

_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)  # by byte
_MAX_E4M3 = np.float32(448)
PANEL_SCALES = 32  # tried where codes are kept
MOST_MULTIPLE = 16  # of int8 codes that are kept


def n_panels(n: int) -> int:
    return -(-n // TILE_N)


def n_tiles(k: int) -> int:
    return -(-k // TILE_K)


def panel_bytes(fmt: WeightFormat, k: int) -> int:
    """Bytes of a panel, its float32 scale not included."""
    return n_tiles(k) * (CODE_BYTES[fmt] + SCALE_BYTES[fmt])


def stored_bytes(fmt: WeightFormat, shape: tuple[int, int]) -> int:
    """Bytes of a matrix (N, K), all included: codes, scales, panel scales, padding."""
    return n_panels(shape[0]) * (panel_bytes(fmt, shape[1]) + (4 if fmt in SCALED else 0))


def bits_per_weight(fmt: WeightFormat, shape: tuple[int, int]) -> float:
    """What a weight of a matrix (N, K) costs, all included."""
    return 8 * stored_bytes(fmt, shape) / (shape[0] * shape[1])


def pack(weights: NDArray[np.float32], fmt: WeightFormat) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
    """Finite float32 (N, K) to panels uint8 (P, panel_bytes) and panel scales float32 (P,), or None where unscaled."""
    n, k = weights.shape
    p, t = n_panels(n), n_tiles(k)
    padded = np.zeros((p * TILE_N, t * TILE_K), np.float32)
    padded[:n, :k] = weights
    blocks = padded.reshape(p, TILE_N, t, TILE_K)
    if fmt not in SCALED:
        return _place_codes(blocks, fmt).reshape(p, -1), None
    panel_scales = _ideal_scales(blocks, fmt).max(axis=(1, 2)) / _MAX_E4M3
    with np.errstate(all="ignore"):  # the largest and the smallest float32 overflow on the way
        scale_bytes, zeros, codes = _choose(blocks, panel_scales[:, None, None], fmt)
    return _join_groups(_beside(scale_bytes, zeros, fmt), _place_codes(codes, fmt)), panel_scales


def place(
    codes: NDArray[np.uint8],
    block_scales: NDArray[np.float32],
    fmt: WeightFormat,
    block_zeros: NDArray[np.int8] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes (N, K) as they are, K a multiple of 64, under finite scales (N, K / 64): panels and panel scales as `pack`.

    Of a format with scales; with zero points (N, K / 64) where it has them. Section 4 says how the scales are rounded
    to the two that the format has.
    """
    n, k = codes.shape
    p, t = n_panels(n), n_tiles(k)
    padded = np.full((p * TILE_N, k), _zero_code(fmt), np.uint8)
    padded[:n] = codes
    scales = np.zeros((p * TILE_N, t), np.float32)
    scales[:n] = block_scales
    blocks, wanted = padded.reshape(p, TILE_N, t, TILE_K), scales.reshape(p, TILE_N, t)
    zeros = np.zeros((p, TILE_N, t), np.int8)
    zeros.reshape(-1, t)[:n] = 0 if block_zeros is None else block_zeros
    values = _values(blocks, zeros, fmt)
    squares = np.square(values.astype(np.float64)).cumsum(axis=3)[..., -1]  # added in the order of k
    most = np.abs(blocks.view(np.int8).astype(np.int32)).max(axis=3)
    multiples = np.clip(127 // np.maximum(most, 1), 1, MOST_MULTIPLE) * (most > 0) if fmt == "int8" else most * 0

    panel_scales = np.abs(wanted).max(axis=(1, 2)) / _MAX_E4M3
    if fmt != "int8":
        least, best_error = panel_scales, np.full(p, np.inf)
        for i in range(PANEL_SCALES):
            g = least * (np.float32(1) + np.float32(i) / np.float32(PANEL_SCALES))
            errors = squares * _place_scales(wanted, g, multiples)[2]
            error = errors.transpose(0, 2, 1).reshape(p, -1).cumsum(axis=1)[:, -1]  # tile by tile, output by output
            is_better = error < best_error
            panel_scales, best_error = np.where(is_better, g, panel_scales), np.where(is_better, error, best_error)
    scale_bytes, multiple, _ = _place_scales(wanted, panel_scales, multiples)
    if fmt == "int8":
        blocks = (blocks.view(np.int8) * multiple[..., None].astype(np.int8)).view(np.uint8)
    return _join_groups(_beside(scale_bytes, zeros, fmt), _place_codes(blocks, fmt)), panel_scales


def unpack(
    panels: NDArray[np.uint8], panel_scales: NDArray[np.float32] | None, fmt: WeightFormat, shape: tuple[int, int]
) -> NDArray[np.float32]:
    """Inverse of `pack`: float32 (N, K), value = panel_scale · e4m3(scale byte) · (codebook[code] - zero point)."""
    n, k = shape
    p, t = n_panels(n), n_tiles(k)
    scale_bytes, tiles = _split_groups(panels.reshape(p, -1), t, fmt)
    zeros = scale_bytes[..., TILE_N:].view(np.int8).transpose(0, 2, 1) if fmt in ZEROED else np.zeros(1, np.int8)
    blocks = _values(_take_codes(tiles, fmt), zeros, fmt)  # (P, 16, T, 64)
    if panel_scales is not None:
        scales = panel_scales[:, None, None] * _E4M3[scale_bytes[..., :TILE_N]].transpose(0, 2, 1)  # (P, 16, T)
        blocks = scales[..., None] * blocks
    return blocks.reshape(p * TILE_N, t * TILE_K)[:n, :k]


def _place_scales(
    wanted: NDArray[np.float32], panel_scales: NDArray[np.float32], multiples: NDArray[np.int32]
) -> tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.float64]]:
    """Scales (P, 16, T) under panel scales (P,): bytes, multiples of the codes (at most `multiples`), errors²."""
    magnitude = np.abs(wanted)
    best_byte, best_multiple = np.zeros(wanted.shape, np.uint8), np.ones(wanted.shape, np.int32)
    best_error = np.full(wanted.shape, np.inf)
    for multiple in range(1, max(1, int(multiples.max(initial=1))) + 1):
        step = (np.float32(multiple) * panel_scales)[:, None, None]
        with np.errstate(all="ignore"):  # 0 / 0, and what overflows under a panel scale that underflowed
            ratio = np.where(magnitude == 0, 0, np.minimum(magnitude / step, _MAX_E4M3))
        byte = ratio.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        error = np.square(magnitude.astype(np.float64) - step.astype(np.float64) * _E4M3[byte].astype(np.float64))
        is_better = (error < best_error) & ((multiple == 1) | (multiple <= multiples))
        best_byte = np.where(is_better, byte, best_byte)
        best_multiple = np.where(is_better, multiple, best_multiple)
        best_error = np.where(is_better, error, best_error)
    sign = np.where(np.signbit(wanted) & (best_byte != 0), 128, 0)
    return (best_byte | sign).astype(np.uint8), best_multiple, best_error


def _zero_code(fmt: WeightFormat) -> int:
    """The code of the value 0."""
    return 0 if fmt == "int8" else int(np.flatnonzero(CODEBOOKS[fmt] == 0)[0])


def _span(blocks: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The least and the largest weight of blocks (..., 64), 0 counted among them."""
    return np.minimum(blocks.min(axis=-1), np.float32(0)), np.maximum(blocks.max(axis=-1), np.float32(0))


def _ideal_scales(blocks: NDArray[np.float32], fmt: WeightFormat) -> NDArray[np.float32]:
    """The scales under which the format's values reach as far as the weights of blocks (..., 64)."""
    if fmt not in ZEROED:
        largest: NDArray[np.float32] = np.abs(blocks).max(axis=-1)
        return largest
    low, high = _span(blocks)
    return high / np.float32(15) - low / np.float32(15)


def _zero_points(blocks: NDArray[np.float32], s: NDArray[np.float32], step: int) -> NDArray[np.int8]:
    """0 .. 15, `step` above the whole one at or below that for which code 7.5 stands for a block's middle."""
    low, high = _span(blocks)
    middle = high * np.float32(0.5) + low * np.float32(0.5)
    exact = np.float32(7.5) - middle / s
    below = np.where(exact > 0, np.floor(np.minimum(exact, np.float32(15))), 0)  # NaN is not above 0
    zeros: NDArray[np.int8] = np.minimum(below + step, 15).astype(np.int8)
    return zeros


def _choose(
    blocks: NDArray[np.float32], g: NDArray[np.float32], fmt: WeightFormat
) -> tuple[NDArray[np.uint8], NDArray[np.int8], NDArray[np.uint8]]:
    """Section 4 for blocks (P, 16, T, 64) and panel scales (P, 1, 1).

    Gives scale bytes (P, 16, T), zero points (P, 16, T), all 0 in formats without, and codes (P, 16, T, 64).
    """
    ideal = _ideal_scales(blocks, fmt)
    nearest = (ideal / g).astype(ml_dtypes.float8_e4m3fn).view(np.uint8).astype(np.int32)
    best_error = np.full(ideal.shape, np.inf, np.float32)
    best_byte = best_codes = None
    best_zeros = np.zeros(ideal.shape, np.int8)
    for second in (False, True) if fmt in MIRRORED + ZEROED else (False,):
        mirrored = second and fmt in MIRRORED
        weights = -blocks if mirrored else blocks
        for step in (-2, -1, 0, 1):
            byte = np.clip(nearest + step, 1, 126)
            s = g * _E4M3[byte]
            zeros = _zero_points(blocks, s, int(second)) if fmt in ZEROED else best_zeros
            s = s[..., None]
            codes = _nearest_codes(weights, s, zeros, fmt)
            values = s * _values(codes, zeros, fmt)
            error = np.zeros_like(best_error)
            for k in range(TILE_K):
                miss = weights[..., k] - values[..., k]
                error += miss * miss
            byte = byte + 128 * mirrored
            if best_byte is None or best_codes is None:  # the first stands unless one is better
                best_byte, best_zeros, best_codes = byte, zeros, codes
            is_better = error < best_error
            best_error = np.where(is_better, error, best_error)
            best_byte = np.where(is_better, byte, best_byte)
            best_zeros = np.where(is_better, zeros, best_zeros)
            best_codes = np.where(is_better[..., None], codes, best_codes)
    assert best_byte is not None
    assert best_codes is not None
    is_zero = ideal == 0
    codes = np.where(is_zero[..., None], _zero_code(fmt), best_codes).astype(np.uint8)
    zeros = np.where(is_zero, 0, best_zeros).astype(np.int8)
    return np.where(is_zero, 0, best_byte).astype(np.uint8), zeros, codes


def _nearest_codes(
    weights: NDArray[np.float32], s: NDArray[np.float32], zeros: NDArray[np.int8], fmt: WeightFormat
) -> NDArray[np.uint8]:
    """Codes as stored, of weights (..., 64) under block scales (..., 1) and zero points (...)."""
    if fmt in ZEROED:
        ratio = np.where(weights == 0, 0, weights * (np.float32(1) / s))  # 0 also where 1 / s overflows
        zero = zeros[..., None].astype(np.float32)
        codes: NDArray[np.uint8] = (np.rint(np.clip(ratio, -zero, 15 - zero)) + zero).astype(np.uint8)
        return codes
    if fmt == "int8":
        ratio = weights * (np.float32(127) / s)
        ratio = np.where(weights == 0, 0, np.clip(np.rint(ratio), -127, 127))  # 0 also where 127 / s overflows
        return ratio.astype(np.int8).view(np.uint8)
    stored = np.unique(CODEBOOKS[fmt], return_index=True)[1]  # in ascending order; fp4's two zeros count once
    ascending = CODEBOOKS[fmt][stored]
    place = np.zeros(weights.shape, np.intp)
    for midpoint in (ascending[:-1] + ascending[1:]) * np.float32(0.5):
        place += weights > midpoint * s
    return stored.astype(np.uint8)[place]


def _values(codes: NDArray[np.generic], zeros: NDArray[np.int8], fmt: WeightFormat) -> NDArray[np.float32]:
    """What codes (..., 64) stand for under zero points (...), scales aside."""
    if fmt in CODEBOOKS:
        values: NDArray[np.float32] = CODEBOOKS[fmt][codes] - zeros[..., None].astype(np.float32)
        return values
    if fmt == "int8":
        return codes.view(np.int8).astype(np.float32) / np.float32(127)
    return codes.astype(np.float32)


def _place_codes(codes: NDArray[np.generic], fmt: WeightFormat) -> NDArray[np.uint8]:
    """Codes (P, 16, T, 64), or weights where unscaled, to tiles (P, T, bytes) in the order of section 1."""
    p, _, t, _ = codes.shape
    if fmt == "f32":
        laid = codes.transpose(0, 2, 3, 1)  # (P, T, k, n)
    elif fmt == "bf16":
        pairs = codes.astype(ml_dtypes.bfloat16).reshape(p, TILE_N, t, 8, 8)[..., PAIR_ORDER]
        laid = pairs.reshape(p, TILE_N, t, 8, 4, 2).transpose(0, 2, 3, 4, 1, 5)  # (P, T, group, pair, n, e)
    elif fmt == "int8":
        laid = codes.reshape(p, TILE_N, t, 16, 4).transpose(0, 2, 3, 1, 4)  # (P, T, k / 4, n, k % 4)
    else:
        halves = codes.reshape(p, TILE_N, t, 8, 2, 4).transpose(4, 0, 2, 3, 1, 5)  # (half, P, T, k / 8, n, k % 4)
        laid = halves[0] | halves[1] << 4
    return np.ascontiguousarray(laid).view(np.uint8).reshape(p, t, CODE_BYTES[fmt])


def _take_codes(tiles: NDArray[np.uint8], fmt: WeightFormat) -> NDArray[np.generic]:
    """Inverse of `_place_codes`."""
    p, t, _ = tiles.shape
    if fmt == "f32":
        return tiles.view(np.float32).reshape(p, t, TILE_K, TILE_N).transpose(0, 3, 1, 2)
    if fmt == "bf16":
        pairs = tiles.view(ml_dtypes.bfloat16).reshape(p, t, 8, 4, TILE_N, 2).transpose(0, 4, 1, 2, 3, 5)
        groups: NDArray[np.generic] = pairs.reshape(p, TILE_N, t, 8, 8)[..., np.argsort(PAIR_ORDER)]
        return groups.reshape(p, TILE_N, t, TILE_K)
    if fmt == "int8":
        return tiles.reshape(p, t, 16, TILE_N, 4).transpose(0, 3, 1, 2, 4).reshape(p, TILE_N, t, TILE_K)
    both = np.stack([tiles & 15, tiles >> 4]).reshape(2, p, t, 8, TILE_N, 4)
    return both.transpose(1, 4, 2, 3, 0, 5).reshape(p, TILE_N, t, TILE_K)


def _beside(scale_bytes: NDArray[np.uint8], zeros: NDArray[np.int8], fmt: WeightFormat) -> NDArray[np.uint8]:
    """Scale bytes and zero points (P, 16, T) as they lie, (P, T, bytes of scales a tile)."""
    both = np.concatenate([scale_bytes, zeros.view(np.uint8)], axis=1).transpose(0, 2, 1)
    return both[..., : SCALE_BYTES[fmt]]


def _join_groups(scales: NDArray[np.uint8], codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Scales (P, T, S) and codes (P, T, C) to panels: of every four tiles the scales, then the codes."""
    p, t, _ = codes.shape
    parts = []
    for first in range(0, t, GROUP_TILES):
        group = slice(first, first + GROUP_TILES)
        parts += [scales[:, group].reshape(p, -1), codes[:, group].reshape(p, -1)]
    return np.concatenate(parts, axis=1)


def _split_groups(panels: NDArray[np.uint8], t: int, fmt: WeightFormat) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Inverse of `_join_groups`: scales (P, T, S), S being 0 where unscaled, and codes (P, T, C)."""
    p, n_scale, n_code = len(panels), SCALE_BYTES[fmt], CODE_BYTES[fmt]
    scales, codes, at = [], [], 0
    for first in range(0, t, GROUP_TILES):
        tiles = min(GROUP_TILES, t - first)
        scales.append(panels[:, at : at + tiles * n_scale].reshape(p, tiles, n_scale))
        at += tiles * n_scale
        codes.append(panels[:, at : at + tiles * n_code].reshape(p, tiles, n_code))
        at += tiles * n_code
    return np.concatenate(scales, axis=1), np.ascontiguousarray(np.concatenate(codes, axis=1))
