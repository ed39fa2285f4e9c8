"""`Linear`: an nn.Linear whose weight lies in the tile format."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from fourfold.errors import UserError
from fourfold.matrix import QuantizedMatrix, check_format, quantize
from fourfold.torch.direct import multiply
from fourfold.torch.hooks import keep_hooks, make_weight, same_bias
from fourfold.torch.ops import weight_shapes

FORMAT_BYTES = 8  # no shorter than the longest name of a format, as ASCII


class Linear(nn.Linear):
    """y = x Wᵀ + bias: x (..., K) float32, float16 or bfloat16; y (..., N) of x's type.

    Holds, and keeps in its `state_dict`:
    - `weight` uint8 (P, bytes of a panel): 16 outputs a panel, docs/format.md;
    - `weight_scale` uint8 (P, 4): each panel's float32 scale, as bytes, so that no cast of the model reaches it
      (formats with scales only);
    - `weight_format` uint8 (8,): the format's name in ASCII, so that weights are never read as what they are not;
    - `bias` (N,), or None.

    Where no gradient is asked for, y's memory is not PyTorch's: `y.resize_` to more than it has raises RuntimeError.

    None but the bias can have a gradient. `Linear(K, N)` is empty (zero bytes), to be loaded into; `from_float`
    quantizes.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        format: str = "nf4",
    ) -> None:
        """`dtype` is the bias's. Raises UserError for an unknown format."""
        nn.Module.__init__(self)
        if in_features < 1 or out_features < 1:
            raise UserError(f"a linear needs inputs and outputs, not {in_features} and {out_features}")
        self.in_features, self.out_features = in_features, out_features
        self.format = check_format(format)
        shape, scale_shape = weight_shapes(format, out_features, in_features)
        self.weight = fixed(torch.zeros(shape, dtype=torch.uint8, device=device))
        self.weight_scale = None
        if scale_shape is not None:
            self.weight_scale = fixed(torch.zeros(scale_shape, dtype=torch.uint8, device=device))
        self.register_buffer("weight_format", format_tensor(format).to(device=device))
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))

    @classmethod
    def from_float(cls, linear: nn.Linear, *, format: str = "nf4") -> Self:
        """The same linear, quantized; its bias and its hooks for calls are shared.

        Raises UserError where a weight is not finite or is float64, which the kernels do not multiply, and where the
        linear's `forward` was replaced.
        """
        if linear.weight.device.type != "cpu":
            raise UserError(f"weights are quantized on the CPU; this linear's are on {linear.weight.device}")
        make_weight(linear)
        if linear.weight.dtype == torch.float64:
            raise UserError("products of float64 are not quantized: cast the linear to float32, or leave it out")
        made = cls.from_matrix(quantize(linear.weight.detach(), format))
        made.bias = same_bias(linear)
        keep_hooks(linear, made)
        made.train(linear.training)
        return made

    @classmethod
    def from_matrix(cls, matrix: QuantizedMatrix, bias: Tensor | None = None) -> Self:
        """A linear over a matrix's own memory."""
        n, k = matrix.shape
        made = cls(k, n, bias=False, device="meta", format=matrix.format)
        made.weight = fixed(torch.from_numpy(matrix.panels))
        if matrix.scales is not None:
            made.weight_scale = fixed(torch.from_numpy(matrix.scales).unsqueeze(1).view(torch.uint8))
        made.weight_format = format_tensor(matrix.format)
        made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return made

    def forward(self, input: Tensor) -> Tensor:
        """Raises UserError for inputs of another width or type."""
        direct = multiply(input, self._parameters, self.format, self.out_features, self.in_features)
        if direct is not None:
            return direct
        if not input.ndim or input.shape[-1] != self.in_features:
            raise UserError(f"the last axis must be the {self.in_features} inputs; this input is {tuple(input.shape)}")
        y: Tensor = torch.ops.fourfold.linear(
            input, self.weight, self.weight_scale, self.bias, self.format, self.out_features
        )
        return y

    def dequantize(self) -> Tensor:
        """The format's weight, float32 (N, K).

        For few rows of nf4 and fp4_bnb the kernels round its codebook to bytes: docs/frameworks.md.
        """
        values: Tensor = torch.ops.fourfold.dequantize(
            self.weight, self.weight_scale, self.format, self.out_features, self.in_features
        )
        return values

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}weight_format")
        if found is not None and not torch.equal(found.cpu(), format_tensor(self.format)):
            name = bytes(found.cpu().flatten().tolist()).rstrip(b"\0").decode("ascii", "replace")
            raise UserError(f"{prefix.rstrip('.') or 'this linear'} is {self.format}, and its weights are {name}")
        super()._load_from_state_dict(state_dict, prefix, *args)


def fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def format_tensor(format: str) -> Tensor:
    return torch.tensor(list(format.encode().ljust(FORMAT_BYTES, b"\0")), dtype=torch.uint8)
