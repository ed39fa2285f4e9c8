"""The vocabulary of a model file: what a weight is, and how it is cut over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fourfold.models.rows import Rows

if TYPE_CHECKING:
    from fourfold.config import ModelConfig
    from fourfold.program import ProgramBuilder


@dataclass(frozen=True)
class WeightSpec:
    """One weight as fourfold stores it: a matrix (N, K), which is quantized, or a vector (N,), kept in float32."""

    name: str
    shape: tuple[int, ...]
    rows: Rows

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2


class Architecture(Protocol):
    """What every module in fourfold.models offers."""

    def weight_specs(self, config: ModelConfig) -> list[WeightSpec]:
        """Every weight, in the order in which a step reads them."""
        ...

    def describe(self, config: ModelConfig, p: ProgramBuilder) -> None:
        """Write the layers down as a program."""
        ...
