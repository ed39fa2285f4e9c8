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
    folder, name = (flag[2:] for flag in tf.sysconfig.get_link_flags()[:2])  # -L/folder, -l:libtensorflow_framework.so.2
    try:
        _core.find_tensorflow(f"{folder}/{name.removeprefix(':')}")
        ops = tf.load_op_library(str(Path(_core.__file__).with_name("_tensorflow.so")))
        return ops.fourfold_linear, ops.fourfold_rows
    except (RuntimeError, AttributeError, tf.errors.OpError) as error:
        raise UserError(f"TensorFlow {tf.__version__} does not take our ops ({error}); try 2.18 or newer") from None


linear, rows = _load()
"""linear(x, weight, weight_scale, weight_format, bias) -> y (..., N) of x's type:
x (..., K) float32, float16 or bfloat16; weight uint8 (P, bytes of a panel); weight_scale uint8 (P, 4), or (0, 4) for a
format without scales; weight_format uint8 (4,); bias (N,), or (0, N) for none.

rows(weight, weight_scale, weight_format, begin, end) -> float32 (end - begin, K rounded up to tiles): rows of the
weight. Both raise tf.errors.InvalidArgumentError where tensors are not those of a matrix.
"""


@cache
def no_scales() -> tf.Tensor:
    """What stands for the scales of a format that has none."""
    with tf.init_scope():
        return tf.zeros((0, 4), tf.uint8)


@cache
def no_bias(n: int) -> tf.Tensor:
    """What stands for the bias of N outputs that have none."""
    with tf.init_scope():
        return tf.zeros((0, n), tf.float32)


def input_grad(
    grad: tf.Tensor, weight: tf.Tensor, weight_scale: tf.Tensor, weight_format: tf.Tensor, in_features: tf.Tensor | int
) -> tf.Tensor:
    """grad (..., N) times W (N, K), in float32, for a few MB of rows of W at a time."""
    upstream = tf.cast(tf.reshape(grad, (-1, tf.shape(grad)[-1])), tf.float32)
    n = tf.shape(upstream, tf.int64)[1]
    at_once = tf.maximum(tf.constant(1, tf.int64), GRAD_ROWS_BYTES // (4 * tf.cast(in_features, tf.int64)))

    def add(begin: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        end = tf.minimum(begin + at_once, n)
        some = rows(weight, weight_scale, weight_format, begin, end)[:, :in_features]
        return end, total + tf.matmul(upstream[:, begin:end], some)

    total = tf.zeros((tf.shape(upstream)[0], in_features), tf.float32)
    begin = tf.constant(0, tf.int64)
    shapes = (begin.shape, tf.TensorShape((None, None)))
    _, total = tf.while_loop(lambda begin, _: begin < n, add, (begin, total), shapes, parallel_iterations=1)
    shape = tf.concat((tf.shape(grad)[:-1], [in_features]), 0)
    return tf.cast(tf.reshape(total, shape), grad.dtype)


@tf.RegisterGradient("FourfoldLinear")
def _gradient(op: Any, grad: tf.Tensor) -> tuple[tf.Tensor | None, ...]:
    x, weight, weight_scale, weight_format, bias = op.inputs
    k = x.shape[-1] if x.shape.rank is not None and x.shape[-1] is not None else tf.shape(x)[-1]
    to_x = input_grad(grad, weight, weight_scale, weight_format, k)
    to_x.set_shape(x.shape)
    to_bias = None
    if bias.shape.rank == 1:
        to_bias = tf.cast(tf.reduce_sum(tf.reshape(grad, (-1, tf.shape(grad)[-1])), 0), bias.dtype)
    return to_x, None, None, None, to_bias


tf.no_gradient("FourfoldRows")
