"""Linears whose matrix is cut over processes: each process has a shard, DeepSpeed's collectives join the results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from deepspeed.module_inject.layers import GatherFromTensorParallelRegion, RowParallel
from torch import Tensor, nn

from fourfold.errors import UserError
from fourfold.torch import Linear


@dataclass(frozen=True)
class Group:
    """The processes that a matrix is cut over. A copy of a module is in the same one."""

    handle: Any = None  # DeepSpeed's process group; None for a process alone
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, layer: Any) -> Group:
        """That of one of DeepSpeed's tensor-parallel layers."""
        return cls(layer.mp_group, layer.tp_index, layer.tp_world_size)

    def add_up(self, partial: Tensor) -> Tensor:
        """The sum of all processes' `partial`, in its place and type."""
        total: Tensor = RowParallel.apply(self.handle, partial, True)
        return total

    def gather(self, part: Tensor, widths: tuple[int, ...]) -> Tensor:
        """All processes' `part`, process i's `widths[i]` wide, one beside another."""
        whole: Tensor = GatherFromTensorParallelRegion.apply(self.handle, part, widths)
        return whole

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self  # a process group cannot be copied


class _Shard(Linear):
    """A process's part of a matrix."""

    group = Group()

    @classmethod
    def _of(cls, layer: Any, format: str) -> Self:
        made = cls.from_float(layer, format=format)
        made.group = Group.of(layer)
        if layer.bias is not None:  # the same memory, without the layer that DeepSpeed hangs on a parameter
            made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        return made

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, process={self.group.rank} of {self.group.size}"


class ColumnParallelLinear(_Shard):
    """Some outputs of a whole linear: x (..., K) to y (..., N of this process), or to those of all where gathered.

    `widths`, where outputs are gathered, is the number of outputs of each process; else None.
    """

    widths: tuple[int, ...] | None = None

    @classmethod
    def from_layer(cls, layer: Any, *, format: str, gathered: bool) -> Self:
        """The same shard as one of DeepSpeed's layers, quantized; its bias is shared. Raises as `from_float` does."""
        made = cls._of(layer, format)
        made.widths = tuple(layer._partition_sizes) if gathered and made.group.size > 1 else None
        return made

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y if self.widths is None else self.group.gather(y, self.widths)


class RowParallelLinear(_Shard):
    """Some inputs of a whole linear: x (..., K of this process) to y (..., N), summed over processes, plus the bias.

    Partial sums are float32 in the kernel, rounded to x's type once, and added up by DeepSpeed in that type. The bias,
    which every process has whole, is added after that. `inputs`, where x comes whole, is the range of it that is this
    process's, and the width of all of it; else None.
    """

    inputs: tuple[int, int, int] | None = None  # from, to, of

    @classmethod
    def from_layer(cls, layer: Any, *, format: str, whole_input: bool) -> Self:
        """The same shard as one of DeepSpeed's layers, quantized; its bias is shared. Raises as `from_float` does."""
        made = cls._of(layer, format)
        if whole_input:
            sizes = layer._partition_sizes
            first = sum(sizes[: made.group.rank])
            made.inputs = (first, first + sizes[made.group.rank], sum(sizes))
        return made

    def forward(self, input: Tensor) -> Tensor:
        if self.inputs is not None:
            first, last, width = self.inputs
            if not input.ndim or input.shape[-1] != width:
                raise UserError(f"this linear takes {width} inputs; this input is {tuple(input.shape)}")
            input = input[..., first:last]  # read where it lies
        y: Tensor = torch.ops.fourfold.linear(
            input, self.weight, self.weight_scale, None, self.format, self.out_features
        )
        y = self.group.add_up(y)
        return y if self.bias is None else y.add_(self.bias)
