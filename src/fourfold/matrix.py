"""Quantized matrices for those who have arrays and no model: quantize one, multiply by it.

Arrays are numpy's, or any CPU array that speaks DLPack (PyTorch, JAX, TensorFlow, ...), which is read where it lies.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold.config import FORMATS, WeightFormat
from fourfold.errors import UserError
from fourfold.format import SCALED, n_panels, panel_bytes
from fourfold.machine import checked_threads, choose_isa, read_machine

BF16 = np.dtype(ml_dtypes.bfloat16)
# The native core's numbering of what it takes and gives (csrc/format.h, NumberType).
NUMBER_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, BF16: 2}


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A matrix (N, K) in the tile format (docs/format.md). `quantize` makes one; its arrays may be kept anywhere.

    Raises UserError where the arrays are not those of such a matrix.
    """

    format: WeightFormat
    shape: tuple[int, int]  # (N, K): outputs, inputs
    panels: NDArray[np.uint8]  # (P, bytes of a panel), contiguous
    scales: NDArray[np.float32] | None  # (P,), contiguous; None for bf16 and f32

    def __post_init__(self) -> None:
        check_format(self.format)
        n, k = self.shape
        wanted = (n_panels(n), panel_bytes(self.format, k))
        if n < 1 or k < 1 or self.panels.shape != wanted or not _is_plain(self.panels, np.uint8):
            raise UserError(f"the panels of a {n} × {k} matrix in {self.format} are a contiguous uint8 array {wanted}")
        if (self.format in SCALED) != (self.scales is not None):
            raise UserError(f"{self.format} {'needs' if self.format in SCALED else 'has no'} panel scales")
        if self.scales is not None and (self.scales.shape != wanted[:1] or not _is_plain(self.scales, np.float32)):
            raise UserError(f"the scales of a {n} × {k} matrix are a contiguous float32 array ({wanted[0]},)")

    @property
    def nbytes(self) -> int:
        """Bytes in memory, all included."""
        return self.panels.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def dequantize(self) -> NDArray[np.float32]:
        """The values that are multiplied: float32 (N, K)."""
        own_isa()
        values = np.empty(self.shape, np.float32)
        scales = 0 if self.scales is None else self.scales.ctypes.data
        panels, threads = self.panels.ctypes.data, default_threads()
        n, k = self.shape
        _core.unpack_rows(self.format, n, k, panels, scales, 0, n, values.ctypes.data, threads, False)
        return values

    def __repr__(self) -> str:
        return f"QuantizedMatrix({self.format}, {self.shape}, {self.bits_per_weight:.2f} bits a weight)"


def quantize(array: Any, format: str = "nf4", *, threads: int | None = None) -> QuantizedMatrix:
    """A weight matrix (N, K) of float32, float16, bfloat16 or float64, as `y = x @ w.T` wants it, in a weight format.

    Raises UserError for another shape or type, an impossible number of threads, and where a weight is NaN or infinite;
    UnsupportedError as `own_isa` does.
    """
    chosen, n_threads, rows, isa = check_format(format), _n_threads(threads), as_array(array), own_isa()
    if rows.ndim != 2 or 0 in rows.shape:
        raise UserError(f"a weight matrix has two axes (outputs, inputs), neither empty; this array is {rows.shape}")
    n, k = rows.shape
    panels = huge_empty((n_panels(n), panel_bytes(chosen, k)))
    scales = np.empty(n_panels(n), np.float32) if chosen in SCALED else None
    source = np.ascontiguousarray(rows)
    try:
        words = source.view(np.uint16) if source.dtype == BF16 else source
        _core.pack(words, chosen, panels, scales, threads=n_threads, isa=isa)
    except ValueError as error:
        raise UserError(f"weights must be finite numbers: {error}") from None
    return QuantizedMatrix(chosen, (n, k), panels, scales)


