"""Convolutions that are matrices: Yuan's filters, 11 % of its weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from fourfold.errors import UserError
from fourfold.torch import Linear
from fourfold.torch.hooks import keep_hooks, make_weight, same_bias


class TapConv2d(nn.Module):
    """An nn.Conv2d with a kernel (taps, 1): x (B, C, T, W) to y (B, N, T + 2 padding - taps + 1, W).

    Each output is a linear of `taps` rows of inputs one after another, so the kernel is a matrix (N, taps · C), the
    rows of the first tap before those of the second.
    """

    def __init__(self, linear: Linear, taps: int, padding: int) -> None:
        super().__init__()
        self.linear, self.taps, self.padding = linear, taps, padding

    @staticmethod
    def can_be(module: nn.Module) -> bool:
        """Whether a module is such a convolution, and has nothing beside: no strides, groups, dilation, other edges."""
        if type(module) is not nn.Conv2d or isinstance(module.padding, str):
            return False
        plain = module.stride == module.dilation == (1, 1) and module.groups == 1 and module.padding_mode == "zeros"
        return bool(plain and module.kernel_size[1] == 1 and module.padding[1] == 0)

    @classmethod
    def from_float(cls, convolution: nn.Conv2d, *, format: str) -> TapConv2d:
        """The same convolution, quantized; its bias and its hooks are shared. Raises as `Linear.from_float` does."""
        if not cls.can_be(convolution):
            raise UserError(f"{convolution} is no matrix: its kernel must be one wide, without strides and groups")
        make_weight(convolution)
        n, channels, taps, _ = convolution.weight.shape
        matrix = nn.Linear(taps * channels, n, bias=False, device="meta")
        weight = convolution.weight.detach().squeeze(3).transpose(1, 2).reshape(n, taps * channels)
        matrix.weight, matrix.bias = nn.Parameter(weight, requires_grad=False), same_bias(convolution)
        made = cls(Linear.from_float(matrix, format=format), taps, convolution.padding[0])
        keep_hooks(convolution, made)
        made.train(convolution.training)
        return made

    def forward(self, input: Tensor) -> Tensor:
        rows = functional.pad(input.permute(0, 2, 3, 1), (0, 0, 0, 0, self.padding, self.padding))
        taken = rows.unfold(1, self.taps, 1).transpose(3, 4).flatten(3)  # (B, T', W, taps · C)
        y: Tensor = self.linear(taken)
        return y.permute(0, 3, 1, 2).contiguous()

    def extra_repr(self) -> str:
        return f"taps={self.taps}, padding={self.padding}"
