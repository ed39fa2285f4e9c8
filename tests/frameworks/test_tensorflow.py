"""fourfold.tensorflow inside TensorFlow and Keras: eager and traced, gradients, files, threads, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import fourfold._core as _core
import ml_dtypes
import numpy as np
import pytest

import fourfold
from fourfold.config import FORMATS
from fourfold.errors import UserError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what TensorFlow's own modules warn of while they are imported
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: `make frameworks`")
    keras = pytest.importorskip("keras", reason="Keras is not installed: `make frameworks`")
from keras_llama import llama_of

from fourfold.tensorflow import Dense, EinsumDense, ops, quantize
from fourfold.tensorflow.equation import plain_product
from fourfold.tensorflow.layers import as_bytes

pytestmark = [  # of Keras and TensorFlow about themselves
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]
layers = keras.layers
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    keras.utils.set_random_seed(0)


def dense(k: int = 100, n: int = 50, fmt: str = "nf4", **how: Any) -> Any:
    """A quantized layer whose bias, if any, is not zero."""
    layer = layers.Dense(n, bias_initializer="normal", **how)
    layer.build((None, k))
    return quantize(layer, fmt)


def numbers(*shape: int, dtype: str = "float32") -> Any:
    return tf.cast(tf.random.normal(shape), dtype)


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


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda x, w, b: (x[:, :36], w, b), "weight is not that of 50 outputs and 36 inputs in nf4"),
        (lambda x, w, b: (x, w, b[:16]), "weight is not that of 16 outputs and 100 inputs in nf4"),
        (lambda x, w, b: (x, w[1:], b), "weight is not that of 50 outputs and 100 inputs in nf4"),
        (lambda x, w, b: (x, w[:3], b), r"weight must be \(bytes,\)"),
        (lambda x, w, b: (x, w[None], b), r"weight must be \(bytes,\)"),
        (lambda x, w, b: (x, tf.concat([w[:-4], w[:4]], 0), b), "weight does not end in the name of a format"),
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


# Files


@pytest.mark.parametrize("make", [small_model, Subclassed])
@pytest.mark.parametrize("fmt", ["nf4", "bf16"])
def test_a_model_comes_back_from_keras_files(make: Any, fmt: str, tmp_path: Path) -> None:
    model, x = make(), numbers(2, 7, 64)
    model(x)
    quantize(model, fmt)
    expected = model(x)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again).__name__ == type(model).__name__
    assert np.array_equal(again(x), expected)
    again.save(tmp_path / "again.keras")  # and once more
    assert np.array_equal(keras.models.load_model(tmp_path / "again.keras")(x), expected)
    other = make()
    other(x)
    quantize(other, fmt)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    assert np.array_equal(other(x), expected)


def test_weights_of_another_format_are_refused_by_files_and_read_as_what_they_are_elsewhere(tmp_path: Path) -> None:
    model, other = (keras.Sequential([keras.Input((64,)), layers.Dense(8)]) for _ in range(2))
    quantize(model, "nf4")
    quantize(other, "int4")  # as many bytes
    model.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="cannot be loaded: the layer is int4, and its weights are nf4"):  # Keras' own
        other.load_weights(tmp_path / "model.weights.h5")
    plain = keras.Sequential([keras.Input((64,)), layers.Dense(8)])
    with pytest.raises(ValueError, match="expected 2 variables, but received 4"):
        plain.load_weights(tmp_path / "model.weights.h5")
    x = numbers(3, 64)
    path = tf.train.Checkpoint(model).save(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(other).restore(path).expect_partial()  # behind the layer's back
    assert np.array_equal(other(x), model(x))


@pytest.mark.parametrize("damage", ["weight", "weight_scale", "bias"])
def test_damaged_weights_are_refused(damage: str) -> None:
    layer, store = dense(), {}
    layer.save_own_variables(store)
    kept = {name: np.asarray(value) for name, value in store.items()}
    assert {name: value.dtype.name for name, value in kept.items()} == {
        "weight": "uint8", "weight_scale": "uint8", "weight_format": "uint8", "bias": "float32",
    }  # fmt: skip
    layer.load_own_variables(kept)
    with pytest.raises(UserError, match=f"dense.* cannot be loaded: .*{damage}|a bias is missing"):
        layer.load_own_variables({name: value for name, value in kept.items() if name != damage})
    with pytest.raises((UserError, ValueError), match=r"must be uint8 \(.*\); what is stored|must match"):
        layer.load_own_variables({**kept, damage: kept[damage][:-1]})


def test_a_saved_model_runs_in_a_process_that_knows_only_the_ops(tmp_path: Path) -> None:
    model, x = small_model(), numbers(2, 7, 64)
    quantize(model)
    expected = model(x)
    model.export(tmp_path / "exported", verbose=False)
    tf.saved_model.save(model, str(tmp_path / "saved"))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", expected)
    script = """
