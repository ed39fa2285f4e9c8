"""`Dense` and `EinsumDense`: Keras' layers of those names, whose weight lies in the tile format."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from fourfold.errors import UserError
from fourfold.format import SCALED, n_panels, panel_bytes
from fourfold.matrix import QuantizedMatrix, check_format
from fourfold.tensorflow import ops
from fourfold.tensorflow.equation import Product, plain_product

FORMAT_BYTES = 4  # the longest name of a format, as ASCII
COMPUTE_TYPES = ("float32", "float16", "bfloat16")


class Packed(keras.layers.Layer):
    """What the layers of this module share: a fixed matrix (N, K) of weights.

    Holds, and saves:
    - `weight` uint8 (P, bytes of a panel): 16 outputs a panel, docs/format.md;
    - `weight_scale` uint8 (P, 4): each panel's float32 scale, as bytes, so that no cast reaches it (None for formats
      without scales);
    - `weight_format` uint8 (4,): the format's name in ASCII. The kernel reads it at every call, so weights are never
      taken for what they are not, whoever put them there;
    - `bias`, or None, which alone can be trained.
    """

    format: str
    weight: keras.Variable
    weight_scale: keras.Variable | None
    weight_format: keras.Variable
    bias: keras.Variable | None
    outputs: int  # N
    inputs: int  # K

    def hold(self, outputs: int, inputs: int, matrix: QuantizedMatrix | None = None) -> None:
        """Makes the variables, over the matrix's own memory; without one they are zeros, to be loaded into.

        Raises UserError for a type to compute in that the kernels do not have.
        """
        if self.compute_dtype not in COMPUTE_TYPES:
            raise UserError(f"{self.name} computes in {self.compute_dtype}; fourfold's layers do in {COMPUTE_TYPES}")
        self.supports_jit = False
        self.outputs, self.inputs = outputs, inputs
        format = check_format(self.format)
        self.weight = self._fixed("weight", (n_panels(outputs), panel_bytes(format, inputs)), matrix and matrix.panels)
        self.weight_scale = None
        if format in SCALED:
            scales = None if matrix is None or matrix.scales is None else matrix.scales[:, None].view(np.uint8)
            self.weight_scale = self._fixed("weight_scale", (n_panels(outputs), 4), scales)
        self.weight_format = self._fixed("weight_format", (FORMAT_BYTES,), _format_bytes(format))

    def _fixed(self, name: str, shape: tuple[int, ...], value: NDArray[np.uint8] | None) -> keras.Variable:
        start = "zeros" if value is None else lambda *_, **__: _as_tensor(value)
        return self.add_weight(name=name, shape=shape, dtype="uint8", initializer=start, trainable=False)

    def _bias(self, shape: tuple[int, ...]) -> keras.Variable | None:
        how = {"initializer": self.bias_initializer, "regularizer": self.bias_regularizer}
        return self.add_weight(name="bias", shape=shape, constraint=self.bias_constraint, **how)

    def multiply(self, x: tf.Tensor) -> tf.Tensor:
        """x (..., K) to (..., N), the bias added."""
        if self.bias is None:
            bias = ops.no_bias(self.outputs)
        else:
            bias = self.bias.value if len(self.bias.shape) == 1 else tf.reshape(self.bias.value, (self.outputs,))
        scale = ops.no_scales() if self.weight_scale is None else self.weight_scale.value
        return ops.linear(x, self.weight.value, scale, self.weight_format.value, bias)

    def dequantize(self) -> NDArray[np.float32]:
        """What is multiplied by: float32 (N, K)."""
        scale = ops.no_scales() if self.weight_scale is None else self.weight_scale.value
        rows = ops.rows(self.weight.value, scale, self.weight_format.value, 0, self.outputs)
        return np.asarray(rows)[:, : self.inputs]

    def save_own_variables(self, store: Any) -> None:
        for name, variable in self._stored().items():
            store[name] = np.asarray(variable)

    def load_own_variables(self, store: Any) -> None:
        """Raises UserError where what is stored is not this layer's."""
        wanted = self._stored()
        if set(store.keys()) != set(wanted):
            raise UserError(f"{self.name} needs {', '.join(wanted)}; what is stored is {', '.join(store.keys())}")
        found = np.asarray(store["weight_format"])
        if not np.array_equal(found, _format_bytes(self.format)):
            name = found.tobytes().rstrip(b"\0").decode("ascii", "replace")
            raise UserError(f"{self.name} is {self.format}, and its weights are {name}")
        for name, variable in wanted.items():
            value = np.asarray(store[name])
            if value.shape != tuple(variable.shape) or (name != "bias" and value.dtype != np.uint8):
                raise UserError(
                    f"{name} of {self.name} is {variable.dtype} {tuple(variable.shape)}, "
                    f"and what is stored is {value.dtype} {value.shape}"
                )
            variable.assign(value)

    def _stored(self) -> dict[str, keras.Variable]:
        all_of_them = ("weight", "weight_scale", "weight_format", "bias")
        return {name: variable for name in all_of_them if (variable := getattr(self, name)) is not None}

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "activity_regularizer": keras.regularizers.serialize(self.activity_regularizer),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
            "format": self.format,
        }

    def _set_options(
        self, activation: Any, bias_initializer: Any, bias_regularizer: Any, bias_constraint: Any, format: str
    ) -> None:
        self.activation = keras.activations.get(activation)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.format = check_format(format)
        self.supports_masking = True


