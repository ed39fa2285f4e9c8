"""`quantize`: the layers of a model, exchanged for quantized ones where they stand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from fourfold.config import WeightFormat
from fourfold.errors import UnsupportedError, UserError
from fourfold.matrix import as_array, check_format
from fourfold.matrix import quantize as pack
from fourfold.tensorflow.composite import remember
from fourfold.tensorflow.layers import COMPUTE_TYPES, PLAIN, exchange, kernel_product

Choice = Callable[[str, keras.layers.Layer], bool]


def quantize(model: keras.layers.Layer, format: str = "nf4", *, choose: Choice | None = None) -> keras.layers.Layer:
    """Makes every Dense and EinsumDense in `model` a quantized one of a weight format, and returns the model.

    Each layer stays the object that it is and only changes its class and its variables, so it is exchanged wherever the
    model holds it, in any kind of model. One at a time: a kernel's memory is free before the next is quantized, so
    beside the model there are never more than one kernel, transposed, and one quantized matrix.
    `choose(path, layer)` says which; by default all are. Left alone, with a warning that names them and says why, are
    subclasses of the two, which compute something of their own, einsums that are not one matrix product, and layers
    that Keras itself has quantized or given a LoRA. What makes or trains a kernel (its initializer, regularizer,
    constraint) is dropped with it.

    Raises UserError for an unknown format, for what is no layer of Keras', for a layer without weights (call the model
    first), for a model whose optimizer holds the weights, and where a weight is not a finite number (what was exchanged
    before stays exchanged).
    """
    chosen = check_format(format)
    if not isinstance(model, keras.layers.Layer):
        raise UserError(f"quantize takes a Keras model or layer, not {type(model).__name__}")
    parts: list[Any] = model._flatten_layers()
    models = [part for part in parts if isinstance(part, keras.Model)]
    if any(getattr(part.optimizer, "built", False) for part in models if getattr(part, "optimizer", None)):
        raise UserError("the model's optimizer still holds the weights; call model.compile(...) again first")
    exchanged: list[Any] = []
    left: list[str] = []
    kinds: Any = tuple(PLAIN)
    for layer in parts:
        if not isinstance(layer, kinds) or not (choose is None or choose(layer.path, layer)):
            continue
        if why := _obstacle(layer):
            left.append(f"{layer.path} ({why})")
        elif not layer.built:
            raise UserError(
                f"{layer.path or layer.name} has no weights yet; call or build the model before it is quantized"
            )
        else:
            exchanged.append(layer)
    for layer in exchanged:
        _quantize_layer(layer, chosen)
    remember(model)
    for part in models:
        part.predict_function = part.train_function = part.test_function = None
        part.jit_compile = False
    if left:
        warnings.warn(f"left as they were: {'; '.join(left)}", stacklevel=2)
    return model


def _quantize_layer(layer: keras.layers.Layer, format: WeightFormat) -> None:
    product = kernel_product(layer)
    kernel = as_array(tf.convert_to_tensor(layer.kernel)).transpose(product.order)
    outputs = math.prod(kernel.shape[: product.n_outputs])
    try:
        packed = pack(kernel.reshape(outputs, -1), format)
    except UserError as error:
        raise UserError(f"{layer.path}: {error}") from None
    del kernel
    exchange(layer, format, packed)


def _obstacle(layer: keras.layers.Layer) -> str | None:
    """Why a layer cannot be exchanged, if it cannot."""
    if type(layer) not in PLAIN:
        return f"{type(layer).__name__} computes something of its own"
    if getattr(layer, "quantization_mode", None) is not None:
        return "Keras has quantized it already"
    if getattr(layer, "lora_enabled", False):
        return "it has a LoRA"
    if layer.compute_dtype not in COMPUTE_TYPES:
        return f"it computes in {layer.compute_dtype}"
    try:
        kernel_product(layer)
    except UnsupportedError as error:
        return str(error)
    return None
