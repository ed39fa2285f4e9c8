"""`TiedEmbedding`: the rows of a quantized head, for a model whose embedding and head are one matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fourfold._core as _core
from fourfold.errors import UserError
from fourfold.torch.linear import Linear
from fourfold.torch.ops import check_devices, check_weight

_library = torch.library.Library("fourfold", "FRAGMENT")
_library.define(
    "rows(Tensor ids, Tensor weight, Tensor? weight_scale, str format, SymInt out_features, SymInt in_features) "
    "-> Tensor"
)


class TiedEmbedding(nn.Module):
    """ids (...) of integers to rows (..., K) of `head`'s weight, in the embedding's own dtype.

    It has no tensors of its own: `head` keeps and saves them, wherever it stands in the model.
    """

    def __init__(self, head: Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self._head = [head]  # in a list, lest it be a submodule of two
        self.register_buffer(
            "_like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False
        )  # cast with the model

    @property
    def head(self) -> Linear:
        return self._head[0]

    @property
    def weight(self) -> Tensor:
        """The head's bytes."""
        return self.head.weight

    def forward(self, input: Tensor) -> Tensor:
        """Raises UserError where an id is no row of the head."""
        head = self.head
        rows: Tensor = torch.ops.fourfold.rows(
            input, head.weight, head.weight_scale, head.format, head.out_features, head.in_features
        )
        return rows.to(self._like.dtype)

    def extra_repr(self) -> str:
        return f"{self.head.out_features}, {self.head.in_features}, format={self.head.format}"


def _rows(
    ids: Tensor, weight: Tensor, weight_scale: Tensor | None, format: str, out_features: int, in_features: int
) -> Tensor:
    """float32 (..., K)."""
    check_weight(weight, weight_scale, format, out_features, in_features)
    wanted = ids.reshape(-1).tolist()
    if wanted and not 0 <= min(wanted) <= max(wanted) < out_features:
        raise UserError(f"ids must be in 0..{out_features - 1}; they reach from {min(wanted)} to {max(wanted)}")
    rows = torch.empty((*ids.shape, in_features), dtype=torch.float32)
    panels, scales = weight.data_ptr(), 0 if weight_scale is None else weight_scale.data_ptr()
    for i, row in enumerate(wanted):
        to = rows.data_ptr() + i * in_features * 4
        _core.unpack_rows(format, out_features, in_features, panels, scales, row, row + 1, to, 1, False)
    return rows


def _rows_fake(
    ids: Tensor, weight: Tensor, weight_scale: Tensor | None, format: str, out_features: int, in_features: int
) -> Tensor:
    check_devices(ids=ids, weight=weight, weight_scale=weight_scale)
    return weight.new_empty((*ids.shape, in_features), dtype=torch.float32)


_library.impl("rows", _rows, "CPU")
torch.library.register_fake("fourfold::rows", _rows_fake, lib=_library)
