"""fourfold.tensorflow's direct product multiplies by what its variables hold when it is called, whoever assigned it."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keras_models import dense, keras, layers, numbers, of_op, tf

from fourfold.tensorflow import quantize

# Of Keras and TensorFlow about themselves.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    keras.utils.set_random_seed(0)


def other_weights(layer: Any, fmt: str = "nf4") -> Any:
    return tf.identity(dense(fmt=fmt).weight.value)


CHANGES: dict[str, Callable[[Any, Any, Path], object]] = {
    "keras": lambda layer, new, _: layer.weight.assign(new),
    "tensorflow": lambda layer, new, _: layer.weight.value.assign(new),
    "graph": lambda layer, new, _: tf.function(lambda: layer.weight.value.assign(new).shape)(),
    "op": lambda layer, new, _: tf.raw_ops.AssignVariableOp(resource=layer.weight.value.handle, value=new),
    "checkpoint": lambda layer, new, path: restored(layer, new, path),
    "set_weights": lambda layer, new, _: layer.set_weights([np.asarray(layer.bias), np.asarray(new)]),
}


def restored(layer: Any, new: Any, path: Path) -> None:
    old = tf.identity(layer.weight.value)
    layer.weight.assign(new)
    saved = tf.train.Checkpoint(layer).save(str(path / "weights"))
    layer.weight.assign(old)
    layer(numbers(1, 100))
    tf.train.Checkpoint(layer).restore(saved)


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("holds", [True, False])
def test_weights_that_are_assigned_are_those_of_the_next_call(how: str, holds: bool, tmp_path: Path) -> None:
    layer, x = dense(), numbers(3, 100)
    for _ in range(3):
        before = layer(x)
    kept = layer.weight.value.read_value() if holds else None
    CHANGES[how](layer, other_weights(layer), tmp_path)
    expected = of_op(layer, x)
    assert not np.array_equal(expected, before)
    for _ in range(3):
        assert np.array_equal(layer(x), expected)
    assert kept is None or not np.array_equal(kept, layer.weight.value)


def test_a_bias_that_trains_is_that_of_the_next_call() -> None:
    layer, x = dense(), numbers(3, 100)
    bias, step = layer.bias.value, numbers(50)
    changes = (
        lambda: bias.assign(step),
        lambda: bias.assign_add(step),
        lambda: bias.assign_sub(step / 3),
        lambda: bias[3:9].assign(step[3:9]),
        lambda: bias.scatter_nd_update([[7], [2]], [3.0, 4.0]),  # from here on every read is a copy
        lambda: bias.scatter_nd_update([[1]], [5.0]),
        lambda: keras.optimizers.Adam(0.1).apply([step], [layer.bias]),
    )
    for change in changes:
        for _ in range(3):
            before = layer(x)
        change()
        for _ in range(3):
            y = layer(x)
            assert np.array_equal(y, of_op(layer, x))
            assert not np.array_equal(y, before)


def test_weights_say_anew_what_they_are_in() -> None:
    layer, x = dense(), numbers(3, 100)
    layer(x)
    layer(x)
    was = tf.identity(layer.weight.value)
    layer.weight.value.assign(other_weights(layer, "fp4"))
    assert layer.format == "fp4"
    assert np.array_equal(layer(x), of_op(layer, x))
    layer.weight.value.assign(tf.zeros_like(was))
    for _ in range(3):
        with pytest.raises(tf.errors.InvalidArgumentError, match="does not end in the name of a format"):
            layer(x)
    layer.weight.value.assign(was)
    for _ in range(3):
        assert np.array_equal(layer(x), of_op(layer, x))


def test_weights_that_are_loaded_replace_those_that_were_held(tmp_path: Path) -> None:
    first, second = (keras.Sequential([keras.Input((100,)), layers.Dense(50)]) for _ in range(2))
    for model in (first, second):
        quantize(model)
    x = numbers(3, 100)
    first.layers[0](x)
    second.save_weights(tmp_path / "of.weights.h5")
    first.load_weights(tmp_path / "of.weights.h5")
    assert "_ways" not in vars(first.layers[0])
    assert np.array_equal(first.layers[0](x), second.layers[0](x))


def test_a_layer_takes_its_variables_along() -> None:
    layer = dense()
    layer(numbers(1, 100))
    weight = weakref.ref(layer.weight.value)
    del layer
    gc.collect()
    assert weight() is None


def test_a_copy_has_its_own() -> None:
    layer, x = dense(), numbers(3, 100)
    y = layer(x)
    copied = copy.deepcopy(layer)
    assert np.array_equal(copied(x), y)
    copied.weight.assign(other_weights(layer))
    assert np.array_equal(layer(x), y)
    assert not np.array_equal(copied(x), y)


def test_threads_share_a_layer() -> None:
    layer, xs = dense(512, 512), [numbers(1, 512) for _ in range(4)]
    expected = [np.asarray(layer(x)) for x in xs]
    wrong = []

    def call(i: int) -> None:
        wrong.extend(i for _ in range(200) if not np.array_equal(layer(xs[i]), expected[i]))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
