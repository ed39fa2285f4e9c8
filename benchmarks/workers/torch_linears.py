"""4-bit linear layers for PyTorch on CPU: bitsandbytes' own module, and one around PyTorch's int4 product."""

from __future__ import annotations

from typing import Any

import torch

GROUP = 64


class Int4Linear(torch.nn.Module):
    """y = x W^T over torch.ops.aten._weight_int4pack_mm_for_cpu: unsigned codes, a scale and a zero for 64 inputs."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        n, k = weight.shape
        groups = weight.float().reshape(n, k // GROUP, GROUP)
        least, most = groups.amin(2), groups.amax(2)
        scales = (most - least).clamp(min=1e-6) / 15
        codes = ((groups - least[..., None]) / scales[..., None]).round().clamp(0, 15).to(torch.int32).reshape(n, k)
        self.register_buffer("codes", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2))
        both = torch.stack((scales, least + 8 * scales), 2)  # value = (code - 8) * scale + zero
        self.register_buffer("scales", both.transpose(0, 1).contiguous().to(torch.bfloat16))
        self.n = n

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, GROUP, self.scales)
        return y.reshape(*x.shape[:-1], self.n)


def int4(weight: torch.Tensor) -> torch.nn.Module:
    return Int4Linear(weight)


def nf4(weight: torch.Tensor) -> torch.nn.Module:
    """bitsandbytes' NF4 with nested scales, in the form that its CPU kernel repacks it into at the first product."""
    import bitsandbytes as bnb

    n, k = weight.shape
    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer = layer.to("cpu").eval()
    layer(torch.zeros(1, k, dtype=torch.bfloat16))
    return layer


QUANTIZERS = {"nf4": nf4, "int4": int4}


def stored_bytes(layer: Any) -> int:
    """Of codes and scales, as they lie in memory."""
    tensors = [*layer.parameters(), *layer.buffers()]
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    return sum(tensor.nbytes for tensor in [*tensors, *([state.absmax] if state else [])])
