"""Mixtures of experts: Transformers keeps a layer's experts as fused tensors of three axes, and so do we, quantized.

Its experts' classes (those under `use_experts_implementation`) say how they compute, and leave the products to a
function that a model's config names. Ours is one of these. A module keeps its class, gate and activation; its tensors

    gate_up_proj, or up_proj  (E, N, K) or, transposed, (E, K, N)      and      down_proj  (E, N, K) ...

become, under the same names, uint8 (E, P, bytes of a panel), with scales uint8 (E, P, 4) beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import fourfold.torch.grouped  # noqa: F401  # defines the operator
from fourfold.errors import UnsupportedError
from fourfold.matrix import huge_empty, quantize
from fourfold.torch.linear import fixed, format_tensor
from fourfold.torch.ops import weight_shapes

IMPLEMENTATION = "fourfold"
TENSORS = ("gate_up_proj", "up_proj", "down_proj")
_MARK = "_fourfold_experts"


@dataclass(frozen=True)
class QuantizedExperts:
    """What a module's quantized tensors are: their format, and for each name its (N, K)."""

    format: str
    shapes: dict[str, tuple[int, int]]
    implementation: str  # what computes the experts that are left as they are, and these where they are dequantized


def are_experts(module: nn.Module) -> bool:
    """Whether a module is of those whose products can be given to another function."""
    told = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "config"))
    return told and all(module._parameters[name].dim() == 3 for name in _tensors(module)) and bool(_tensors(module))


def is_quantized_experts(module: nn.Module, tensor: str) -> bool:
    """Whether `tensor` is the name of a quantized tensor of this module."""
    return tensor in getattr(module, _MARK, _NOTHING).shapes


def experts_format(module: nn.Module) -> str:
    """Of quantized experts."""
    return cast(QuantizedExperts, getattr(module, _MARK)).format


def check_choice(module: nn.Module, default: str) -> None:
    """Raises UnsupportedError where the user gave a module's experts to another function than Transformers does."""
    chosen = cast(Any, module.config)._experts_implementation
    if chosen not in (None, default, IMPLEMENTATION):
        raise _cannot(chosen)


def leave_experts(module: nn.Module, implementation: str) -> None:
    """Says what computes a module's tensors, which stay as they are in a model that has quantized ones."""
    setattr(module, _MARK, QuantizedExperts("f32", {}, implementation))


def prepare_experts(module: nn.Module, format: str, implementation: str) -> None:
    """Exchanges a module's tensors for empty ones of the format, on the meta device, to be loaded into.

    `implementation`: what shall compute when they are dequantized.
    """
    shapes = {}
    for name in _tensors(module):
        e, n, k = module._parameters[name].shape
        n, k = (k, n) if module.is_transposed else (n, k)
        shapes[name] = (n, k)
        shape, scale_shape = weight_shapes(format, n, k)
        _set(module, name, torch.empty((e, *shape), dtype=torch.uint8, device="meta"))
        if scale_shape is not None:
            _set(module, f"{name}_scale", torch.empty((e, *scale_shape), dtype=torch.uint8, device="meta"))
    module.register_buffer("weight_format", format_tensor(format).to("meta"))
    setattr(module, _MARK, QuantizedExperts(format, shapes, implementation))
    module.register_forward_pre_hook(_check_function)
    cast(Any, module.config)._experts_implementation = IMPLEMENTATION


def quantize_experts(module: nn.Module, path: str, name: str, weights: Tensor) -> dict[str, Tensor]:
    """The tensors, by their names in the model, that take the place of one fused tensor. Raises UserError for NaNs."""
    experts: QuantizedExperts = getattr(module, _MARK)
    shape, scale_shape = weight_shapes(experts.format, *experts.shapes[name])
    e = len(weights)
    panels = torch.from_numpy(huge_empty((e * shape[0], shape[1]))).view(e, *shape)
    scales = None if scale_shape is None else torch.empty((e, *scale_shape), dtype=torch.uint8)
    for i, weight in enumerate(weights):
        matrix = quantize((weight.T if module.is_transposed else weight).contiguous().detach(), experts.format)
        panels[i] = torch.from_numpy(matrix.panels)
        if scales is not None:
            scales[i] = torch.from_numpy(matrix.scales).unsqueeze(1).view(torch.uint8)
    made = {f"{path}.{name}": panels, f"{path}.weight_format": format_tensor(experts.format)}
    return made if scales is None else made | {f"{path}.{name}_scale": scales}