def linear(x: Any, w: QuantizedMatrix, bias: Any = None, *, threads: int | None = None) -> NDArray[Any]:
    """y = x Wᵀ + bias: x (..., K), w (N, K), bias (N,); y (..., N) of x's type.

    x is float32, float16 or bfloat16; float64 is computed, and returned, as float32. Sums are float32, and the result
    is the same bits whatever the number of threads. Raises UserError for other shapes and types, and for an impossible
    number of threads; UnsupportedError as `own_isa` does.
    """
    own_isa()
    n_threads = _n_threads(threads)
    if not isinstance(w, QuantizedMatrix):
        raise UserError(f"linear multiplies by what fourfold.quantize made, not by {type(w).__name__}")
    n, k = w.shape
    inputs = as_array(x)
    if inputs.ndim == 0 or inputs.shape[-1] != k:
        raise UserError(f"the last axis of x must be the matrix's {k} inputs; x is {inputs.shape}")
    rows = inputs.reshape(-1, k)
    if rows.strides[1] != rows.itemsize or rows.strides[0] % rows.itemsize or rows.strides[0] < 0:
        rows = np.ascontiguousarray(rows)
    rows = np.require(rows, requirements="A")
    plus = None if bias is None else np.ascontiguousarray(as_array(bias))
    if plus is not None and plus.shape != (n,):
        raise UserError(f"bias must have one value for each of the {n} outputs; it is {plus.shape}")
    y = np.empty((*inputs.shape[:-1], n), inputs.dtype)
    _core.matmul(
        format=w.format,
        n=n,
        k=k,
        panels=w.panels.ctypes.data,
        scales=0 if w.scales is None else w.scales.ctypes.data,
        x=rows.ctypes.data,
        x_type=NUMBER_TYPES[rows.dtype],
        rows=len(rows),
        x_stride=rows.strides[0] // rows.itemsize,
        bias=0 if plus is None else plus.ctypes.data,
        bias_type=0 if plus is None else NUMBER_TYPES[plus.dtype],
        y=y.ctypes.data,
        y_type=NUMBER_TYPES[y.dtype],
        threads=n_threads,
        openmp=False,
    )
    return y


def as_array(array: Any) -> NDArray[Any]:
    """Anything array-like as float32, float16 or bfloat16, without a copy where it is one of them already.

    Raises UserError for other numbers, and for what is no array of numbers.
    """
    if isinstance(array, np.ndarray):
        found = array
    elif hasattr(array, "__dlpack__"):
        try:
            found = cast(NDArray[Any], _core.view(array))
        except (TypeError, ValueError, RuntimeError, BufferError) as error:
            raise UserError(
                f"{type(array).__name__} cannot be read as a CPU array of floating-point numbers ({error}); detach it, "
                "or move it to the CPU, first"
            ) from None
        if found.dtype == np.uint16 and "uint16" not in str(getattr(array, "dtype", "")):
            found = found.view(BF16)
    else:
        try:
            found = np.asarray(array)
        except ValueError as error:
            raise UserError(f"{type(array).__name__} is no array of numbers: {error}") from None
    if found.dtype == np.float64:
        found = found.astype(np.float32)
    if found.dtype not in NUMBER_TYPES:
        raise _unfit(array, found)
    return found


def _unfit(array: Any, found: NDArray[Any]) -> UserError:
    if not found.dtype.isnative:
        return UserError(
            f"numbers must lie in this machine's byte order, not as {found.dtype}; use"
            " array.astype(array.dtype.newbyteorder('='))"
        )
    kind = getattr(array, "dtype", found.dtype)
    if kind == np.dtype(object):
        return UserError(f"{type(array).__name__} is no array of numbers")
    scales = ", multiplied by the scales that lie beside such weights" if "float8" in str(kind) else ""
    return UserError(f"numbers must be float32, float16, bfloat16 or float64, not {kind}; convert them first{scales}")


def check_format(format: str) -> WeightFormat:
    """The format, known to be one. Raises UserError."""
    if format not in FORMATS:
        raise UserError(f"there is no format {format!r}; choose one of {', '.join(FORMATS)}")
    return cast(WeightFormat, format)


def huge_empty(shape: tuple[int, int]) -> NDArray[np.uint8]:
    """An uninitialized array for weights: in huge pages where the system gives them, which are read faster."""
    size, huge = shape[0] * shape[1], 2 << 20
    if size < 2 * huge:
        return np.empty(shape, np.uint8)
    pages = mmap.mmap(-1, size + huge, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    all_bytes = np.frombuffer(pages, np.uint8)
    begin = -all_bytes.ctypes.data % huge
    return all_bytes[begin : begin + size].reshape(shape)


@cache
def own_isa() -> str:
    """What this process computes with. Raises UnsupportedError where FOURFOLD_ISA names what is not to be had."""
    return choose_isa()


@cache
def default_threads() -> int:
    """One a usable core."""
    return read_machine().n_threads


def _n_threads(threads: int | None) -> int:
    return default_threads() if threads is None else checked_threads(threads)


def _is_plain(array: NDArray[Any], dtype: type) -> bool:
    return array.dtype == dtype and array.flags.c_contiguous
