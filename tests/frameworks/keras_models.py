"""Small Keras models, and what the tests of fourfold.tensorflow share."""

from __future__ import annotations

import os
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what TensorFlow's own modules warn of while they are imported
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: `make frameworks`")
    keras = pytest.importorskip("keras", reason="Keras is not installed: `make frameworks`")

from fourfold.tensorflow import ops, quantize

layers = keras.layers
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def dense(k: int = 100, n: int = 50, fmt: str = "nf4", **how: Any) -> Any:
    """A quantized layer whose bias, if any, is not zero."""
    layer = layers.Dense(n, bias_initializer="normal", **how)
    layer.build((None, k))
    return quantize(layer, fmt)


def numbers(*shape: int, dtype: str = "float32") -> Any:
    return tf.cast(tf.random.normal(shape), dtype)


def of_op(layer: Any, x: Any) -> Any:
    """What the op gives for a layer's product, whoever else would compute it."""
    return ops.linear(x, layer.weight.value, layer.bias_or_none())


def small_model() -> Any:
    """A layer in two places, a nested model, attention."""
    x = inputs = keras.Input((7, 64))
    shared = layers.Dense(64, activation="relu")
    x = shared(shared(x))
    inner = keras.Sequential([keras.Input((7, 64)), layers.Dense(96, use_bias=False), layers.Dense(64)], name="inner")
    x = inner(x)
    x = x + layers.MultiHeadAttention(4, 16)(x, x)
    return keras.Model(inputs, layers.EinsumDense("...x,xy->...y", output_shape=10, bias_axes="y")(x))


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """Layers in attributes, in a list and in a layer of its own."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.first = layers.Dense(64)
        self.stack = [layers.Dense(64, activation="gelu") for _ in range(2)]
        self.attention = layers.GroupQueryAttention(16, 4, 2)

    def call(self, x: Any) -> Any:
        x = self.first(x)
        for layer in self.stack:
            x = layer(x)
        return self.attention(x, x)
