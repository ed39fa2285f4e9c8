"""A layer's product past Keras' `Layer.__call__` and TensorFlow's dispatcher, where only the caller is to see it.

The two take longer than a matrix of 4096 × 4096 may spare, the more so with the cold caches that weights leave behind.
An eager tensor that nothing follows takes one call into C++, which reads tensors and variables through TensorFlow's C
API (csrc/tensorflow_direct.h). Everything else goes the old way, and so does every mistake, so that messages are
TensorFlow's and Keras' own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import tensorflow as tf

import fourfold._core as _core
from fourfold.tensorflow import ops as _ops  # noqa: F401  # finds the part of TensorFlow's C API that ops need

if TYPE_CHECKING:
    from fourfold.tensorflow.layers import Packed

# What follows an eager call is kept in places that neither Keras nor TensorFlow has made public. Where one of them is
# not found, nothing is direct.
try:
    from keras.src.backend.common import global_state as _keras_state
    from keras.src.distribution.distribution_lib import GLOBAL_ATTRIBUTE_NAME as _DISTRIBUTION
    from tensorflow.python.eager import context as _eager
    from tensorflow.python.ops.resource_variable_ops import ResourceVariable
    from tensorflow.python.profiler import profiler_v2 as _profiler

    _scopes = _keras_state.GLOBAL_STATE_TRACKER
    _has_places = all(
        (
            hasattr(_scopes, "__dict__"),
            hasattr(_profiler, "_profiler"),
            hasattr(_eager.context(), "_log_device_placement"),
            all(hasattr(_eager.context()._thread_local_data, of) for of in ("is_eager", "device_name", "op_callbacks")),
        )
    )
except (ImportError, AttributeError):
    _has_places = False

HERE = frozenset((None, "", "/job:localhost/replica:0/task:0/device:CPU:0"))  # devices that a scope may have chosen


def _find() -> bool:
    folder = Path(tf.__file__).parent / "python"
    libraries = ("lib_pywrap_tensorflow_common.so", "_pywrap_tensorflow_internal.so")  # that of TensorFlow 2.18, too
    return any(_core.find_tensorflow_eager(str(folder / name)) for name in libraries)


IS_POSSIBLE: bool = _has_places and _find()


def is_unwatched() -> bool:
    """Whether this thread is to compute here and now, and nothing but a gradient would see an op that it runs.

    False in a graph that is being made, in a scope of another device, of Keras' distribution, of variables' values
    (StatelessScope) or of shapes, while ops are called back for (tf.debugging), profiled, or logged.
    """
    now = _eager._context
    thread, scopes = now._thread_local_data, _scopes.__dict__
    return (
        thread.is_eager
        and thread.device_name in HERE
        and not thread.op_callbacks
        and not now._log_device_placement
        and _profiler._profiler is None
        and scopes.get("stateless_scope") is None
        and scopes.get("symbolic_scope") is None
        and scopes.get(_DISTRIBUTION) is None
    )


def product_of(layer: Packed) -> _core.DirectProduct | None:
    """What multiplies by the layer as it is now. None where the layer is one to be called through Keras.

    It is no longer right when an attribute of the layer is set.
    """
    bias = layer.bias
    variables = [variable._value for variable in (layer.weight, bias) if variable is not None]
    if (
        not IS_POSSIBLE
        or layer.activity_regularizer is not None
        or layer._remat_mode
        or (bias is not None and layer.compute_dtype != layer.variable_dtype)  # it is cast at every call
        or not all(type(variable) is ResourceVariable for variable in variables)  # others lie in several places
    ):
        return None
    number = tf.as_dtype(layer.compute_dtype).as_datatype_enum
    watched = bias._value if bias is not None and bias._value.trainable else None
    try:
        return _core.DirectProduct(
            _eager.context()._handle,
            layer.weight._value.handle,
            None if bias is None else bias._value.handle,
            0 if bias is None else bias._value.dtype.as_datatype_enum,
            watched,
            number,
            layer.input_axes,
            layer.output_axes,
            layer.input_spec.ndim or 0,
            tf.config.threading.get_intra_op_parallelism_threads(),
        )
    except (ValueError, RuntimeError):
        return None


def is_outside_autocast() -> bool:
    """Whether no layer around casts the variables that this thread reads; False where that is not known."""
    return _has_places and _scopes.__dict__.get("autocast_scope") is None
