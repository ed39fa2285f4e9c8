"""The operators `torch.ops.fourfold.*`: what PyTorch's dispatcher, compiler and autograd know of our kernels.

Weights come as tensors of bytes: `weight` uint8 (P, bytes of a panel) and `weight_scale` uint8 (P, 4), which are
float32 panel scales. Bytes, because whoever casts a model to another type casts every floating-point tensor in it.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import fourfold._core as _core
from fourfold.errors import UnsupportedError, UserError
from fourfold.format import SCALED, n_panels, panel_bytes
from fourfold.matrix import check_format

NUMBER_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/format.h, NumberType
GRAD_ROWS_BYTES = 32 << 20  # of weights as float32, for a gradient at a time

_library = torch.library.Library("fourfold", "DEF")
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? bias, str format, SymInt out_features) -> Tensor"
)
_library.define(
    "linear_input_grad(Tensor grad, Tensor weight, Tensor? weight_scale, str format, SymInt in_features) -> Tensor"
)
_library.define(
    "dequantize(Tensor weight, Tensor? weight_scale, str format, SymInt out_features, SymInt in_features) -> Tensor"
)


def _lend_threads() -> bool:
    """Our kernels run on the OpenMP threads that PyTorch computes with, if that is what it was built with."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    try:  # found in the library or in what it is linked with: the runtime that is PyTorch's, not another that is loaded
        functions = [getattr(library, name) for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")]
    except AttributeError:
        return False
    _core.lend_openmp(*(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions))
    return True


HAS_TORCH_THREADS = _lend_threads()  # else as many of our own


@lru_cache(maxsize=4096)
def weight_shapes(format: str, n: int, k: int) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """Shapes of `weight` and, where the format has scales, of `weight_scale` for a matrix (n, k)."""
    chosen = check_format(format)
    return (n_panels(n), panel_bytes(chosen, k)), (n_panels(n), 4) if chosen in SCALED else None


def _linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, format: str, out_features: int
) -> Tensor:
    refuse_forward_mode()
    k = _width(x)
    check_weight(weight, weight_scale, format, out_features, k)
    rows = x.reshape(-1, k)  # a view, where x's axes allow it
    if rows.stride(1) != 1 or rows.stride(0) < k:
        rows = rows.contiguous()
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    if bias is not None:
        _check_bias(bias, out_features)
        bias = bias.contiguous()
    _core.matmul(
        format,
        out_features,
        k,
        weight.data_ptr(),
        0 if weight_scale is None else weight_scale.data_ptr(),
        rows.data_ptr(),
        _number_type(x),
        rows.shape[0],
        rows.stride(0),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else _number_type(bias),
        y.data_ptr(),
        _number_type(y),
        torch.get_num_threads(),
        HAS_TORCH_THREADS,
    )
    return y


def _linear_fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, format: str, out_features: int
) -> Tensor:
    refuse_forward_mode()
    check_devices(x=x, weight=weight, weight_scale=weight_scale, bias=bias)
    _width(x)
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_autocast(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, bias: Tensor | None, format: str, out_features: int
) -> Tensor:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(wanted) if tensor.dtype in NUMBER_TYPES else tensor  # float64 stays, as in PyTorch's linear

    wanted = torch.get_autocast_dtype("cpu")
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        bias = None if bias is None else cast(bias)
        y: Tensor = torch.ops.fourfold.linear(cast(x), weight, weight_scale, bias, format, out_features)
        return y


def _linear_input_grad(
    grad: Tensor, weight: Tensor, weight_scale: Tensor | None, format: str, in_features: int
) -> Tensor:
    """grad (..., N) times W (N, K), in float32, for a few MB of rows of W at a time."""
    refuse_forward_mode()
    n, k = _width(grad), in_features
    rows = grad.reshape(-1, n).float()
    total = torch.zeros((rows.shape[0], k), dtype=torch.float32)
    at_once = max(1, GRAD_ROWS_BYTES // (4 * k))
    for begin in range(0, n, at_once):
        end = min(begin + at_once, n)
        total.addmm_(rows[:, begin:end], _rows(weight, weight_scale, format, n, k, begin, end))
    return total.to(grad.dtype).reshape(*grad.shape[:-1], k)


def _linear_input_grad_fake(
    grad: Tensor, weight: Tensor, weight_scale: Tensor | None, format: str, in_features: int
) -> Tensor:
    refuse_forward_mode()
    check_devices(grad=grad, weight=weight, weight_scale=weight_scale)
    _width(grad)
    return grad.new_empty((*grad.shape[:-1], in_features))


def _dequantize(
    weight: Tensor, weight_scale: Tensor | None, format: str, out_features: int, in_features: int
) -> Tensor:
    return _rows(weight, weight_scale, format, out_features, in_features, 0, out_features)


def _dequantize_fake(
    weight: Tensor, weight_scale: Tensor | None, format: str, out_features: int, in_features: int
) -> Tensor:
    check_devices(weight=weight, weight_scale=weight_scale)
    return weight.new_empty((out_features, in_features), dtype=torch.float32)


def _rows(weight: Tensor, weight_scale: Tensor | None, format: str, n: int, k: int, begin: int, end: int) -> Tensor:
    """Rows [begin, end) of the weight, float32."""
    check_weight(weight, weight_scale, format, n, k)
    rows = torch.empty((end - begin, k), dtype=torch.float32)
    scales = 0 if weight_scale is None else weight_scale.data_ptr()
    threads = torch.get_num_threads()
    _core.unpack_rows(format, n, k, weight.data_ptr(), scales, begin, end, rows.data_ptr(), threads, HAS_TORCH_THREADS)
    return rows


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, weight_scale, bias, format, _ = inputs
    ctx.save_for_backward(weight, weight_scale)
    ctx.format, ctx.in_features, ctx.bias_type = format, x.shape[-1], None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, weight_scale = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.fourfold.linear_input_grad(grad, weight, weight_scale, ctx.format, ctx.in_features)
    if ctx.needs_input_grad[3]:
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_type)
    return to_x, None, None, to_bias, None, None


