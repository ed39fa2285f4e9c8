"""Where the rows of a weight come from in a checkpoint: a small algebra that reads any range of rows, and only that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class SourceTensor(Protocol):
    """One tensor of a checkpoint, read by rows (its first axis)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> NDArray[np.generic]:
        """Rows [start, stop) as float32, float16 or bfloat16 (ml_dtypes), shape (stop - start, *shape[1:])."""
        ...


Tensors = Mapping[str, SourceTensor]


class Rows(Protocol):
    """A recipe for the rows of one weight."""

    @property
    def names(self) -> tuple[str, ...]:
        """Checkpoint tensors that it reads, with nothing left unread in them."""
        ...

    def source_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape that each tensor must have."""
        ...

    def read(self, tensors: Tensors, start: int, stop: int) -> NDArray[np.generic]:
        """Rows [start, stop) of the weight, shape (stop - start, K), or (stop - start,) for a vector."""
        ...


@dataclass(frozen=True)
class Tensor:
    """The tensor itself."""

    name: str
    shape: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def source_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.name: self.shape}

    def read(self, tensors: Tensors, start: int, stop: int) -> NDArray[np.generic]:
        return tensors[self.name].rows(start, stop)


@dataclass(frozen=True)
class Slice(Tensor):
    """Rows [begin, begin + count) of a tensor of several matrices one below another; `shape` is the tensor's."""

    begin: int

    def read(self, tensors: Tensors, start: int, stop: int) -> NDArray[np.generic]:
        return super().read(tensors, self.begin + start, self.begin + stop)


@dataclass(frozen=True)
class PlusOne(Tensor):
    """A vector that the checkpoint keeps as its difference from 1; float32."""

    def read(self, tensors: Tensors, start: int, stop: int) -> NDArray[np.generic]:
        return super().read(tensors, start, stop).astype(np.float32) + np.float32(1)


@dataclass(frozen=True)
class TimeConv:
    """A convolution over time, (N, C, 2, 1), as a matrix (N, 2C): inputs of the token before, then of this one."""

    name: str
    n: int
    c: int

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def source_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.name: (self.n, self.c, 2, 1)}

    def read(self, tensors: Tensors, start: int, stop: int) -> NDArray[np.generic]:
        taps = tensors[self.name].rows(start, stop)  # (rows, C, 2, 1)
        return np.ascontiguousarray(taps[:, :, :, 0].transpose(0, 2, 1)).reshape(stop - start, 2 * self.c)


@dataclass(frozen=True)
class HeadPairs:
    """Every other block of `head_dim` rows of two stacked matrices, (n_heads · head_dim, K) each: Yuan's q and k.

    Row block h of the result is row block `2h + which` of [first; second].
    """

    first: str
    second: str
    which: int  # 0: query, 1: key
    n_heads: int
    head_dim: int
    k: int

    @property
    def names(self) -> tuple[str, ...]:
        return (self.first, self.second)

    def source_shapes(self) -> dict[str, tuple[int, ...]]:
        shape = (self.n_heads * self.head_dim, self.k)
        return {self.first: shape, self.second: shape}

    def read(self, tensors: Tensors, start: int, stop: int) -> NDArray[np.generic]:
        pieces = []
        rows_each = self.n_heads * self.head_dim
        while start < stop:
            head, row = divmod(start, self.head_dim)
            count = min(stop - start, self.head_dim - row)
            stacked = (2 * head + self.which) * self.head_dim + row
            name, local = (self.first, stacked) if stacked < rows_each else (self.second, stacked - rows_each)
            pieces.append(tensors[name].rows(local, local + count))
            start += count
        return np.concatenate(pieces)
