"""`quantize_`: the linears of a model, exchanged for quantized ones where they stand."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fourfold.errors import UserError
from fourfold.matrix import check_format
from fourfold.torch.linear import Linear

Choice = Callable[[str, nn.Linear], bool]


def quantize_(model: nn.Module, format: str = "nf4", *, choose: Choice | None = None) -> nn.Module:
    """Exchanges every nn.Linear in `model` for a `Linear` of a weight format, and returns the model.

    One at a time: a weight's own memory is free before the next is quantized, so beside the model there is never more
    than one quantized matrix. `choose(name, linear)` says which; by default all do. Subclasses of nn.Linear are left
    alone, for they compute something of their own. A linear that stands in two places is one afterwards too; a weight
    that an embedding shares stays the embedding's.

    Raises UserError for an unknown format, for a model that is a linear itself, and where a weight is not a finite
    number (what was exchanged before it stays exchanged).
    """
    check_format(format)
    if type(model) is nn.Linear:
        raise UserError("a linear cannot be exchanged inside itself; use Linear.from_float")
    places = _places(model, choose)
    while places:
        linear, where = places.popitem()
        try:
            made = Linear.from_float(linear, format=format)
        except UserError as error:
            raise UserError(f"{where[0][1]} of {type(where[0][0]).__name__}: {error}") from None
        for parent, name in where:
            setattr(parent, name, made)
        del linear
    return model


def _places(model: nn.Module, choose: Choice | None) -> dict[nn.Linear, list[tuple[nn.Module, str]]]:
    """Every linear that is to be exchanged, with the parents that hold it and its names there."""
    places: dict[nn.Linear, list[tuple[nn.Module, str]]] = {}
    for parent_name, parent in model.named_modules():
        for name, child in parent._modules.items():  # named_children would show a linear of two names once
            if type(child) is not nn.Linear:
                continue
            if choose is None or choose(f"{parent_name}.{name}".lstrip("."), child):
                places.setdefault(child, []).append((parent, name))
    return places
