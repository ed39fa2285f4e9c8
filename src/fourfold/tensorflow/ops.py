"""The ops FourfoldLinear and FourfoldRows (csrc/tensorflow_op.h): what TensorFlow knows of our kernels.

They are registered through TensorFlow's C API from the extension that is installed with fourfold: there is nothing to
compile, and no version of TensorFlow is built in. A graph that was saved with them loads wherever this module was
imported.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import tensorflow as tf

import fourfold._core as _core
from fourfold.errors import UserError

GRAD_ROWS_BYTES = 32 << 20  # of weights as float32, for a gradient at a time


def _load() -> Any:
    folder, name = tf.sysconfig.get_link_flags()[:2]
    try:
        _core.find_tensorflow(f"{folder.removeprefix('-L')}/{name.removeprefix('-l:')}")
        ops = tf.load_op_library(str(Path(_core.__file__).with_name("_tensorflow.so")))
        return ops.fourfold_linear, ops.fourfold_rows
    except (RuntimeError, AttributeError, tf.errors.OpError) as error:
        raise UserError(f"TensorFlow {tf.__version__} does not take our ops ({error}); try 2.18 or newer") from None


linear, rows = _load()
"""linear(x, weight, bias) -> y (..., N) of x's type:
x (..., K) float32, float16 or bfloat16; weight uint8 (bytes,) as csrc/tensorflow_op.h describes it; bias (N,), or
(0, N) for none.

rows(weight, outputs, inputs, begin, end) -> float32 (end - begin, K): rows of the weight.
Both raise tf.errors.InvalidArgumentError where tensors are not those of a matrix.
"""


@cache
def no_bias(n: int) -> tf.Tensor:
    """What stands for the bias of N outputs that have none."""
    with tf.init_scope():
        return tf.zeros((0, n), tf.float32)


def input_grad(grad: tf.Tensor, weight: tf.Tensor, inputs: int | tf.Tensor) -> tf.Tensor:
    """grad (..., N) times W (N, K), in float32, for a few MB of rows of W at a time."""
    upstream = tf.cast(tf.reshape(grad, (-1, tf.shape(grad)[-1])), tf.float32)
    n, k = tf.shape(upstream, tf.int64)[1], tf.cast(inputs, tf.int64)
    at_once = tf.maximum(tf.constant(1, tf.int64), GRAD_ROWS_BYTES // (4 * k))

    def add(begin: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        end = tf.minimum(begin + at_once, n)
        some = tf.ensure_shape(rows(weight, n, k, begin, end), (None, None))
        return end, total + tf.matmul(upstream[:, begin:end], some)

    first = tf.constant(0, tf.int64), tf.zeros((tf.shape(upstream, tf.int64)[0], k), tf.float32)
    shapes = tf.TensorShape(()), tf.TensorShape((None, None))
    _, total = tf.while_loop(lambda begin, _: begin < n, add, first, shapes, parallel_iterations=1)
    return tf.cast(tf.reshape(total, tf.concat((tf.shape(grad, tf.int64)[:-1], [k]), 0)), grad.dtype)


@tf.RegisterGradient("FourfoldLinear")  # type: ignore[untyped-decorator]
def _gradient(op: Any, grad: tf.Tensor) -> tuple[tf.Tensor | None, ...]:
    x, weight, bias = op.inputs
    to_x = input_grad(grad, weight, tf.shape(x, tf.int64)[-1])
    to_x.set_shape(x.shape)
    to_bias = None
    if bias.shape.rank == 1:
        to_bias = tf.cast(tf.reduce_sum(tf.reshape(grad, (-1, tf.shape(grad)[-1])), 0), bias.dtype)
    return to_x, None, to_bias


tf.no_gradient("FourfoldRows")
