"""`Dense` and `EinsumDense`: Keras' layers of those names, whose weight lies in the tile format."""

from __future__ import annotations

import math
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold.config import WeightFormat
from fourfold.errors import UserError
from fourfold.matrix import QuantizedMatrix, check_format
from fourfold.tensorflow import direct, ops, stored
from fourfold.tensorflow.equation import Product, plain_product

COMPUTE_TYPES = {name: getattr(tf, name) for name in ("float32", "float16", "bfloat16")}
EAGER = type(tf.constant(0))
UNCHANGED = (None, keras.activations.linear)  # activations that give what they are given


class Packed(keras.layers.Layer):
    """What the layers of this module share: a fixed matrix (N, K) of weights.

    `weight` is one uint8 variable: panels, panel scales, and the format's name (csrc/tensorflow_op.h). No cast reaches
    it, and the kernel reads from it at every call what it is, so weights are never taken for what they are not, whoever
    put them there. In Keras' files it is three, as fourfold.torch names them:
    - `weight` uint8 (P, bytes of a panel): 16 outputs a panel, docs/format.md;
    - `weight_scale` uint8 (P, 4): each panel's float32 scale, as bytes (formats with scales only);
    - `weight_format` uint8 (8,): the format's name in ASCII, zeros behind it.
    `bias`, or None, is a variable as Keras' is, and alone can be trained.
    """

    outputs: int  # N
    input_axes: tuple[int, ...]  # the input's last axes, which are summed over
    inputs: int  # K: their product
    weight: keras.Variable
    bias: keras.Variable | None

    @property
    def format(self) -> WeightFormat:
        """What the weights are in, as they say themselves: a checkpoint of TensorFlow's may have brought another.

        Before there are any, what was asked for. Raises UserError where their bytes name no format.
        """
        if not hasattr(self, "weight"):
            return self._asked
        with tf.init_scope():
            return stored.format_named(as_bytes(self.weight)[-stored.NAME_BYTES :])

    @property
    def output_axes(self) -> tuple[int, ...]:
        """The sizes of the output's last axes, whose product is N."""
        return (self.outputs,)

    def hold(
        self, outputs: int, input_axes: tuple[int, ...], n_axes: int | None, matrix: QuantizedMatrix | None = None
    ) -> None:
        """Makes the variable of the weights; without a matrix they are zeros, to be loaded into.

        An input has `n_axes` axes, or at least one before `input_axes` where that is None. Raises UserError for a type
        to compute in that the kernels do not have.
        """
        if self.compute_dtype not in COMPUTE_TYPES:
            raise UserError(f"{self.name} computes in {self.compute_dtype}, not in one of {', '.join(COMPUTE_TYPES)}")
        self.supports_jit = False
        self.outputs, self.input_axes, self.inputs = outputs, input_axes, math.prod(input_axes)
        sizes = {place - len(input_axes): size for place, size in enumerate(input_axes)}
        self.input_spec = keras.layers.InputSpec(ndim=n_axes, min_ndim=len(input_axes) + 1, axes=sizes)
        if matrix is None:
            shapes = stored.shapes(self.format, outputs, self.inputs)
            parts = {name: np.zeros(shape, np.uint8) for name, shape in shapes.items()}
            joined = stored.join_parts({**parts, "weight_format": stored.name_bytes(self.format)})
        else:
            joined = stored.join(matrix)
        start = {"initializer": lambda *_, **__: _as_tensor(joined), "trainable": False}
        self.weight = self.add_weight(name="weight", shape=joined.shape, dtype="uint8", **start)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Keras' own way to `call` takes half as long as a kernel of 4096 × 4096; an eager tensor can do without.

        Where nothing follows it, it can do without TensorFlow's dispatcher, too.
        """
        if len(args) == 1 and not kwargs and type(args[0]) is EAGER and self.built:
            x, own = args[0], self.__dict__
            product, plain_type = own.get("_ways") or self._find_ways()
            y = product(x) if product is not None and direct.is_unwatched() else None
            if y is not None:
                return y if self.activation in UNCHANGED else self.activation(y)
            is_plain = x.dtype is plain_type and getattr(x, "_keras_mask", None) is None
            if is_plain and self._takes(tuple(x.shape)) and direct.is_outside_autocast():
                return self.call(x)
        return super().__call__(*args, **kwargs)

    def _find_ways(self) -> tuple[_core.DirectProduct | None, tf.DType | None]:
        """Ways around Keras, as long as no attribute changes: what multiplies past TensorFlow, too, if anything does,
        and the type of tensors that may go straight to `call`, because Keras would do nothing about them."""
        is_ours = type(self) in PLAIN.values() and "call" not in self.__dict__
        is_plain = self.activity_regularizer is None and self.compute_dtype == self.variable_dtype
        plain_type = COMPUTE_TYPES.get(self.compute_dtype) if is_plain else None
        ways = self.__dict__["_ways"] = direct.product_of(self) if is_ours else None, plain_type
        return ways

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get(name, UNCHANGED) is not value:  # Keras sets some at every call to what they are
            self.__dict__.pop("_ways", None)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self.__dict__.pop("_ways", None)
        super().__delattr__(name)

    def _bias(self, shape: tuple[int, ...]) -> keras.Variable | None:
        how = {"initializer": self.bias_initializer, "regularizer": self.bias_regularizer}
        return self.add_weight(name="bias", shape=shape, constraint=self.bias_constraint, **how)

    def _takes(self, shape: tuple[int, ...]) -> bool:
        spec, n = self.input_spec, len(self.input_axes)
        return shape[-n:] == self.input_axes and (len(shape) == spec.ndim if spec.ndim else len(shape) > n)

    def checked(self, x: tf.Tensor) -> tf.Tensor:
        """x, whose last axes are `input_axes`: where that is not known while a graph is made, it is seen as it runs.

        The kernel cannot tell: rows of weights that are a few inputs longer or shorter take as many bytes.
        """
        if None not in x.shape[-len(self.input_axes) :]:
            return x
        return tf.ensure_shape(x, (*(None,) * (len(x.shape) - len(self.input_axes)), *self.input_axes))

    def multiply(self, x: tf.Tensor) -> tf.Tensor:
        """x (..., K) to (..., N), the bias added."""
        return ops.linear(x, self.weight.value, self.bias_or_none())

    def bias_or_none(self) -> tf.Tensor:
        """As the op takes it: (N,), or (0, N) for none."""
        if self.bias is None:
            return ops.no_bias(self.outputs)
        return self.bias.value if len(self.bias.shape) == 1 else tf.reshape(self.bias.value, (self.outputs,))

    def dequantize(self) -> NDArray[np.float32]:
        """What is multiplied by: float32 (N, K)."""
        return np.asarray(ops.rows(self.weight.value, self.outputs, self.inputs, 0, self.outputs))

    def save_own_variables(self, store: Any) -> None:
        weight = as_bytes(self.weight)
        for name, part in stored.split(weight, self.outputs, self.inputs).items():
            store[name] = part
        if self.bias is not None:
            store["bias"] = self.bias

    def load_own_variables(self, store: Any) -> None:
        """Raises UserError where what is stored is not this layer's."""
        parts = {name: np.asarray(store[name]) for name in store.keys() if name != "bias"}  # noqa: SIM118
        try:
            stored.check_parts(parts, self.format, self.outputs, self.inputs)
            if ("bias" in store.keys()) != (self.bias is not None):  # noqa: SIM118
                raise UserError(f"a bias is {'missing' if self.bias is not None else 'stored that the layer has not'}")
        except UserError as error:
            raise UserError(f"{self.name} cannot be loaded: {error}") from None
        self.__dict__.pop("_ways", None)  # a product holds the weights that it read
        self.weight.assign(_as_tensor(stored.join_parts(parts)))
        if self.bias is not None:
            self.bias.assign(store["bias"])

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
        self._asked = check_format(format)
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
        self.hold(self.units, (k,), None)
        self.bias = self._bias((self.units,)) if self.use_bias else None

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        y = self.multiply(self.checked(inputs))
        return y if self.activation is None else self.activation(y)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units, "use_bias": self.use_bias}


