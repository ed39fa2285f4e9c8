"""What TensorFlow and Keras add to a kernel: one token through layers of K × K weights, beside the kernel called alone.

    python benchmarks/tensorflow_overhead.py [--sizes 4096,8192] [--format nf4] [--megabytes 300] [--repeats 41]

Several layers, more than the last cache holds, are gone through in turn, as a decoder does: by the bare kernel on numpy
arrays (the same bytes: the layers' own), by Keras layers called eagerly, and by one tf.function of all of them. A
repetition is one pass of each, so that they share the machine's minutes; ratios are of passes of the same repetition.
What TensorFlow takes for any op at that place, caches being full of weights, is shown by an op of its own, -x; and what
it takes to call a tf.function there, whatever is in it, by one of nothing but -x. Such a call is made once for all
layers: "but for the call" is the layers' own share of a pass.
Needs `pip install 'fourfold[tensorflow]'`. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import fourfold._core as _core
from fourfold.json_text import json_text
from fourfold.matrix import default_threads
from fourfold.tensorflow import Dense, quantize
from fourfold.tensorflow.layers import as_bytes
from fourfold.tensorflow.stored import split

Pass = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="4096,8192", help="K = N of the layers")
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--megabytes", type=int, default=300, help="of quantized weights to rotate over")
    parser.add_argument("--repeats", type=int, default=41)
    options = parser.parse_args()
    results = []
    for size in map(int, options.sizes.split(",")):
        for name, times in measure(size, options.format, options.megabytes, options.repeats).items():
            results.append({"size": size, "what": name, **times})
            spread = f"({times['low']:.3f}–{times['high']:.3f})"
            print(f"{size:6} {name:48} {times['us']:8.1f} µs  {times['ratio']:.3f} {spread}")
    print(json_text({"format": options.format, "threads": default_threads(), "results": results}))


def measure(size: int, format: str, megabytes: int, repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds a layer, and the ratio to the bare kernel: median, lower and upper quartile over the repetitions.

    That of the call of a tf.function is microseconds a call.
    """
    layers = [random_layer(size, format) for _ in range(max(2, megabytes * 1_000_000 // (size * size // 2)))]
    x = tf.random.normal((1, size))
    together = tf.function(lambda x: [layer(x) for layer in layers])
    chained = tf.function(lambda x: through(layers, x))
    smallest = tf.function(lambda x: -x)
    smallest(x)
    bare = bare_pass(layers, np.asarray(x))
    passes: dict[str, Pass] = {
        "bare kernel": bare,
        "layers, eager": lambda: [layer(x) for layer in layers],
        "tf.function, one after another": lambda: chained(x),
        "tf.function, side by side": lambda: together(x),
        "bare kernel, then an op of theirs": lambda: bare(lambda: tf.raw_ops.Neg(x=x)),
    }
    check(layers, np.asarray(x), passes)
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    calls = []
    for _ in range(repeats + 2):  # two to warm up
        for name, run in passes.items():
            seconds[name].append(time_of(run) / len(layers))
        bare()
        calls.append(time_of(lambda: smallest(x)))
    for name in [name for name in passes if name.startswith("tf.function")]:
        pairs = zip(seconds[name], calls, strict=True)
        seconds[f"{name}, but for the call"] = [whole - call / len(layers) for whole, call in pairs]
    seconds["a call of a tf.function"] = calls
    alone = seconds["bare kernel"][2:]
    return {name: summary(found[2:], alone) for name, found in seconds.items()}


def time_of(run: Pass) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def random_layer(size: int, format: str) -> Dense:
    layer = keras.layers.Dense(size, use_bias=False, kernel_initializer=keras.initializers.RandomNormal(0, size**-0.5))
    layer.build((None, size))
    quantize(layer, format)
    return cast(Dense, layer)


def through(layers: list[Dense], x: Any) -> Any:
    for layer in layers:
        x = layer(x)
    return x


def bare_pass(layers: list[Dense], x: Any) -> Callable[..., object]:
    """The kernel on the layers' own bytes, by address: nothing between Python and it, but what comes after each."""
    y = np.empty((1, layers[0].outputs), np.float32)
    calls = []
    for layer in layers:
        parts = split(as_bytes(layer.weight), layer.outputs, layer.inputs)
        scales = parts["weight_scale"].ctypes.data if "weight_scale" in parts else 0
        weights = (layer.format, layer.outputs, layer.inputs, parts["weight"].ctypes.data, scales)
        calls.append((*weights, x.ctypes.data, 0, 1, x.shape[1], 0, 0, y.ctypes.data, 0, default_threads(), False))

    def run(after: Pass = lambda: None) -> Any:
        for call in calls:
            _core.matmul(*call)
            after()
        return y

    return run


def check(layers: list[Dense], x: Any, passes: dict[str, Pass]) -> None:
    """All ways give the same bits."""
    last = np.asarray(passes["bare kernel"]())
    for name in ("layers, eager", "tf.function, side by side"):
        if not np.array_equal(last, np.asarray(passes[name]()[-1])):  # type: ignore[index]
            raise SystemExit(f"{name} does not give the bare kernel's bits")


def summary(seconds: list[float], bare: list[float]) -> dict[str, float]:
    ratios = [mine / theirs for mine, theirs in zip(seconds, bare, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {"us": statistics.median(seconds) * 1e6, "ratio": statistics.median(ratios), "low": low, "high": high}


if __name__ == "__main__":
    main()
