"""fourfold's kernels inside PyTorch: quantized linears for any model.

    from fourfold.torch import quantize_
    quantize_(model)              # every nn.Linear, in place, one at a time

`Linear` holds a weight in the tile format and multiplies by it as it lies, with PyTorch's own threads. It works in
`torch.inference_mode`, `torch.compile` and `torch.export`, passes gradients to its input (so that adapters on top
train), and its `state_dict` goes through safetensors. Weights are fixed: they have no gradient.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    from fourfold.errors import MissingExtra

    raise MissingExtra("fourfold.torch needs PyTorch; install it with `pip install 'fourfold[torch]'`") from None

from fourfold.torch.linear import Linear
from fourfold.torch.swap import quantize_

__all__ = ["Linear", "quantize_"]
