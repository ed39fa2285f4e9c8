"""Weights that are a scale times a small integer: what GPTQ, AWQ and compressed-tensors each pack in its own way.

Shape letters: N outputs, K inputs, G inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourfold.checkpoint.coded import CodedTensor, Parts, block_type, misfit
from fourfold.config import WeightFormat
from fourfold.errors import CheckpointError, UnsupportedError
from fourfold.format import TILE_K

SCALE_TYPES = ("float16", "bfloat16", "float32")
SCAN_WEIGHTS = 4 << 20  # looked through at a time
INT4_OFFSET = 8  # int4 is (code - 8) / 8
INT8_STEPS = 127  # int8 is code / 127


@dataclass(frozen=True)
class IntegerTensor(CodedTensor):
    """Weights that are a scale times a small integer: scale · (code - zero point), each of 4 bits.

    Of rows [start, stop), `read_codes` gives uint8 (stop - start, K), `read_zeros` int8 (stop - start, groups), both
    from 0 to 15, and `read_scales` float32 (stop - start, groups).
    """

    origin: str
    shape: tuple[int, int]
    group: int  # inputs that share a scale; the last group may have fewer
    read_codes: Callable[[int, int], NDArray[np.uint8]]
    read_zeros: Callable[[int, int], NDArray[np.int8]]
    read_scales: Callable[[int, int], NDArray[np.float32]]
    order: NDArray[np.int32] | None = None  # (K,) the group of each input, where they do not lie in order

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        weights: NDArray[np.float32] = self._integers(start, stop).astype(np.float32)
        weights *= self._of_inputs(self.read_scales(start, stop))
        return weights

    @cached_property
    def formats(self) -> tuple[WeightFormat, ...]:
        if self.fault:
            return ()
        return ("int4", "uint4", "int8") if self._fits_int4() else ("uint4", "int8")

    @property
    def fault(self) -> str | None:
        if self.order is not None:
            return "has inputs in another order than that of their groups (desc_act, actorder), which cannot be kept"
        k = self.shape[1]
        return misfit(self.group, k) if self.group % TILE_K or k % TILE_K else None

    def blocks(self, fmt: WeightFormat, start: int, stop: int) -> NDArray[Any]:
        assert fmt in self.formats
        scales = self._of_blocks(self.read_scales(start, stop))
        rows = np.empty(stop - start, block_type(fmt, self.shape[1]))
        if fmt == "uint4":
            rows["codes"] = self.read_codes(start, stop)
            rows["scales"] = scales
            rows["zeros"] = self._of_blocks(self.read_zeros(start, stop))
            return rows
        integers = self._integers(start, stop)
        if fmt == "int8":
            rows["codes"] = integers.view(np.uint8)
            rows["scales"] = scales * np.float32(INT8_STEPS)
            return rows
        by_block = integers.reshape(stop - start, self.shape[1] // TILE_K, TILE_K)
        sign = np.where(
            by_block.max(axis=2) >= INT4_OFFSET, np.int8(-1), np.int8(1)
        )  # 8 is there only as a mirrored -8
        rows["codes"] = (by_block * sign[..., None] + np.int8(INT4_OFFSET)).reshape(integers.shape).view(np.uint8)
        rows["scales"] = scales * sign * np.float32(INT4_OFFSET)
        return rows

    def _integers(self, start: int, stop: int) -> NDArray[np.int8]:
        """Codes less their zero points, from -15 to 15."""
        codes: NDArray[np.int8] = self.read_codes(start, stop).view(np.int8)
        return codes - self._of_inputs(self.read_zeros(start, stop)).astype(np.int8, copy=False)

    def _of_inputs(self, of_groups: NDArray[Any]) -> NDArray[Any]:
        """(rows, groups) as (rows, K)."""
        if self.order is not None:
            return of_groups[:, self.order]
        return np.repeat(of_groups, self.group, axis=1)[:, : self.shape[1]]

    def _of_blocks(self, of_groups: NDArray[Any]) -> NDArray[Any]:
        """(rows, groups) as (rows, K / 64)."""
        return np.repeat(of_groups, self.group // TILE_K, axis=1)[:, : self.shape[1] // TILE_K]

    def _fits_int4(self) -> bool:
        """Whether each block lies in -8..7 or, mirrored, in -7..8."""
        n, k = self.shape
        step = max(1, SCAN_WEIGHTS // k)
        for start in range(0, n, step):  # one that does not fit does so soon
            stop = min(start + step, n)
            if np.isin(self.read_zeros(start, stop), (7, 8)).all():
                continue  # whatever the codes are
            blocks = self._integers(start, stop).reshape(-1, TILE_K)
            least, most = blocks.min(axis=1), blocks.max(axis=1)
            if not (((least >= -8) & (most <= 7)) | ((least >= -7) & (most <= 8))).all():
                return False
        return True


def n_groups(group: int, k: int) -> int:
    """Groups of K inputs, of which the last may have fewer than G."""
    return -(-k // group)


def whole_group(group: int | None, k: int, module: str, parts: Parts) -> int:
    """G, or K where it is None: one scale an output. Raises CheckpointError where groups do not divide K."""
    group = group or k
    if k % group:
        raise CheckpointError(f"{parts.where}: {module} has {k} inputs, which groups of {group} do not divide evenly")
    return group


def input_order(
    name: str, k: int, group: int, option: str, is_set: bool, right: str, parts: Parts
) -> NDArray[np.int32] | None:
    """The group of each of the K inputs, by the tensor of that name; None where they lie in order, or it is absent.

    Raises CheckpointError where groups are given more or fewer inputs than they have, and UnsupportedError where the
    tensor is absent though the config sets `option`, which needs it; `right` is what the option would have to be.
    """
    in_order = np.arange(k, dtype=np.int32) // group
    if name in parts:
        order = parts.take(name, ("int32",), (k,)).rows(0, k).astype(np.int32)
        if not np.array_equal(np.sort(order), in_order):
            raise CheckpointError(f"{parts.where}: {name} does not deal {k} inputs out to groups of {group}")
        return None if np.array_equal(order, in_order) else order
    if is_set and group < k:
        raise UnsupportedError(
            f"{parts.where} lacks the tensor {name}, which says in what order the inputs belong to groups ({option});"
            f" use a checkpoint quantized with {option} {right}"
        )
    return None


def zero_points(words: NDArray[Any], start: int, stop: int) -> NDArray[np.int8]:
    """Those of outputs [start, stop), (stop - start, K / G), in words (K / G, n), of which the first holds `start`."""
    return nibbles(words)[:, start % 8 : start % 8 + stop - start].T.view(np.int8)


def nibbles(words: NDArray[Any]) -> NDArray[np.uint8]:
    """The 4-bit codes of 32-bit words (..., n), the lowest first: (..., 8 n)."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    codes = np.empty((*octets.shape, 2), np.uint8)
    codes[..., 0], codes[..., 1] = octets & 15, octets >> 4
    return codes.reshape(*octets.shape[:-1], 2 * octets.shape[-1])
