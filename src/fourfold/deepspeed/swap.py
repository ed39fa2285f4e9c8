"""`quantize_`: what DeepSpeed has cut, exchanged for quantized shards where it stands."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from deepspeed.module_inject import layers
from torch import nn

from fourfold.deepspeed.convolution import TapConv2d
from fourfold.deepspeed.linear import ColumnParallelLinear, RowParallelLinear
from fourfold.errors import UnsupportedError, UserError
from fourfold.matrix import check_format
from fourfold.torch import Linear
from fourfold.torch.swap import Make, exchange_

Choice = Callable[[str, nn.Module], bool]

# DeepSpeed's layers by how their matrix is cut. Several differ only in which rows or columns a process got.
BY_OUTPUTS = (
    "LinearLayer",
    "fused_LinearLayer",  # q, k and v in one
    "GateUpPack_LinearLayer",  # gate and up in one
    "SubParamLinearLayer",  # parts named by the caller
    "Yuan_LinearLayer",  # v, by heads that are no neighbours
)
BY_INPUTS = ("LinearAllreduce", "SubParamLinearAllreduce", "Conv_LinearALlreduce", "Yuan_LinearAllreduce")
BY_INPUTS_OF_ALL = ("LmHeadLinearAllreduce",)
EMBEDDINGS = ("VocabParallelEmbedding", "HiddenParallelEmbedding")


def quantize_(model: nn.Module, format: str = "nf4", *, choose: Choice | None = None) -> nn.Module:
    """Exchanges every matrix in `model` for one of a weight format on fourfold's kernels, and returns the model.

    `model` is what `deepspeed.init_inference` returned, or a module in it. Exchanged are DeepSpeed's tensor-parallel
    linears, which keep what is parallel in them (who has which rows or columns, sums and gathers over processes, a bias
    added once), every nn.Linear that DeepSpeed left whole, and the convolutions that are matrices (`TapConv2d`).
    `choose(name, module)` says which; by default all. Every process must choose the same.

    One at a time: a shard's own memory is free before the next is quantized. Embeddings stay, and so does a shard
    without a weight (more processes than heads).

    Raises UserError for an unknown format, for a model that was quantized before it was cut, and where a weight is not
    finite; UnsupportedError for layers that train, and for one of DeepSpeed's that is not known here. What was
    exchanged before that stays exchanged.
    """
    check_format(format)
    if _maker(model, format) is not None:
        raise UserError("a matrix cannot be exchanged inside itself; give the model that holds it")

    def maker(name: str, module: nn.Module) -> Make | None:
        make = _maker(module, format)
        return make if make is not None and (choose is None or choose(name, module)) else None

    return exchange_(model, maker)


def _maker(module: Any, format: str) -> Make | None:
    """How to make ours of a module; None where it stays."""
    if TapConv2d.can_be(module):
        return partial(TapConv2d.from_float, format=format)
    if type(module) is nn.Linear:
        return partial(Linear.from_float, format=format)
    if not isinstance(module, layers.TensorParallel_Layer):
        return None
    kind = type(module).__name__
    if kind in EMBEDDINGS or module.weight.numel() == 0:
        return None
    return partial(_shard, kind=kind, format=format)


def _shard(layer: Any, *, kind: str, format: str) -> nn.Module:
    if layer.is_training_mode() or layer.defer_collectives_to_compiler:
        raise UnsupportedError(
            "it is cut for training, and quantized weights do not train; use deepspeed.init_inference"
        )
    if not layer.weight.is_floating_point():
        raise UserError("its weight was quantized before it was cut; cut first, with deepspeed.init_inference")
    made: nn.Module
    if kind in BY_OUTPUTS:
        gathered = getattr(layer, "gather_output", False)
        made = ColumnParallelLinear.from_layer(layer, format=format, gathered=gathered)
    elif kind in (*BY_INPUTS, *BY_INPUTS_OF_ALL):
        made = RowParallelLinear.from_layer(layer, format=format, whole_input=kind in BY_INPUTS_OF_ALL)
    else:
        raise UnsupportedError(f"it is DeepSpeed's {kind}, which fourfold does not know")
    layer.weight = None  # which holds its layer in turn: such a ring is freed at some time, and a weight must be now
    return made