@keras.saving.register_keras_serializable("fourfold")
class Dense(Packed):
    """activation(x Wᵀ + bias): x (..., K) of the layer's compute type; (..., units) of the same.

    `Dense(units)` is empty (zero bytes), to be loaded into; `quantize` makes them from Keras' own. Its arguments are
    those of keras.layers.Dense without what makes or trains a kernel.
    """

    def __init__(
        self,
        units: int,
        activation: Any = None,
        use_bias: bool = True,
        bias_initializer: Any = "zeros",
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        bias_constraint: Any = None,
        *,
        format: str = "nf4",
        **kwargs: Any,
    ) -> None:
        """Raises UserError for an unknown format or no units."""
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        if not isinstance(units, int) or units < 1:
            raise UserError(f"a layer needs units, not {units!r}")
        self.units, self.use_bias = units, use_bias
        self._set_options(activation, bias_initializer, bias_regularizer, bias_constraint, format)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        k = input_shape[-1]
        if k is None:
            raise UserError(f"the last axis of {self.name}'s input must be known")
        self.hold(self.units, k)
        self.bias = self._bias((self.units,)) if self.use_bias else None
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: k})

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        y = self.multiply(inputs)
        return y if self.activation is None else self.activation(y)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units, "use_bias": self.use_bias}


@keras.saving.register_keras_serializable("fourfold")
class EinsumDense(Packed):
    """keras.layers.EinsumDense where its equation is one matrix product (`equation.plain_product`).

    `output_shape` is what Keras takes: the output's shape without the batch, whose last axes are the outputs.
    """

    def __init__(
        self,
        equation: str,
        output_shape: int | tuple[int | None, ...],
        activation: Any = None,
        bias_axes: str | None = None,
        bias_initializer: Any = "zeros",
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        bias_constraint: Any = None,
        *,
        format: str = "nf4",
        **kwargs: Any,
    ) -> None:
        """Raises UnsupportedError for an equation that is no such product, UserError for an unknown format."""
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self.equation, self.bias_axes = equation, bias_axes
        self.partial_output_shape = (output_shape,) if isinstance(output_shape, int) else tuple(output_shape)
        self._set_options(activation, bias_initializer, bias_regularizer, bias_constraint, format)
        plain_product(equation, bias_axes)

    @property
    def product(self) -> Product:
        return plain_product(self.equation, self.bias_axes)

    @property
    def output_axes(self) -> tuple[int, ...]:
        """The sizes of the output's last axes, which are the kernel's."""
        sizes = self.partial_output_shape[-self.product.n_outputs :]
        return tuple(size for size in sizes if size is not None)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        summed = input_shape[-self.product.n_inputs :]
        if None in summed or len(self.output_axes) < self.product.n_outputs:
            raise UserError(f"the axes of {self.name}'s kernel must be known")
        self.hold(math.prod(self.output_axes), math.prod(size for size in summed if size is not None))
        self.bias = self._bias(self.output_axes) if self.bias_axes else None

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        product = self.product
        kept = keras.ops.shape(inputs)[: -product.n_inputs]
        x = inputs if product.n_inputs == 1 else keras.ops.reshape(inputs, (*kept, self.inputs))
        y = self.multiply(x)
        if product.n_outputs > 1:
            y = keras.ops.reshape(y, (*kept, *self.output_axes))
        return y if self.activation is None else self.activation(y)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape[: -self.product.n_inputs], *self.output_axes)

    def get_config(self) -> dict[str, Any]:
        own = {"equation": self.equation, "output_shape": self.partial_output_shape, "bias_axes": self.bias_axes}
        return {**super().get_config(), **own}


PLAIN = {keras.layers.Dense: Dense, keras.layers.EinsumDense: EinsumDense}  # and what they become


def kernel_product(layer: keras.layers.Layer) -> Product:
    """How the kernel of a Dense or EinsumDense of Keras' lies. Raises UnsupportedError where it is no plain matrix."""
    if type(layer) is keras.layers.Dense:
        return Product(1, 1, (1, 0))
    return plain_product(layer.equation, layer.bias_axes)


def exchange(layer: keras.layers.Layer, format: str, packed: QuantizedMatrix | None = None) -> None:
    """Makes a built Dense or EinsumDense of Keras' one of ours: the same object, with another class and variables.

    Its weights are those given, or zeros to be loaded into.
    """
    product = kernel_product(layer)
    sizes = [layer.kernel.shape[axis] for axis in product.order]
    del layer._kernel
    for wrapped in ("build", "quantize"):  # Keras keeps the methods of the class that an object was made as
        vars(layer).pop(wrapped, None)
    layer._tracker.unlock()
    layer.__class__ = PLAIN[type(layer)]
    layer.format = format
    layer.hold(math.prod(sizes[: product.n_outputs]), math.prod(sizes[product.n_outputs :]), packed)
    layer._tracker.lock()


def _as_tensor(array: NDArray[np.uint8]) -> tf.Tensor:
    """The array's own memory as a tensor, which keeps it."""
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def _format_bytes(format: str) -> NDArray[np.uint8]:
    return np.frombuffer(format.encode().ljust(FORMAT_BYTES, b"\0"), np.uint8).copy()
