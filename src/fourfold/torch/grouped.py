"""`torch.ops.fourfold.grouped_linear`: rows that belong to different matrices of one shape, in one call.

A mixture of experts is such: every token's row goes through the few matrices that its router chose.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fourfold._core as _core
from fourfold.errors import UserError
from fourfold.torch.ops import HAS_TORCH_THREADS, NUMBER_TYPES, check_devices, check_weight, refuse_forward_mode

_library = torch.library.Library("fourfold", "FRAGMENT")
_library.define(
    "grouped_linear(Tensor x, Tensor counts, Tensor weight, Tensor? weight_scale, Tensor? bias, str format, "
    "SymInt out_features) -> Tensor"
)
_library.define(
    "grouped_linear_input_grad(Tensor grad, Tensor counts, Tensor weight, Tensor? weight_scale, str format, "
    "SymInt in_features) -> Tensor"
)


def _grouped_linear(
    x: Tensor,
    counts: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    out_features: int,
) -> Tensor:
    """x (S, K), the first counts[0] rows for matrix 0, and so on; counts (E,) integers; bias (E, N); y (S, N).

    weight uint8 (E, P, bytes of a panel), weight_scale uint8 (E, P, 4). Rows beyond all counts are zero in y.
    """
    refuse_forward_mode()
    _check(x, counts, weight, weight_scale, bias, format, out_features)
    k = x.shape[1]
    rows = x.contiguous()
    y = torch.empty((len(rows), out_features), dtype=x.dtype)
    plus = None if bias is None else bias.contiguous()
    threads = torch.get_num_threads()
    end = 0
    for e, begin, end in _groups(counts, len(rows)):
        _core.matmul(
            format,
            out_features,
            k,
            weight.data_ptr() + e * weight.stride(0),
            0 if weight_scale is None else weight_scale.data_ptr() + e * weight_scale.stride(0),
            rows.data_ptr() + begin * k * rows.element_size(),
            NUMBER_TYPES[rows.dtype],
            end - begin,
            k,
            0 if plus is None else plus.data_ptr() + e * out_features * plus.element_size(),
            0 if plus is None else NUMBER_TYPES[plus.dtype],
            y.data_ptr() + begin * out_features * y.element_size(),
            NUMBER_TYPES[y.dtype],
            threads,
            HAS_TORCH_THREADS,
        )
    y[end:] = 0
    return y


def _groups(counts: Tensor, n_rows: int) -> Iterator[tuple[int, int, int]]:
    """(matrix, its first row, the row after its last), for those that have rows."""
    end = 0
    for e, count in enumerate(counts.tolist()):
        begin, end = end, end + count
        if count < 0 or end > n_rows:
            raise UserError(f"counts must share out the {n_rows} rows of x; they are {counts.tolist()}")
        if count:
            yield e, begin, end


def _check(
    x: Tensor, counts: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, format: str, n: int
) -> None:
    """Raises UserError where the tensors do not belong together: the kernels read by address."""
    if x.ndim != 2 or x.dtype not in NUMBER_TYPES:
        raise UserError(f"x must be rows of float32, float16 or bfloat16, not {x.dtype} {tuple(x.shape)}")
    e = len(weight)
    check_weight(weight, weight_scale, format, n, x.shape[1], (e,))
    if counts.shape != (e,) or counts.is_floating_point():
        raise UserError(f"counts must have one integer for each of the {e} matrices; they are {tuple(counts.shape)}")
    if bias is not None and (bias.shape != (e, n) or bias.dtype not in NUMBER_TYPES):
        raise UserError(f"bias must be floating-point numbers ({e}, {n}), not {bias.dtype} {tuple(bias.shape)}")


def _grouped_linear_fake(
    x: Tensor,
    counts: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    out_features: int,
) -> Tensor:
    refuse_forward_mode()
    check_devices(x=x, counts=counts, weight=weight, weight_scale=weight_scale, bias=bias)
    return x.new_empty((x.shape[0], out_features))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, counts, weight, weight_scale, _, format, _ = inputs
    ctx.save_for_backward(counts, weight, weight_scale)
    ctx.format, ctx.in_features = format, x.shape[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of x; weights and biases of experts are fixed."""
    to_x = torch.ops.fourfold.grouped_linear_input_grad(grad, *ctx.saved_tensors, ctx.format, ctx.in_features)
    return to_x, None, None, None, None, None, None


def _keep_for_second_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, counts, weight, weight_scale, format, _ = inputs
    ctx.save_for_backward(counts, weight, weight_scale)
    ctx.format, ctx.out_features = format, grad.shape[-1]


def _second_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    counts, weight, weight_scale = ctx.saved_tensors
    to_grad = torch.ops.fourfold.grouped_linear(
        upstream, counts, weight, weight_scale, None, ctx.format, ctx.out_features
    )
    return to_grad, None, None, None, None, None


def _input_grad(
    grad: Tensor, counts: Tensor, weight: Tensor, weight_scale: Tensor | None, format: str, in_features: int
) -> Tensor:
    refuse_forward_mode()
    to_x = grad.new_zeros((len(grad), in_features))
    for e, begin, end in _groups(counts, len(grad)):
        scales = None if weight_scale is None else weight_scale[e]
        to_x[begin:end] = torch.ops.fourfold.linear_input_grad(grad[begin:end], weight[e], scales, format, in_features)
    return to_x


def _input_grad_fake(
    grad: Tensor, counts: Tensor, weight: Tensor, weight_scale: Tensor | None, format: str, in_features: int
) -> Tensor:
    refuse_forward_mode()
    check_devices(grad=grad, counts=counts, weight=weight, weight_scale=weight_scale)
    return grad.new_empty((grad.shape[0], in_features))


_library.impl("grouped_linear", _grouped_linear, "CPU")
_library.impl("grouped_linear_input_grad", _input_grad, "CPU")
torch.library.register_fake("fourfold::grouped_linear_input_grad", _input_grad_fake, lib=_library)
torch.library.register_fake("fourfold::grouped_linear", _grouped_linear_fake, lib=_library)
torch.library.register_autograd("fourfold::grouped_linear", _backward, setup_context=_keep_for_backward, lib=_library)
torch.library.register_autograd(
    "fourfold::grouped_linear_input_grad", _second_backward, setup_context=_keep_for_second_backward, lib=_library
)
