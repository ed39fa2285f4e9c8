"""fourfold.tensorflow's direct product: the op's bits where nobody else looks, and the op wherever somebody does."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
from keras_models import TYPES, dense, keras, layers, numbers, of_op, tf

import fourfold._core as _core
from fourfold.config import FORMATS
from fourfold.tensorflow import Dense, direct, ops, quantize

# Of Keras and TensorFlow about themselves.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    keras.utils.set_random_seed(0)


@pytest.fixture
def is_direct(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], bool]:
    """Whether a call, made twice, went past our op."""
    calls = []
    op = ops.linear
    monkeypatch.setattr(ops, "linear", lambda *inputs: calls.append(1) or op(*inputs))

    def went_past(call: Callable[[], Any]) -> bool:
        call()
        calls.clear()
        call()
        return not calls

    return went_past


# The same bits


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", TYPES)
def test_its_bits_are_those_of_the_op(fmt: str, dtype: str, is_direct: Any) -> None:
    for use_bias in (True, False):
        layer = dense(fmt=fmt, dtype=dtype, use_bias=use_bias)
        for shape in ((1, 100), (5, 100), (3, 40, 100), (2, 1, 3, 1, 100)):
            x = numbers(*shape, dtype=dtype)
            assert is_direct(lambda: layer(x))  # noqa: B023
            y, expected = layer(x), of_op(layer, x)
            assert type(y) is type(expected)
            assert (y.dtype, y.shape, y.device) == (expected.dtype, expected.shape, expected.device)
            assert np.array_equal(y, expected)
        for shape in ((0, 100), (2, 0, 100)):
            assert layer(numbers(*shape, dtype=dtype)).shape == (*shape[:-1], 50)


@pytest.mark.parametrize(
    ("equation", "bias_axes", "kernel", "x"),
    [
        ("abc,cde->abde", "de", (6, 3, 5), (2, 4, 6)),
        ("abcd,cde->abe", "e", (3, 5, 7), (2, 4, 3, 5)),
        ("abcd,edc->abe", None, (7, 5, 3), (2, 4, 3, 5)),
        ("...x,xy->...y", "y", (6, 5), (2, 3, 4, 6)),
    ],
)
def test_an_einsum_is_direct(equation: str, bias_axes: Any, kernel: Any, x: Any, is_direct: Any) -> None:
    outputs = [
        dict(zip(equation.split(",")[1].split("->")[0], kernel, strict=True))[a] for a in kernel_outputs(equation)
    ]
    shape = (
        tuple(outputs)
        if "..." in equation
        else (None,) * (len(equation.split("->")[1]) - 1 - len(outputs)) + (*outputs,)
    )
    layer = layers.EinsumDense(equation, output_shape=shape, bias_axes=bias_axes, bias_initializer="normal")
    data = numbers(*x)
    layer(data)
    quantize(layer)
    assert is_direct(lambda: layer(data))
    with tf.GradientTape():
        expected = layer(data)
    assert layer(data).shape == expected.shape
    assert np.array_equal(layer(data), expected)


def kernel_outputs(equation: str) -> str:
    kernel, y = equation.replace("...", "").split(",")[1].split("->")
    return "".join(axis for axis in y if axis in kernel)


@pytest.mark.parametrize("activation", ["gelu", "relu", "linear", None, keras.layers.LeakyReLU()])
def test_an_activation_is_what_follows(activation: Any, is_direct: Any) -> None:
    layer, x = dense(activation=activation), numbers(3, 100)
    assert is_direct(lambda: layer(x))
    assert np.array_equal(layer(x), keras.activations.get(activation)(of_op(layer, x)))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_is_direct_where_no_bias_is_cast(policy: str, is_direct: Any) -> None:
    for use_bias in (True, False):
        layer = dense(dtype=policy, use_bias=use_bias)
        x = numbers(2, 100, dtype=layer.compute_dtype)
        assert is_direct(lambda: layer(x)) is not use_bias  # noqa: B023
        bias = tf.cast(layer.bias.value, x.dtype) if use_bias else layer.bias_or_none()
        assert np.array_equal(layer(x), ops.linear(x, layer.weight.value, bias))
        assert layer(numbers(2, 100)).dtype == layer.compute_dtype  # float32 comes in


def test_a_layer_within_one_of_another_type_keeps_its_bias() -> None:
    class Around(layers.Layer):
        def __init__(self, inner: Any) -> None:
            super().__init__(dtype="mixed_bfloat16")
            self.inner = inner

        def call(self, x: Any) -> Any:
            return self.inner(tf.cast(x, "float32"))

    layer, x = dense(), numbers(2, 100)
    expected = of_op(layer, tf.cast(tf.cast(x, "bfloat16"), "float32"))
    around = Around(layer)
    assert np.array_equal(around(x), expected)
    with tf.GradientTape():
        assert np.array_equal(around(x), expected)


# Whoever looks gets the op


@contextmanager
def callback() -> Iterator[None]:
    from tensorflow.python.framework import op_callbacks

    def look(op_type: Any, inputs: Any, attrs: Any, outputs: Any, *_: Any, **__: Any) -> Any:
        return outputs

    op_callbacks.add_op_callback(look)
    try:
        yield
    finally:
        op_callbacks.remove_op_callback(look)


@contextmanager
def numeric_checks() -> Iterator[None]:
    tf.debugging.enable_check_numerics()
    try:
        yield
    finally:
        tf.debugging.disable_check_numerics()


@contextmanager
def placement_logged() -> Iterator[None]:
    tf.debugging.set_log_device_placement(True)
    try:
        yield
    finally:
        tf.debugging.set_log_device_placement(False)


@contextmanager
def profiled() -> Iterator[None]:
    tf.profiler.experimental.start("")
    try:
        yield
    finally:
        tf.profiler.experimental.stop(save=False)


@contextmanager
def distributed() -> Iterator[None]:
    from keras.src.backend.common import global_state

    class Nowhere:
        def get_tensor_layout(self, path: str) -> None:
            return None

    global_state.set_global_attribute("distribution", Nowhere())
    try:
        yield
    finally:
        global_state.set_global_attribute("distribution", None)


@contextmanager
def asynchronous() -> Iterator[None]:
    from tensorflow.python.eager import context, executor

    with context.executor_scope(executor.new_executor(enable_async=True)):
        yield


@contextmanager
def forward() -> Iterator[None]:
    x = tf.ones(())
    with tf.autodiff.ForwardAccumulator(x, x):
        yield


@pytest.mark.parametrize(
    "watch",
    [
        tf.GradientTape,
        lambda: tf.GradientTape(persistent=True, watch_accessed_variables=False),
        forward,
        callback,
        numeric_checks,
        placement_logged,
        profiled,
        distributed,
        asynchronous,
        keras.StatelessScope,
    ],
)
def test_whoever_looks_sees_the_op(watch: Callable[[], AbstractContextManager[Any]], is_direct: Any) -> None:
    layer, x = dense(), numbers(3, 100)
    expected = of_op(layer, x)
    assert is_direct(lambda: layer(x))
    with watch():
        assert not is_direct(lambda: layer(x))
        assert np.array_equal(layer(x), expected)
    assert is_direct(lambda: layer(x))


def test_a_scope_of_a_device_is_one(is_direct: Any) -> None:
    layer, x = dense(), numbers(3, 100)
    layer(x)
    with tf.device("GPU:0"), pytest.raises(tf.errors.InvalidArgumentError, match="GPU:0"):
        layer(x)
    with tf.device("CPU:0"):
        assert is_direct(lambda: layer(x))


def test_a_graph_takes_the_op_for_a_tensor_that_is_already_there() -> None:
    layer, x = dense(), numbers(3, 100)
    expected = layer(x)
    traced = tf.function(lambda: layer(x))
    kinds = {op.type for op in traced.get_concrete_function().graph.get_operations()}
    assert "FourfoldLinear" in kinds
    assert np.array_equal(traced(), expected)


def test_autograph_can_read_a_call() -> None:
    told: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = told.append  # type: ignore[method-assign]
    layer, x = dense(), numbers(3, 100)
    tf.get_logger().addHandler(handler)
    try:
        tf.function(lambda x: layer(x))(x)
    finally:
        tf.get_logger().removeHandler(handler)
    assert not [record.getMessage() for record in told if "AutoGraph" in record.getMessage()]


def test_values_of_a_stateless_scope_are_those_that_count() -> None:
    layer, x = dense(), numbers(3, 100)
    layer(x)
    other = numbers(50)
    y, _ = layer.stateless_call([other], [layer.weight.value], x)
    assert np.array_equal(y, ops.linear(x, layer.weight.value, other))


def test_a_mask_goes_on() -> None:
    layer, x = dense(), numbers(3, 4, 100)
    layer(x)
    x._keras_mask = tf.ones((3, 4), "bool")
    assert layer(x)._keras_mask is x._keras_mask


def test_losses_of_activities_are_added(is_direct: Any) -> None:
    layer, x = dense(activity_regularizer="l2"), numbers(3, 100)
    assert not is_direct(lambda: layer(x))
    assert float(layer.losses[-1]) > 0
    late = dense()
    assert is_direct(lambda: late(x))
    late.activity_regularizer = keras.regularizers.L2(1.0)
    late(x)
    assert float(late.losses[-1]) > 0


def test_what_a_user_changes_counts(is_direct: Any) -> None:
    class Own(Dense):
        def call(self, x: Any, training: bool | None = None) -> Any:
            return super().call(x) * 2

    layer, x = dense(), numbers(3, 100)
    plain = layer(x)
    layer.activation = keras.activations.relu
    assert np.array_equal(layer(x), tf.nn.relu(plain))
    layer.activation = None
    layer.call = lambda x, training=None: x * 0
    assert not np.asarray(layer(x)).any()
    del layer.call
    assert np.array_equal(layer(x), plain)
    own = Own(50)
    own.build((None, 100))
    own.weight.assign(layer.weight.value)
    assert np.array_equal(own(x), own.multiply(x) * 2)


@pytest.mark.parametrize(
    "x",
    [
        np.ones((2, 100), np.float32),
        tf.ones((2, 100), "float16"),
        tf.Variable(tf.ones((2, 100))),
    ],
)
def test_other_inputs_are_kerass_to_convert(x: Any, is_direct: Any) -> None:
    layer = dense()
    assert not is_direct(lambda: layer(x))
    assert layer(x).dtype == "float32"
    ones = tf.ones((2, 100))
    assert np.array_equal(layer(x), layer(ones))


def test_arguments_of_keras_are_taken(is_direct: Any) -> None:
    layer, x = dense(), numbers(3, 100)
    assert np.array_equal(layer(x, training=True), layer(x))
    assert np.array_equal(layer(inputs=x), layer(x))


def test_where_tensorflow_is_another_the_op_computes(monkeypatch: pytest.MonkeyPatch, is_direct: Any) -> None:
    assert direct.IS_POSSIBLE
    assert not _core.find_tensorflow_eager("libnothing.so")
    assert not _core.find_tensorflow_eager("libc.so.6")
    monkeypatch.setattr(direct, "IS_POSSIBLE", False)
    layer, x = dense(), numbers(3, 100)
    assert not is_direct(lambda: layer(x))
    assert np.array_equal(layer(x), of_op(layer, x))


def test_the_bias_of_a_recomputed_layer_has_its_gradient() -> None:
    layer, x = dense(), numbers(3, 100)
    layer(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(tf.recompute_grad(lambda x: layer(x))(x))
    to_x, to_bias = tape.gradient(y, [x, layer.bias.value])
    assert to_x.shape == x.shape
    assert np.array_equal(to_bias, np.full(50, 3, np.float32))


def test_variables_that_a_function_uses_are_noticed() -> None:
    layer, x = dense(), numbers(3, 100)
    layer(x)
    uses = tf.custom_gradient(lambda x: (layer(x), lambda grad: grad))
    with pytest.raises(TypeError, match="variables"):
        uses(x)


ELSEWHERE = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
import keras
from fourfold.tensorflow import ops, quantize
def made():
    layer = keras.layers.Dense(50)
    layer.build((None, 100))
    return quantize(layer)
op, calls = ops.linear, []
ops.linear = lambda *inputs: calls.append(1) or op(*inputs)
here, x = made(), tf.random.normal((2, 100))
with tf.device("CPU:1"):
    there, moved = made(), tf.identity(x)
assert moved.device.endswith("CPU:1"), moved.device
expected = op(x, here.weight.value, here.bias_or_none())
assert np.array_equal(here(x), expected) and not calls
assert np.array_equal(here(moved), expected) and len(calls) == 1
there(x), there(moved)
assert len(calls) == 3
"""


def test_tensors_and_variables_of_another_device_are_the_ops() -> None:
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
