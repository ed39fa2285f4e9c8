"""compressed-tensors' int4 weights in its `pack-quantized` form: weight = scale · (code - zero point).

A matrix (N, K) in groups of G inputs is `weight_packed` int32 (N, K/8), 8 inputs a word, the first lowest;
`weight_scale` float (N, K/G); `weight_shape`, N and K; and, where it is not symmetric, `weight_zero_point` int32
(N/8, K/G), 8 outputs a word. Codes and zero points are stored with 8 added; where there is none, it is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fourfold.checkpoint.coded import CodedTensor, Parts
from fourfold.checkpoint.fields import Fields
from fourfold.checkpoint.integers import SCALE_TYPES, IntegerTensor, input_order, nibbles, zero_points
from fourfold.errors import CheckpointError

_FORM = "pack-quantized"
_HARMLESS_OF_WEIGHTS = """
    group_size block_structure observer observer_kwargs scale_dtype zp_dtype"""
_IN_ORDER = (False, "weight", "static")  # values of actorder
_REORDERED = (True, "group", "dynamic")


@dataclass(frozen=True)
class _Group:
    """What a group of the config says of tensors that may be absent."""

    is_symmetric: bool
    reorders: bool


def read(f: Fields, parts: Parts) -> dict[str, CodedTensor]:
    """The coded matrices, by name. Raises UnsupportedError, naming the option, for what is not int4 weights alone."""
    f.only("format", _FORM)
    f.only("quantization_status", "compressed")
    f.only("sparsity_config", {})
    f.only("transform_config", {})
    for key in ("kv_cache_scheme", "moe_sparsity_config"):
        f.refuse({key}, "fourfold reads quantized weights of compressed-tensors, and nothing else that it quantizes")
    groups = f.fields("config_groups")
    said = [_read_group(groups.fields(name)) for name in groups]
    f.finish(("ignore", "global_compression_ratio", "version"))
    strictest = _Group(all(group.is_symmetric for group in said), any(group.reorders for group in said))
    return {f"{module}.weight": _matrix(module, strictest, parts) for module in parts.modules(".weight_packed")}


def _read_group(group: Fields) -> _Group:
    """Every group is int4 weights; how large its groups are is what the scales' shapes say."""
    group.only("format", _FORM)
    for key in ("input_activations", "output_activations"):
        group.refuse({key}, "fourfold quantizes weights alone, so the model's results would be others")
    weights = group.fields("weights")
    weights.only("num_bits", 4)
    weights.only("type", "int")
    weights.only("strategy", "group", "channel", "tensor")
    weights.only("dynamic", False)
    weights.only("actorder", *_IN_ORDER, *_REORDERED)
    reorders = any(weights.equals("actorder", value) for value in _REORDERED)
    is_symmetric = weights.flag("symmetric", True)
    weights.finish(_HARMLESS_OF_WEIGHTS.split())
    group.finish(("targets",))
    return _Group(is_symmetric, reorders)


def _matrix(module: str, said: _Group, parts: Parts) -> CodedTensor:
    shape = parts.take(f"{module}.weight_shape", ("int64", "int32"), (2,)).rows(0, 2)
    n, k = int(shape[0]), int(shape[1])
    if min(n, k) < 1 or k % 8:
        raise CheckpointError(f"{parts.where}: {module}.weight_shape says ({n}, {k}), which is no packed matrix's")
    words = parts.take(f"{module}.weight_packed", ("int32",), (n, k // 8))
    scales = parts.take(f"{module}.weight_scale", SCALE_TYPES)
    groups = scales.shape[-1] if scales.shape else 0
    if scales.shape not in ((n, groups), (1,)) or groups < 1 or k % groups:
        raise CheckpointError(
            f"{parts.where}: {module}.weight_scale has the shape {scales.shape}, of a matrix ({n}, {k})"
        )
    zero_words = None
    if not said.is_symmetric or f"{module}.weight_zero_point" in parts:
        zero_words = parts.take(f"{module}.weight_zero_point", ("int32",), (-(-n // 8), groups))
    order = input_order(f"{module}.weight_g_idx", k, k // groups, "actorder", said.reorders, "null or weight", parts)

    def codes(start: int, stop: int) -> NDArray[np.uint8]:
        return nibbles(words.rows(start, stop))

    def zeros(start: int, stop: int) -> NDArray[np.int8]:
        if zero_words is None:
            return np.full((stop - start, groups), 8, np.int8)
        return zero_points(zero_words.rows(start // 8, -(-stop // 8)).T, start, stop)

    def scale_rows(start: int, stop: int) -> NDArray[np.float32]:
        if len(scales.shape) == 2:
            return scales.rows(start, stop).astype(np.float32)
        return np.full((stop - start, 1), scales.rows(0, 1), np.float32)

    return IntegerTensor("compressed-tensors int4", (n, k), k // groups, codes, zeros, scale_rows, order)
