"""The product of `torch.ops.fourfold.linear` without its dispatcher, for where nobody but the caller is to see it.

A call through the dispatcher passes three layers of Python, longer than a small matrix at one token takes. Where there
is nothing to record, trace, cast or transform, `multiply` is the same product in one call: C++ reads the tensors by the
table of functions that PyTorch gives for that (DLPack's), checks them, makes the result, and multiplies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled, nn
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import _profiler_enabled, forward_ad
from torch.compiler import is_compiling

import fourfold._core as _core
from fourfold.torch.ops import HAS_TORCH_THREADS

# Each name once: what is looked up in a module takes longer than the question itself.
_linear, _threads = _core.linear_of_tensors, torch.get_num_threads

HAS_TABLE: bool = _core.lend_tensors(Tensor, nn.Parameter)  # else every product is the operator's


def multiply(x: Tensor, own: dict[str, Any], format: str, n: int, k: int) -> Tensor | None:
    """y (..., N) for x (..., K) and a module's parameters `weight`, `weight_scale` and `bias`.

    None where a gradient of either mode, a compiler, autocast, a dispatch mode, a transform or a profiler is at work,
    and where a tensor is of a type of its own, lies elsewhere, is computed (pruned, parametrized), or is not as it
    should be: the operator sees to that.
    """
    if (
        is_compiling()
        or not HAS_TABLE
        or is_grad_enabled()
        or is_autocast_enabled("cpu")
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or forward_ad._current_level >= 0
        or peek_interpreter_stack() is not None
        or _get_tracing_state()
        or _profiler_enabled()
        or x.is_neg()  # whose memory holds the numbers negated
        or "bias" not in own
        or ((bias := own["bias"]) is not None and bias.is_neg())
    ):
        return None
    y: Tensor | None = _linear(
        x, own.get("weight"), own.get("weight_scale"), bias, format, n, k, _threads(), HAS_TORCH_THREADS
    )
    return y