def dequantize_experts(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives a module its floating-point tensors back."""
    experts: QuantizedExperts = getattr(module, _MARK)
    for name, (n, k) in experts.shapes.items():
        panels, scales = getattr(module, name), getattr(module, f"{name}_scale", None)
        weights = torch.empty((len(panels), k, n) if module.is_transposed else (len(panels), n, k), dtype=dtype)
        for i in range(len(panels)):
            scale = None if scales is None else scales[i]
            values = torch.ops.fourfold.dequantize(panels[i], scale, experts.format, n, k)
            weights[i] = values.T if module.is_transposed else values
        _set(module, name, weights)
        module._parameters.pop(f"{name}_scale", None)
    del module._buffers["weight_format"]
    cast(Any, module.config)._experts_implementation = experts.implementation
    delattr(module, _MARK)
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _check_function]:
        del module._forward_pre_hooks[key]


def _check_function(module: nn.Module, _: Any) -> None:
    chosen = cast(Any, module.config)._experts_implementation
    if chosen != IMPLEMENTATION:
        raise _cannot(chosen)


def _cannot(chosen: str) -> UnsupportedError:
    return UnsupportedError(
        f"experts_implementation={chosen!r} cannot compute with experts in fourfold's formats; leave it out, or set it "
        f"to {IMPLEMENTATION!r}"
    )


def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The sum, weighted by top_k_weights (T, A), of experts top_k_index (T, A) of hidden_states (T, K); (T, K)."""
    experts = getattr(self, _MARK, _NOTHING)
    if not experts.shapes:  # left as it was, in a model that has others
        eager = type(self).forward.__wrapped__  # by functools.wraps
        compute = eager if experts.implementation == "eager" else ALL_EXPERTS_FUNCTIONS[experts.implementation]
        return cast(Tensor, compute(self, hidden_states, top_k_index, top_k_weights))
    if self._is_expert_parallel:
        raise UnsupportedError("experts in fourfold's formats cannot be spread over processes")
    n_chosen = top_k_index.shape[-1]
    chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
    n_experts = len(self.down_proj)
    counts = torch.zeros(n_experts, dtype=torch.int64).index_add_(0, chosen, torch.ones_like(chosen))
    up = _product(
        self, "gate_up_proj" if self.has_gate else "up_proj", hidden_states[order // n_chosen], counts, chosen
    )
    inner = self._apply_gate(up) if self.has_gate else self.act_fn(up)
    outer = _product(self, "down_proj", inner, counts, chosen)
    if self.has_post_expert_norm:
        outer = self.post_expert_norm(outer)
    weighted = outer * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    summed = weighted[back].view(*top_k_index.shape, outer.shape[-1]).sum(dim=1)
    return cast(Tensor, summed.to(hidden_states.dtype))


def _product(self: Any, name: str, rows: Tensor, counts: Tensor, chosen: Tensor) -> Tensor:
    experts: QuantizedExperts = getattr(self, _MARK)
    bias = getattr(self, f"{name}_bias") if self.has_bias else None
    weight, scale = getattr(self, name), getattr(self, f"{name}_scale", None)
    y: Tensor = torch.ops.fourfold.grouped_linear(
        rows, counts, weight, scale, bias, experts.format, experts.shapes[name][0]
    )
    return y


def _tensors(module: nn.Module) -> list[str]:
    return [name for name in TENSORS if isinstance(module._parameters.get(name), nn.Parameter)]


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    module._parameters.pop(name, None)
    module.register_parameter(name, fixed(tensor))


_NOTHING = QuantizedExperts("f32", {}, "grouped_mm")
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
