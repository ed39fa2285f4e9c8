"""Tensors put together from parts of others, as they are read: nothing is copied before its rows are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fourfold.models.rows import SourceTensor


@dataclass(frozen=True)
class RowRange:
    """Rows [start, stop) of a tensor."""

    tensor: SourceTensor
    start: int
    stop: int


@dataclass(frozen=True)
class Stacked:
    """Ranges of rows, one under another; their tensors agree in every axis but the first."""

    ranges: tuple[RowRange, ...]

    @classmethod
    def whole(cls, tensors: Sequence[SourceTensor]) -> Stacked:
        """All rows of these tensors."""
        return cls(tuple(RowRange(tensor, 0, tensor.shape[0]) for tensor in tensors))

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.stop - part.start for part in self.ranges), *self.ranges[0].tensor.shape[1:])

    def cut(self, start: int, stop: int) -> Stacked:
        """Rows [start, stop) of this, as a tensor of their own."""
        found, at = [], 0
        for part in self.ranges:
            first, last = max(start - at, 0), min(stop - at, part.stop - part.start)
            if first < last:
                found.append(RowRange(part.tensor, part.start + first, part.start + last))
            at += part.stop - part.start
        return Stacked(tuple(found) or (RowRange(self.ranges[0].tensor, 0, 0),))

    def rows(self, start: int, stop: int) -> NDArray[np.generic]:
        assert 0 <= start <= stop <= self.shape[0]
        pieces = [part.tensor.rows(part.start, part.stop) for part in self.cut(start, stop).ranges]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True)
class Columns:
    """Columns [start, stop) of a matrix (N, K), or of a tensor (N, K, ...)."""

    tensor: SourceTensor
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.tensor.shape[0], self.stop - self.start, *self.tensor.shape[2:])

    def rows(self, start: int, stop: int) -> NDArray[np.generic]:
        return self.tensor.rows(start, stop)[:, self.start : self.stop]


@dataclass(frozen=True)
class Summed:
    """The sum of tensors of one shape, in the first one's type."""

    parts: tuple[SourceTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    def rows(self, start: int, stop: int) -> NDArray[np.generic]:
        first, *others = (part.rows(start, stop) for part in self.parts)
        total = first.astype(np.float32)
        for other in others:
            total += other.astype(np.float32)
        return total.astype(first.dtype)


@dataclass(frozen=True)
class SideBySide:
    """Matrices (N, K1), (N, K2), ... as one (N, K1 + K2 + ...); their tensors may have more axes, which agree."""

    parts: tuple[SourceTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.parts[0].shape[0], sum(part.shape[1] for part in self.parts), *self.parts[0].shape[2:])

    def rows(self, start: int, stop: int) -> NDArray[np.generic]:
        return np.concatenate([part.rows(start, stop) for part in self.parts], axis=1)
