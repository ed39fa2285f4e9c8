"""fourfold.tensorflow inside TensorFlow and Keras: eager and traced, gradients, models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from keras_models import TYPES, Subclassed, dense, keras, layers, numbers, small_model, tf

import fourfold
from fourfold.config import FORMATS
from fourfold.errors import UserError
from fourfold.tensorflow import Dense, EinsumDense, ops, quantize
from fourfold.tensorflow.equation import plain_product
from fourfold.tensorflow.layers import as_bytes

# Of Keras and TensorFlow about themselves.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    keras.utils.set_random_seed(0)


# The op


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", TYPES)
def test_it_is_the_linear_of_arrays_eagerly_and_traced(fmt: str, dtype: str) -> None:
    layer = dense(fmt=fmt, dtype=dtype)
    traced = tf.function(lambda x: layer(x))
    values = layer.dequantize()
    matrix = fourfold.quantize(values, fmt)
    for shape in ((1, 100), (3, 40, 100), (0, 100), (2, 0, 100)):
        x = numbers(*shape, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert y.shape == (*shape[:-1], 50)
        assert np.array_equal(y, traced(x))
        if fmt in ("bf16", "f32"):  # quantizing what is quantized changes nothing
            assert np.array_equal(y, fourfold.linear(np.asarray(x), matrix, np.asarray(layer.bias, TYPES[dtype])))


@pytest.mark.parametrize("fmt", ["nf4", "bf16"])
@pytest.mark.parametrize("dtype", TYPES)
def test_its_bits_are_those_of_the_linear_for_pytorch(fmt: str, dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: `make frameworks`")
    from fourfold.torch import Linear

    kernel, bias = np.asarray(numbers(300, 70)), np.asarray(numbers(70))
    layer = layers.Dense(70, dtype=dtype)
    layer.build((None, 300))
    layer.set_weights([kernel, bias])
    quantize(layer, fmt)
    plain = torch.nn.Linear(300, 70).to(getattr(torch, dtype))
    with torch.no_grad():
        plain.weight.copy_(torch.tensor(kernel.T.copy()))
        plain.bias.copy_(torch.tensor(bias))
    theirs = Linear.from_float(plain, format=fmt)
    for rows in (1, 5, 40):
        x = np.asarray(numbers(rows, 300))
        y = layer(tf.cast(x, dtype))
        expected = theirs(torch.tensor(x).to(getattr(torch, dtype))).detach()
        assert np.array_equal(tf.cast(y, "float32"), expected.float().numpy())


def test_subnormal_numbers_are_not_flushed_by_threads_of_tensorflow() -> None:
    layer = dense(64, 2048, "f32", use_bias=False)
    matrix = fourfold.quantize(layer.dequantize(), "f32")
    x = tf.constant(np.asarray(numbers(1, 64)) * np.float32(1e-39))
    expected = fourfold.linear(np.asarray(x), matrix)
    assert 0 < np.abs(expected).max() < np.finfo(np.float32).tiny
    assert np.array_equal(layer(x), expected)
    assert np.array_equal(tf.function(lambda x: layer(x))(x), expected)


def test_shapes_are_known_before_anything_is_computed() -> None:
    for bias in (True, False):
        layer = dense(use_bias=bias)
        traced = tf.function(lambda x: ops.linear(x, layer.weight.value, layer.bias_or_none()))  # noqa: B023
        found = traced.get_concrete_function(tf.TensorSpec((None, 3, 100))).structured_outputs
        assert found.shape.as_list() == [None, 3, 50]
    assert dense().compute_output_shape((None, 3, 100)) == (None, 3, 50)


@pytest.mark.parametrize("width", [1, 63])  # as many tiles of weights as 64 inputs
@pytest.mark.parametrize("has_einsum", [False, True])
def test_an_input_of_another_width_is_refused_eagerly_and_traced(width: int, has_einsum: bool) -> None:
    layer = layers.EinsumDense("...x,xy->...y", output_shape=8) if has_einsum else layers.Dense(8)
    layer.build((None, 64))
    quantize(layer)
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 64"):
        layer(numbers(2, width))
    with pytest.raises(ValueError, match="expected min_ndim=2, found ndim=1"):
        layer(numbers(64))
    traced = tf.function(lambda x: layer(x), input_signature=[tf.TensorSpec((None, None))])
    x = numbers(2, 64)
    assert np.array_equal(traced(x), layer(x))
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"\[2,{width}\] is not compatible .* \[\?,64\]"):
        traced(x[:, :width])


def test_an_einsum_takes_the_axes_of_its_equation_alone() -> None:
    layer = layers.EinsumDense("abcd,cde->abe", output_shape=(None, 7))
    layer.build((None, 4, 3, 5))
    quantize(layer)
    with pytest.raises(ValueError, match="expected axis -2 of input shape to have value 3"):
        layer(numbers(2, 4, 5, 3))
    with pytest.raises(ValueError, match="expected ndim=4, found ndim=3"):
        layer(numbers(4, 3, 5))
    traced = tf.function(lambda x: layer(x), input_signature=[tf.TensorSpec((None,) * 4)])
    x = numbers(2, 4, 3, 5)
    assert np.array_equal(traced(x), layer(x))
    with pytest.raises(tf.errors.InvalidArgumentError, match="is not compatible"):
        traced(numbers(2, 4, 5, 3))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda x, w, b: (x[:, :36], w, b), "weight is not that of 50 outputs and 36 inputs in nf4"),
        (lambda x, w, b: (x, w, b[:16]), "weight is not that of 16 outputs and 100 inputs in nf4"),
        (lambda x, w, b: (x, w[1:], b), "weight is not that of 50 outputs and 100 inputs in nf4"),
        (lambda x, w, b: (x, w[:3], b), r"weight must be \(bytes,\)"),
        (lambda x, w, b: (x, w[None], b), r"weight must be \(bytes,\)"),
        (lambda x, w, b: (x, tf.concat([w[:-8], w[:8]], 0), b), "weight does not end in the name of a format"),
        (lambda x, w, b: (x, w, b[None]), r"bias must be \(outputs,\), or \(0, outputs\) for none"),
        (lambda x, w, b: (x, w, b[0]), r"bias must be \(outputs,\), or \(0, outputs\) for none"),
        (lambda x, w, b: (x[0, 0], w, b), "the last axis of x must be the inputs; x has none"),
    ],
)
def test_tensors_that_are_not_those_of_a_matrix_are_refused(change: Any, complaint: str) -> None:
    layer = dense()
    x, w, b = change(numbers(1, 100), tf.convert_to_tensor(layer.weight.value), tf.convert_to_tensor(layer.bias.value))
    with pytest.raises(tf.errors.InvalidArgumentError, match=complaint):
        ops.linear(x, w, b)


def test_rows_outside_the_matrix_are_refused() -> None:
    layer = dense()
    weight = layer.weight.value
    assert np.array_equal(ops.rows(weight, 50, 100, 7, 9), layer.dequantize()[7:9])
    for numbers_of in ((50, 100, 0, 51), (50, 100, 3, 2), (50, 100, -1, 2), (1 << 40, 100, 0, 1)):
        with pytest.raises(tf.errors.InvalidArgumentError):
            ops.rows(weight, *numbers_of)


def test_xla_says_that_it_has_no_such_kernel() -> None:
    layer = dense()
    with pytest.raises(tf.errors.InvalidArgumentError, match="No registered 'FourfoldLinear' OpKernel for XLA_CPU_JIT"):
        tf.function(lambda x: layer(x), jit_compile=True)(numbers(1, 100))


# Gradients


@pytest.mark.parametrize("traced", [False, True])
def test_the_input_and_the_bias_have_gradients(traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "GRAD_ROWS_BYTES", 4 * 100 * 16)  # several turns
    layer = dense()
    plain, upstream = tf.constant(layer.dequantize()), numbers(2, 3, 50)

    def gradients(x: Any, multiply: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(upstream * multiply(x))
        return tape.gradient(loss, [x, layer.bias.value])

    run = tf.function(gradients) if traced else gradients
    x = numbers(2, 3, 100)
    ours = run(x, lambda x: layer(x))
    theirs = run(x, lambda x: tf.linalg.matvec(plain, x) + layer.bias.value)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine.shape == reference.shape
        np.testing.assert_allclose(mine, reference, atol=1e-5)


def test_an_adapter_on_a_quantized_model_trains() -> None:
    x = inputs = keras.Input((32,))
    frozen = layers.Dense(32, activation="relu")
    x = frozen(x)
    model = keras.Model(inputs, layers.Dense(1, name="adapter")(layers.Dense(32)(x) + inputs))
    quantize(model, choose=lambda path, _: "adapter" not in path)
    before = np.asarray(as_bytes(frozen.weight)).copy()
    model.compile(optimizer=keras.optimizers.Adam(0.05), loss="mse")
    assert model.jit_compile is False
    data = np.asarray(numbers(64, 32))
    losses = model.fit(data, data.sum(1, keepdims=True), epochs=15, verbose=0).history["loss"]
    assert losses[-1] < losses[0] / 3
    assert np.array_equal(before, as_bytes(frozen.weight))


# Models


def test_every_layer_of_a_model_is_exchanged_in_place() -> None:
    model, x = small_model(), numbers(2, 7, 64)
    kept = {layer.path: layer for layer in model._flatten_layers()}
    before, predicted = model(x), model.predict(x, verbose=0)
    np.testing.assert_allclose(predicted, before, atol=1e-5)
    assert quantize(model, "int8") is model
    now = {layer.path: layer for layer in model._flatten_layers()}
    assert {path: id(layer) for path, layer in kept.items()} == {path: id(layer) for path, layer in now.items()}
    assert sum(isinstance(layer, Dense | EinsumDense) for layer in now.values()) == 3 + 4 + 1
    after = model(x)
    assert 0 < np.abs(after - before).max() < 0.03 * np.abs(before).max()
    np.testing.assert_allclose(model.predict(x, verbose=0), after, atol=1e-5)  # not what was traced before
    assert {v.dtype for v in model.non_trainable_variables} == {"uint8"}
    assert all("bias" in v.name for v in model.trainable_variables)


def test_what_cannot_be_exchanged_is_left_and_named() -> None:
    class Own(layers.Dense):
        pass

    with_lora = layers.Dense(8, name="adapted")
    model = keras.Sequential(
        [
            keras.Input((4, 8)),
            layers.EinsumDense("abc,bcd->abd", output_shape=(4, 8), name="by_position"),
            layers.EinsumDense("abc,cd->abd", output_shape=(4, 8), bias_axes="bd", name="odd_bias"),
            Own(8, name="own"),
            layers.Dense(8, dtype="float64", name="doubles"),
            with_lora,
            layers.Dense(8, name="plain"),
        ]
    )
    with_lora.enable_lora(2)
    before = [type(layer) for layer in model.layers[:-1]]
    with pytest.warns(UserWarning, match="left as they were") as told:
        quantize(model)
    text = str(told[0].message)
    for complaint in (
        "by_position ('abc,bcd->abd' is not one product",
        "odd_bias (its bias over the axes 'bd'",
        "own (Own computes something of its own)",
        "doubles (it computes in float64)",
        "adapted (it has a LoRA)",
    ):
        assert complaint in text
    assert "plain" not in text
    assert [type(layer) for layer in model.layers[:-1]] == before
    assert type(model.layers[-1]) is Dense


@pytest.mark.parametrize(
    ("equation", "bias_axes", "kernel", "x"),
    [
        ("abc,cde->abde", "de", (6, 3, 5), (2, 4, 6)),
        ("abcd,cde->abe", "e", (3, 5, 7), (2, 4, 3, 5)),
        ("abcd,edc->abe", None, (7, 5, 3), (2, 4, 3, 5)),
        ("...x,xy->...y", "y", (6, 5), (2, 3, 4, 6)),
    ],
)
def test_an_einsum_is_the_product_that_it_says(equation: str, bias_axes: Any, kernel: Any, x: Any) -> None:
    product = plain_product(equation, bias_axes)
    outputs = [kernel[axis] for axis in product.order[: product.n_outputs]]
    shape = tuple(outputs) if "..." in equation else (*x[1 : -product.n_inputs], *outputs)
    layer = layers.EinsumDense(equation, output_shape=shape, bias_axes=bias_axes, bias_initializer="normal")
    data = numbers(*x)
    expected = layer(data)
    quantize(layer, "f32")
    assert type(layer) is EinsumDense
    assert layer.compute_output_shape(x) == tuple(expected.shape)
    np.testing.assert_allclose(layer(data), expected, atol=1e-5)
    np.testing.assert_allclose(tf.function(layer)(data), expected, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_mixed_precision_is_that_of_the_layer(policy: str) -> None:
    compute = keras.DTypePolicy(policy).compute_dtype
    layer = dense(dtype=policy)
    y = layer(numbers(2, 100))  # float32 comes in
    assert y.dtype == compute
    x = tf.cast(numbers(2, 100), compute)
    bias = tf.cast(layer.bias.value, compute)
    assert np.array_equal(layer(x), ops.linear(x, layer.weight.value, bias))


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (lambda: quantize(small_model(), "nf5"), "there is no format 'nf5'"),
        (lambda: quantize(Subclassed()), "has no weights yet; call or build the model"),
        (lambda: quantize(keras.Sequential([layers.Dense(4, name="head")])), "^head has no weights yet"),
        (lambda: quantize(3), "quantize takes a Keras model or layer, not int"),
        (lambda: dense(fmt="nf5"), "there is no format 'nf5'"),
        (lambda: Dense(0), "a layer needs units"),
        (lambda: Dense(5, dtype="float64").build((1, 4)), "computes in float64"),
        (lambda: EinsumDense("abc,bcd->abd", (4, 8)), "'abc,bcd->abd' is not one product"),
    ],
)
def test_mistakes_are_named(break_it: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        break_it()


def test_weights_that_are_not_finite_and_optimizers_that_hold_them_are_refused() -> None:
    layer = layers.Dense(4, kernel_initializer=lambda shape, dtype: tf.fill(shape, float("nan")))
    layer.build((None, 4))
    with pytest.raises(UserError, match="weights must be finite numbers"):
        quantize(layer)
    model = small_model()
    model.compile(optimizer="sgd", loss="mse")
    data = np.asarray(numbers(4, 7, 64))
    model.fit(data, data[..., :10], verbose=0)
    with pytest.raises(UserError, match="the model's optimizer still holds the weights"):
        quantize(model)
    model.compile(optimizer="sgd", loss="mse")
    quantize(model)
    model.fit(data, data[..., :10], verbose=0)
