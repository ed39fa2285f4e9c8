"""A quantized matrix as one array of bytes, which the kernel reads, and as several, which are kept in files."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fourfold.config import WeightFormat
from fourfold.errors import UserError
from fourfold.format import SCALED, n_panels, panel_bytes
from fourfold.matrix import QuantizedMatrix, check_format, huge_empty

Bytes = NDArray[np.uint8]
NAME_BYTES = 4  # the longest name of a format, as ASCII
ALIGNMENT = 64  # of TensorFlow's tensors


def join(matrix: QuantizedMatrix) -> Bytes:
    """(bytes,): panels, panel scales, the format's name (csrc/tensorflow_op.h)."""
    parts = {"weight": matrix.panels, "weight_format": name_bytes(matrix.format)}
    if matrix.scales is not None:
        parts["weight_scale"] = matrix.scales[:, None].view(np.uint8)
    return join_parts(parts)


def join_parts(parts: Mapping[str, Bytes]) -> Bytes:
    """The same from what `split` gives."""
    ordered = [parts[name] for name in ("weight", "weight_scale", "weight_format") if name in parts]
    size = sum(part.size for part in ordered)
    spacious = huge_empty((1, size + ALIGNMENT))[0]
    begin = -spacious.ctypes.data % ALIGNMENT
    joined: Bytes = spacious[begin : begin + size]
    at = 0
    for part in ordered:
        joined[at : at + part.size] = part.reshape(-1)
        at += part.size
    return joined


def shapes(format: WeightFormat, n: int, k: int) -> dict[str, tuple[int, ...]]:
    """What the parts of a matrix (n, k) measure, all of them uint8."""
    scale = {"weight_scale": (n_panels(n), 4)} if format in SCALED else {}
    return {"weight": (n_panels(n), panel_bytes(format, k)), **scale, "weight_format": (NAME_BYTES,)}


def split(joined: Bytes, n: int, k: int) -> dict[str, Bytes]:
    """The parts, as views. Raises UserError where these bytes are not those of a matrix (n, k)."""
    wanted = shapes(format_named(joined[-NAME_BYTES:]), n, k)
    sizes = [int(np.prod(shape)) for shape in wanted.values()]
    if joined.ndim != 1 or sum(sizes) != joined.size:
        raise UserError(f"{joined.size} bytes are not those of {n} outputs and {k} inputs")
    parts = np.split(joined, np.cumsum(sizes)[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(wanted.items(), parts, strict=True)}


def check_parts(parts: Mapping[str, Bytes], format: WeightFormat, n: int, k: int) -> None:
    """Raises UserError where these are not the parts of a matrix (n, k) of this format."""
    if "weight_format" in parts and (found := format_named(parts["weight_format"])) != format:
        raise UserError(f"the layer is {format}, and its weights are {found}")
    wanted = shapes(format, n, k)
    if set(parts) != set(wanted):
        raise UserError(f"a layer in {format} is stored as {', '.join(wanted)}, not as {', '.join(parts) or 'nothing'}")
    for name, shape in wanted.items():
        part = parts[name]
        if part.dtype != np.uint8 or part.shape != shape:
            raise UserError(f"{name} must be uint8 {shape}; what is stored is {part.dtype} {part.shape}")


def name_bytes(format: WeightFormat) -> Bytes:
    return np.frombuffer(format.encode().ljust(NAME_BYTES, b"\0"), np.uint8)


def format_named(name: Bytes) -> WeightFormat:
    """Raises UserError for bytes that name no format."""
    return check_format(name.tobytes().rstrip(b"\0").decode("ascii", "replace"))
