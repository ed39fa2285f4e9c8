"""The product of `torch.ops.fourfold.linear` without its dispatcher, for where nobody but the caller is to see it.

A call through the dispatcher passes three layers of Python, a third of the time of a small matrix at one token. Where
there is nothing to record, trace, cast or transform, `multiply` is the same product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

import fourfold._core as _core
from fourfold.torch.ops import HAS_TORCH_THREADS, NUMBER_TYPES

_matmul, _threads, _uint8 = _core.matmul, torch.get_num_threads, torch.uint8


def is_unobserved(x: Tensor) -> bool:
    """Whether x is a plain CPU tensor, and nothing else is at work.

    That is: no gradient of either mode, compiler, autocast, dispatch mode, transform or profiler.
    """
    return (
        not is_compiling()
        and not torch.is_grad_enabled()
        and type(x) is Tensor
        and x.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._get_tracing_state()
        and not torch.autograd._profiler_enabled()
    )


def multiply(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    shape: tuple[int, int],
    scale_shape: tuple[int, int] | None,
    out_features: int,
    in_features: int,
) -> Tensor | None:
    """y (..., N) for x (..., K), or None where anything is not as it should be: then the operator says what.

    `shape` and `scale_shape` are `weight_shapes` of the format for (N, K).
    """
    x_type = NUMBER_TYPES.get(x.dtype)
    if x_type is None or not x.is_contiguous() or not x.ndim or x.shape[-1] != in_features:
        return None
    if weight.shape != shape or weight.dtype is not _uint8 or not weight.is_cpu or not weight.is_contiguous():
        return None
    scales = plus = plus_type = 0
    if scale_shape is not None:
        if weight_scale is None or weight_scale.shape != scale_shape or weight_scale.dtype is not _uint8:
            return None
        if not weight_scale.is_cpu or not weight_scale.is_contiguous():
            return None
        scales = weight_scale.data_ptr()
    if bias is not None:
        bias_type = NUMBER_TYPES.get(bias.dtype)
        if bias_type is None or bias.shape != (out_features,) or not bias.is_cpu or not bias.is_contiguous():
            return None
        plus, plus_type = bias.data_ptr(), bias_type
    y = x.new_empty((*x.shape[:-1], out_features))
    _matmul(
        format,
        out_features,
        in_features,
        weight.data_ptr(),
        scales,
        x.data_ptr(),
        x_type,
        x.numel() // in_features,
        in_features,
        plus,
        plus_type,
        y.data_ptr(),
        x_type,
        _threads(),
        HAS_TORCH_THREADS,
    )
    return y