def _keep_for_second_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, weight_scale, format, _ = inputs
    ctx.save_for_backward(weight, weight_scale)
    ctx.format, ctx.out_features = format, grad.shape[-1]


def _second_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """grad W's gradient for grad is upstream Wᵀ, a linear again."""
    weight, weight_scale = ctx.saved_tensors
    to_grad = torch.ops.fourfold.linear(upstream, weight, weight_scale, None, ctx.format, ctx.out_features)
    return to_grad, None, None, None, None


def check_devices(**tensors: Tensor | None) -> None:
    """Raises UserError where the tensors of a call are on several devices.

    PyTorch's dispatcher takes one on `meta` as a call to be described, and the others' results would be memory that
    nobody has written.
    """
    places = {name: tensor.device.type for name, tensor in tensors.items() if tensor is not None}
    if len(set(places.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in places.items())
        unread = "; weights on meta have not been read yet" if places.get("weight") == "meta" else ""
        raise UserError(f"all tensors of a product must be on one device: {where}{unread}")


def refuse_forward_mode() -> None:
    """Raises UnsupportedError inside torch.func.jvp or a dual level, where tangents would be lost without a word."""
    if forward_ad._current_level >= 0:
        raise UnsupportedError(
            "quantized products have no forward-mode derivative (torch.func.jvp, dual tensors); "
            "torch.autograd.functional.jvp takes it by two passes of reverse mode"
        )


def _width(x: Tensor) -> int:
    if not x.ndim:
        raise UserError("a number alone cannot be multiplied: the last axis must be the inputs")
    width: int = x.shape[-1]
    return width


def check_weight(
    weight: Tensor, weight_scale: Tensor | None, format: str, n: int, k: int, stacked: tuple[int, ...] = ()
) -> None:
    """Raises UserError where the tensors are not those of a matrix (n, k): the kernels read by address.

    `stacked` are the leading axes of a stack of matrices.
    """
    one, one_scale = weight_shapes(format, n, k)
    shape, scale_shape = (*stacked, *one), None if one_scale is None else (*stacked, *one_scale)
    if weight.shape != shape or not _is_bytes(weight):
        raise UserError(
            f"a {format} weight of {n} outputs and {k} inputs is a contiguous uint8 tensor {shape}; "
            f"this one is {weight.dtype} {tuple(weight.shape)}"
        )
    if scale_shape is None:
        if weight_scale is not None:
            raise UserError(f"{format} has no panel scales")
    elif weight_scale is None or weight_scale.shape != scale_shape or not _is_bytes(weight_scale):
        raise UserError(f"the scales of {n} outputs in {format} are a contiguous uint8 tensor {scale_shape}")


def _check_bias(bias: Tensor, n: int) -> None:
    if bias.shape != (n,):
        raise UserError(f"bias must have one value for each of the {n} outputs; it is {tuple(bias.shape)}")


def _is_bytes(tensor: Tensor) -> bool:
    return bool(tensor.dtype == torch.uint8 and tensor.is_contiguous())


def _number_type(tensor: Tensor) -> int:
    try:
        return NUMBER_TYPES[tensor.dtype]
    except KeyError:
        if tensor.dtype == torch.uint8:
            raise UserError(
                "inputs must be float32, float16 or bfloat16, not torch.uint8: this model casts inputs to the type of "
                "the linear's weight, so leave the linear out (choose, modules_to_not_convert)"
            ) from None
        raise UserError(f"inputs must be float32, float16 or bfloat16, not {tensor.dtype}") from None


_library.impl("linear", _linear, "CPU")
_library.impl("linear", _linear_autocast, "AutocastCPU")
_library.impl("linear_input_grad", _linear_input_grad, "CPU")
_library.impl("dequantize", _dequantize, "CPU")
torch.library.register_fake("fourfold::linear", _linear_fake, lib=_library)
torch.library.register_fake("fourfold::linear_input_grad", _linear_input_grad_fake, lib=_library)
torch.library.register_fake("fourfold::dequantize", _dequantize_fake, lib=_library)
torch.library.register_autograd("fourfold::linear", _backward, setup_context=_keep_for_backward, lib=_library)
torch.library.register_autograd(
    "fourfold::linear_input_grad", _second_backward, setup_context=_keep_for_second_backward, lib=_library
)
