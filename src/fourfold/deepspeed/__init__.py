"""fourfold's kernels under DeepSpeed's tensor parallelism: each process multiplies its shard of every matrix.

    engine = deepspeed.init_inference(model, tensor_parallel={"tp_size": 2}, dtype=torch.bfloat16)
    fourfold.deepspeed.quantize_(engine)      # the shards that DeepSpeed has cut, in place, one at a time

DeepSpeed cuts the matrices, starts the processes and adds their sums; the products are ours. For inference only.
"""

from __future__ import annotations

try:
    import deepspeed as _deepspeed  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("deepspeed", "torch"):
        raise
    from fourfold.errors import MissingExtra

    raise MissingExtra(
        "fourfold.deepspeed needs DeepSpeed and PyTorch; install them with `pip install 'fourfold[deepspeed]'`"
    ) from None

from fourfold.deepspeed.convolution import TapConv2d
from fourfold.deepspeed.linear import ColumnParallelLinear, Group, RowParallelLinear
from fourfold.deepspeed.swap import quantize_

__all__ = ["ColumnParallelLinear", "Group", "RowParallelLinear", "TapConv2d", "quantize_"]
