"""`quantize_`: the linears of a model, exchanged for quantized ones where they stand."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fourfold.errors import UserError
from fourfold.matrix import check_format
from fourfold.torch.linear import Linear

Choice = Callable[[str, nn.Linear], bool]
Make = Callable[[nn.Module], nn.Module]


def quantize_(model: nn.Module, format: str = "nf4", *, choose: Choice | None = None) -> nn.Module:
    """Exchanges every nn.Linear in `model` for a `Linear` of a weight format, and returns the model.

    One at a time: a weight's own memory is free before the next is quantized, so beside the model there is never more
    than one quantized matrix. `choose(name, linear)` says which; by default all do. Subclasses of nn.Linear are left
    alone, for they compute something of their own. A linear that stands in two places is one afterwards too; a weight
    that an embedding shares stays the embedding's. Hooks for calls stay; a PyTorch encoder layer calls its linears one
    by one, never its fused kernel.

    Raises UserError for an unknown format, for a model that is a linear itself, and where a weight is not a finite
    number or is float64, or a `forward` was replaced (what was exchanged before it stays exchanged).
    """
    check_format(format)
    if type(model) is nn.Linear:
        raise UserError("a linear cannot be exchanged inside itself; use Linear.from_float")

    def make(linear: nn.Module) -> nn.Module:
        return Linear.from_float(linear, format=format)

    def maker(name: str, module: nn.Module) -> Make | None:
        return make if type(module) is nn.Linear and (choose is None or choose(name, module)) else None

    return exchange_(model, maker)


def exchange_(model: nn.Module, maker: Callable[[str, nn.Module], Make | None]) -> nn.Module:
    """Exchanges the modules inside `model` for which `maker(name, module)` says how, and returns the model.

    One at a time: nothing here holds a module once it has been exchanged. One that stands in two places is one
    afterwards too. What goes wrong with one is raised with its name.
    """
    places = _places(model, maker)
    while places:
        module, (make, where) = places.popitem()
        try:
            made = make(module)
        except UserError as error:
            raise type(error)(f"{where[0][1]} of {type(where[0][0]).__name__}: {error}") from None
        for parent, name in where:
            setattr(parent, name, made)
            _keep_unfused(parent)
        del module
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(_is_unfused(layer) for layer in encoder.layers):
            encoder.use_nested_tensor = False  # which only the fused layers take
    return model


def _keep_unfused(parent: nn.Module) -> None:
    """A PyTorch encoder layer hands its linears' weights to a fused kernel, without calling them, where this is set."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0


def _is_unfused(layer: nn.Module) -> bool:
    return isinstance(layer, nn.TransformerEncoderLayer) and not layer.activation_relu_or_gelu


_Places = dict[nn.Module, tuple[Make, list[tuple[nn.Module, str]]]]


def _places(model: nn.Module, maker: Callable[[str, nn.Module], Make | None]) -> _Places:
    """Every module that is to be exchanged, with the parents that hold it and its names there."""
    places: _Places = {}
    for parent_name, parent in model.named_modules():
        for name, child in parent._modules.items():  # named_children would show a module of two names once
            if child is not None and (make := maker(f"{parent_name}.{name}".lstrip("."), child)):
                places.setdefault(child, (make, []))[1].append((parent, name))
    return places