import sys, numpy as np, tensorflow as tf
root = sys.argv[1]
try:
    tf.saved_model.load(f"{root}/exported")
    raise SystemExit("loaded without the ops")
except RuntimeError as error:
    assert "FourfoldLinear" in str(error), error
tf.config.threading.set_intra_op_parallelism_threads(1)
import fourfold.tensorflow
x, y = (np.load(f"{root}/{name}.npy") for name in "xy")
exported, saved = (tf.saved_model.load(f"{root}/{name}") for name in ("exported", "saved"))
for call in (exported.serve, saved.signatures["serving_default"]):
    found = call(tf.constant(x))
    found = next(iter(found.values())) if isinstance(found, dict) else found
    np.testing.assert_allclose(found, y, atol=1e-6)
print("the same")
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "the same", done.stderr[-2000:]


# Memory and threads


def test_the_kernel_reads_the_variables_own_memory() -> None:
    layer = dense(512, 512, use_bias=False)
    mine = as_bytes(layer.weight).ctypes.data
    for run in (layer, tf.function(lambda x: layer(x)), layer.call):
        run(numbers(1, 512))
        assert _core.last_tensorflow_weight() == mine
        dense()(numbers(1, 100))
        assert _core.last_tensorflow_weight() != mine


def test_a_quantized_model_holds_its_weights_once() -> None:
    """In a process of its own: 8 layers of 2048 × 2048, 134 MB in float32, 18 MB in nf4; and what calls add to that."""
    script = """
import ctypes, gc, resource, keras, tensorflow as tf
from fourfold.tensorflow import quantize
def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 1e6
model = keras.Sequential([keras.Input((2048,)), *(keras.layers.Dense(2048) for _ in range(8))])
full = resident()
quantize(model)
packed = resident()
traced = tf.function(lambda x: model(x))
for _ in range(3):
    model(tf.zeros((1, 2048)))
    traced(tf.zeros((1, 2048)))
print(full - packed, resident() - packed)
"""
    no_pool = {"TF_ENABLE_ONEDNN_OPTS": "0"}  # else TensorFlow keeps what is given back in a pool of its own
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **no_pool}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    freed, added_by_calls = map(float, done.stdout.split())
    assert freed > 0.9 * (134 - 18)
    assert added_by_calls < 18 / 2


def test_threads_are_as_many_as_tensorflow_is_told() -> None:
    script = """
import os, sys, keras, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
from fourfold.tensorflow import quantize
layer = keras.layers.Dense(2048); layer.build((None, 2048)); quantize(layer)
x = tf.zeros((1, 2048))
tf.raw_ops.Neg(x=x)
before = len(os.listdir("/proc/self/task"))
layer(x)
print(len(os.listdir("/proc/self/task")) - before)
"""
    command = [sys.executable, "-c", script, "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 4  # beside the caller


def test_another_backend_and_a_missing_package_are_refused_in_a_sentence(tmp_path: Path) -> None:
    def run(script: str, **environment: str) -> str:
        command = [sys.executable, "-c", f"import sys\n{script}\nimport fourfold.tensorflow"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
        return done.stderr.strip().splitlines()[-1]

    pytest.importorskip("torch", reason="torch is not installed: `make frameworks`")
    assert "and it runs on torch; set KERAS_BACKEND=tensorflow" in run("", KERAS_BACKEND="torch")
    assert "pip install 'fourfold[tensorflow]'" in run("sys.modules['keras'] = None")


# A decoder


@pytest.mark.parametrize("fmt", ["nf4", "f32"])
def test_a_llama_in_keras_writes_what_fourfold_writes(fmt: str, smollm2: Path, converted: Any) -> None:
    from fourfold import LLM, SamplingParams
    from fourfold.checkpoint import open_source

    with open_source(smollm2) as source:
        model = llama_of(source)
    quantize(model, fmt)
    model.embedding.set_weights([model.head.dequantize()])  # fourfold looks up what it multiplies by
    with LLM(converted(smollm2, fmt), kv="f32") as llm:
        for prompt in ("The capital of France is", "def fibonacci(n):"):
            ids = llm.tokenizer.encode(prompt)
            expected = llm.generate(prompt, SamplingParams(max_tokens=10, ignore_eos=True))[0].token_ids
            assert model.continue_greedily(list(ids), 10) == list(expected)
