"""Tensors that a checkpoint holds as codes and scales: what they stand for, and the formats that hold the codes.

Shape letters: N rows (outputs), K inputs. A block is 64 inputs of one output (docs/format.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourfold.checkpoint.source import FileTensor
from fourfold.config import WeightFormat
from fourfold.errors import CheckpointError
from fourfold.format import TILE_K, ZEROED


def block_type(fmt: WeightFormat, k: int) -> np.dtype[Any]:
    """A row as codes and scales: `codes` uint8 (K,), as format.CODEBOOKS numbers them, `scales` float32 (K / 64,).

    In a format with zero points, `zeros` int8 (K / 64,).
    """
    zeros = [("zeros", np.int8, (k // TILE_K,))] if fmt in ZEROED else []
    return np.dtype([("codes", np.uint8, (k,)), ("scales", np.float32, (k // TILE_K,)), *zeros])


class CodedTensor(ABC):
    """A matrix (N, K) of codes: a SourceTensor whose `rows` are what the codes stand for, in float32."""

    origin: str  # who made the codes, for people: "GPTQ int4"
    shape: tuple[int, int]

    @abstractmethod
    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop), (stop - start, K): scale times value of the code, multiplied in float32."""

    @property
    @abstractmethod
    def formats(self) -> tuple[WeightFormat, ...]:
        """The formats that hold every code, the smallest first; none where `fault` says why."""

    @property
    @abstractmethod
    def fault(self) -> str | None:
        """Why no format holds the codes, as the end of a sentence that begins with the tensor."""

    @abstractmethod
    def blocks(self, fmt: WeightFormat, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) for one of `formats`, as `block_type(fmt, K)`, shape (stop - start,)."""


@dataclass(frozen=True)
class Coded:
    """The codes of a tensor for one format, shown as a tensor: recipes select its rows like any other's."""

    tensor: CodedTensor
    format: WeightFormat

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def rows(self, start: int, stop: int) -> NDArray[np.generic]:
        return self.tensor.blocks(self.format, start, stop)


def misfit(run: int, k: int) -> str:
    """The fault of a tensor with a scale for every `run` of its `k` inputs, where blocks of 64 cannot hold them."""
    return f"has one scale for {run} of its {k} inputs, and only whole multiples of {TILE_K} can be kept"


class Parts:
    """The tensors of a file as they lie there, taken one by one by whoever puts coded tensors together."""

    def __init__(self, tensors: Mapping[str, FileTensor], where: str) -> None:
        self.rest = dict(tensors)
        self.where = where

    def __contains__(self, name: str) -> bool:
        return name in self.rest

    def modules(self, suffix: str) -> list[str]:
        """What stands before `suffix` in the names that end with it."""
        return [name.removesuffix(suffix) for name in self.rest if name.endswith(suffix)]

    def take(self, name: str, dtypes: Sequence[str], shape: tuple[int, ...] | None = None) -> FileTensor:
        """A tensor of one of these types and this shape. Raises CheckpointError where there is none such."""
        if name not in self.rest:
            raise CheckpointError(f"{self.where} lacks the tensor {name}, which the codes beside it need")
        tensor = self.rest.pop(name)
        if tensor.dtype.name not in dtypes or (shape is not None and tensor.shape != shape):
            wanted = " or ".join(dtypes) + (f" {shape}" if shape is not None else "")
            raise CheckpointError(
                f"{self.where}: tensor {name} should be {wanted}, and is {tensor.dtype.name} {tensor.shape}"
            )
        return tensor
