"""fourfold.tensorflow: files, memory, threads, and a decoder that holds a real model's weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keras_llama import llama_of
from keras_models import Subclassed, dense, keras, layers, numbers, small_model, tf

import fourfold._core as _core
from fourfold.errors import UserError
from fourfold.tensorflow import quantize
from fourfold.tensorflow.layers import as_bytes

# Of Keras and TensorFlow about themselves.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    keras.utils.set_random_seed(0)


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
    assert other.layers[0].format == "nf4"
    other.save(tmp_path / "other.keras")
    assert np.array_equal(keras.models.load_model(tmp_path / "other.keras")(x), model(x))


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
tf.config.threading.set_intra_op_parallelism_threads(1)
try:
    tf.saved_model.load(f"{root}/exported")
    raise SystemExit("loaded without the ops")
except RuntimeError as error:
    assert "FourfoldLinear" in str(error), error
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