@keras.saving.register_keras_serializable("fourfold")
class EinsumDense(Packed):
    """keras.layers.EinsumDense where its equation is one matrix product (`equation.plain_product`).

    `output_shape` is what Keras takes: the sizes of the equation's output axes, the batch or "..." left out.
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
        first, n = self.product.first_output, self.product.n_outputs
        return tuple(size for size in self.partial_output_shape[first : first + n] if size is not None)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        summed = tuple(size for size in input_shape[-self.product.n_inputs :] if size is not None)
        if len(summed) < self.product.n_inputs or len(self.output_axes) < self.product.n_outputs:
            raise UserError(f"the axes of {self.name}'s kernel must be known")
        self.hold(math.prod(self.output_axes), summed, self.product.n_axes)
        self.bias = self._bias(self.output_axes) if self.bias_axes else None

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        product, x = self.product, self.checked(inputs)
        kept = keras.ops.shape(x)[: -product.n_inputs]
        y = self.multiply(x if product.n_inputs == 1 else keras.ops.reshape(x, (*kept, self.inputs)))
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
        return Product(1, 1, 0, (1, 0))
    return plain_product(layer.equation, layer.bias_axes)


def exchange(layer: keras.layers.Layer, format: WeightFormat, packed: QuantizedMatrix | None = None) -> None:
    """Makes a built Dense or EinsumDense of Keras' one of ours: the same object, with another class and variables.

    Its weights are those given, or zeros to be loaded into.
    """
    product = kernel_product(layer)
    sizes = [layer.kernel.shape[axis] for axis in product.order]
    # What `del layer._kernel` does, but for its collecting garbage: that would take longer than all else here.
    layer._untrack_variable(layer._kernel)
    super(keras.layers.Layer, layer).__delattr__("_kernel")
    for wrapped in ("build", "quantize"):  # Keras keeps the methods of the class that an object was made as
        vars(layer).pop(wrapped, None)
    layer._tracker.unlock()
    layer.__class__ = PLAIN[type(layer)]
    layer._asked = format
    outputs, inputs = sizes[: product.n_outputs], sizes[product.n_outputs :]
    layer.hold(math.prod(outputs), tuple(inputs), product.n_axes, packed)
    layer._tracker.lock()


def as_bytes(variable: keras.Variable) -> NDArray[np.uint8]:
    """A variable's own memory, which must not be written to."""
    found: Any = np.from_dlpack(tf.convert_to_tensor(variable.value))
    return cast("NDArray[np.uint8]", found)


def _as_tensor(joined: NDArray[np.uint8]) -> tf.Tensor:
    """The array's own memory as a tensor, which keeps it."""
    return tf.experimental.dlpack.from_dlpack(joined.__dlpack__())
