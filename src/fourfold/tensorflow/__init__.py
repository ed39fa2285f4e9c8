"""fourfold's kernels inside TensorFlow: quantized layers for any Keras 3 model.

    from fourfold.tensorflow import quantize
    quantize(model)               # every Dense and EinsumDense, in place, one at a time

`Dense` and `EinsumDense` hold a weight in the tile format and multiply by it as it lies. They work eagerly and inside
`tf.function`, pass gradients to their input (so that adapters on top train), and are saved and loaded with their
models. Weights are fixed: they have no gradient. XLA has no kernel of ours, so `jit_compile=True` is not for them.
"""

from __future__ import annotations

try:
    import keras as _keras
    import tensorflow as _tensorflow  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("tensorflow", "keras"):
        raise
    from fourfold.errors import MissingExtra

    raise MissingExtra(
        "fourfold.tensorflow needs TensorFlow and Keras; install them with `pip install 'fourfold[tensorflow]'`"
    ) from None

if _keras.config.backend() != "tensorflow":
    from fourfold.errors import UserError

    raise UserError(
        f"fourfold.tensorflow needs Keras on TensorFlow, and it runs on {_keras.config.backend()}; "
        "set KERAS_BACKEND=tensorflow before Keras is imported"
    )

from fourfold.tensorflow.layers import Dense, EinsumDense
from fourfold.tensorflow.swap import quantize

__all__ = ["Dense", "EinsumDense", "quantize"]
