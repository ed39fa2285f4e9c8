"""Layers and models whose own code makes the layers that were exchanged: how they come back from a file.

Keras saves what a functional or a Sequential model holds, layer by layer, so ours come back as themselves. A layer that
makes others (MultiHeadAttention, or a class of the user's) is saved as its own arguments, and would make unquantized
ones again. Such a layer becomes a `Composite` of the same class, which saves also which of its parts are ours.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import keras

from fourfold.errors import UserError
from fourfold.tensorflow.layers import PLAIN, Packed, exchange

SAVED_BY_PARTS = (type(keras.Model(inputs=(_x := keras.Input((1,))), outputs=_x)), keras.Sequential)


class Composite:
    """Mixed into the class of such a layer by `remember`."""

    made_as: type[keras.layers.Layer]

    def get_config(self) -> dict[str, Any]:
        """The layer as its own class saves it, and the places of our parts among all of its parts."""
        mixed = type(self)
        object.__setattr__(self, "__class__", self.made_as)
        try:
            layer = keras.saving.serialize_keras_object(self)
        finally:
            object.__setattr__(self, "__class__", mixed)
        return {
            "layer": layer,
            "formats": {str(i): part.format for i, part in _parts(self) if isinstance(part, Packed)},
        }

    def get_build_config(self) -> None:
        """The layer within is built by its own."""

    def get_compile_config(self) -> None:
        """The model within is compiled by its own."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> keras.layers.Layer:
        """Raises UserError where the code that makes the layer makes other parts than it did."""
        layer = keras.saving.deserialize_keras_object(config["layer"])
        parts = dict(_parts(layer))
        for place, format in config["formats"].items():
            part = parts.get(int(place))
            if part is None or type(part) not in PLAIN or not part.built:
                raise UserError(
                    f"{layer.name} does not come back with the parts that it was saved with; make it anew, call "
                    "`quantize` on it, and then `load_weights`"
                )
            exchange(part, format)
        return _as_composite(layer)


def remember(layer: keras.layers.Layer) -> None:
    """Makes Composites of the outermost layers, `layer` included, that would be saved without our parts."""
    if isinstance(layer, Packed | Composite):
        return
    if type(layer) in SAVED_BY_PARTS:
        for part in layer._layers:
            remember(part)
    elif any(isinstance(part, Packed) for _, part in _parts(layer)):
        _as_composite(layer)


def _as_composite(layer: keras.layers.Layer) -> keras.layers.Layer:
    mixed = _composite_class(type(layer))  # type: ignore[arg-type]
    object.__setattr__(layer, "__class__", mixed)
    return layer


@cache
def _composite_class(made_as: type[keras.layers.Layer]) -> type[keras.layers.Layer]:
    made = type(made_as.__name__, (Composite, made_as), {"made_as": made_as, "__module__": made_as.__module__})
    registered: type[keras.layers.Layer] = keras.saving.register_keras_serializable("fourfold", "Composite")(made)
    return registered


def _parts(layer: keras.layers.Layer) -> list[tuple[int, keras.layers.Layer]]:
    return list(enumerate(layer._flatten_layers(include_self=False)))


keras.saving.register_keras_serializable("fourfold", "Composite")(Composite)
