"""The header of a GGUF file, read with suspicion: every count, length and offset is checked before it is used.

The `gguf` package's own reader trusts the file, so that a damaged one ends in whatever numpy makes of it, or in a vast
allocation; from that package we take the facts: value types, quantization types and their block sizes.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from fourfold.checkpoint.fields import MAX_ELEMENTS, check_names
from fourfold.checkpoint.source import SourceFile
from fourfold.errors import CheckpointError, UnsupportedError

VERSIONS = (2, 3)
MAX_KEYS, MAX_TENSORS, MAX_ITEMS, MAX_DIMS = 1 << 16, 1 << 20, 1 << 24, 4
MAX_HEADER_BYTES = 1 << 30
PIECE_BYTES = 1 << 20  # of a header, read at a time

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `n_bytes` bytes at `offset`, both from the start of the file and inside it."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # rows first, as in numpy: the reverse of the file's order
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """Metadata values are str, bool, int, float or a list of those."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(file: SourceFile) -> Header:
    """Everything before the data. Raises CheckpointError for a damaged file, UnsupportedError for an unknown kind."""
    at = _Cursor(file)
    if at.take(4) != b"GGUF":
        raise CheckpointError(f"{file.path} is not a GGUF file")
    version = at.scalar("I")
    if version & 0xFFFF == 0:
        raise UnsupportedError(f"{file.path} is a big-endian GGUF file; fourfold reads little-endian ones")
    if version not in VERSIONS:
        raise UnsupportedError(f"{file.path} is GGUF version {version}; fourfold reads versions 2 and 3")
    n_tensors = at.count(MAX_TENSORS, "tensors")
    metadata: dict[str, Any] = {}
    for _ in range(at.count(MAX_KEYS, "keys")):
        key = at.string()
        if key in metadata:
            raise CheckpointError(f"{file.path} gives the key {key} twice")
        check_names([key], str(file.path))
        metadata[key] = at.value(key)
    entries = [_entry(at) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{file.path} sets general.alignment to {alignment!r}; it must be a power of two")
    start = -(-at.offset // alignment) * alignment
    return Header(metadata, _place(file, entries, start, alignment))


def _entry(at: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    """A tensor's name, quantization type, shape, and offset from the start of the data."""
    name = at.string()
    check_names([name], str(at.file.path))
    dims = [at.scalar("Q") for _ in range(at.count(MAX_DIMS, f"dimensions of {name}", "I"))]
    if not dims or min(dims) < 1 or math.prod(dims) >= MAX_ELEMENTS:
        raise CheckpointError(
            f"{at.file.path}: tensor {name} has dimensions {dims}; fourfold reads from 1 to just under 10^12 elements"
        )
    number = at.scalar("I")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise UnsupportedError(f"{at.file.path}: tensor {name} has the unknown quantization type {number}") from None
    return name, kind, tuple(reversed(dims)), at.scalar("Q")


def _place(
    file: SourceFile, entries: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int]], start: int, alignment: int
) -> dict[str, TensorInfo]:
    """The tensors by name, each inside the file and apart from the others."""
    tensors: dict[str, TensorInfo] = {}
    for name, kind, shape, offset in entries:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise CheckpointError(
                f"{file.path}: rows of tensor {name}, {shape}, are not whole {kind.name} blocks of {block}"
            )
        if name in tensors:
            raise CheckpointError(f"{file.path} holds the tensor {name} twice")
        if offset % alignment:
            raise CheckpointError(f"{file.path}: tensor {name} does not start at a multiple of {alignment} bytes")
        info = TensorInfo(kind, shape, start + offset, math.prod(shape) // block * block_bytes)
        if info.offset + info.n_bytes > file.size:
            raise CheckpointError(f"{file.path} is truncated: tensor {name} reaches past its end")
        tensors[name] = info
    end, previous = start, ""
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        if info.offset < end:
            raise CheckpointError(f"{file.path}: the tensors {previous} and {name} overlap")
        end, previous = info.offset + info.n_bytes, name
    return tensors


class _Cursor:
    """Reads from front to back, never past the end, nor more than any sound header has."""

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        self.offset = 0
        self._end = min(file.size, MAX_HEADER_BYTES)
        self._piece, self._begin = b"", 0  # what was read last, and where it lies

    def take(self, n: int) -> bytes:
        if n > self._end - self.offset:
            raise CheckpointError(f"{self.file.path} is truncated or damaged: its header reaches past byte {self._end}")
        if self.offset + n > self._begin + len(self._piece):
            self._begin = self.offset
            self._piece = self.file.read(self.offset, min(self._end, self.offset + max(n, PIECE_BYTES))).tobytes()
        at = self.offset - self._begin
        self.offset += n
        return self._piece[at : at + n]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def count(self, limit: int, what: str, code: str = "Q") -> int:
        n: int = self.scalar(code)
        if n > limit:
            raise CheckpointError(f"{self.file.path} is damaged: it claims {n} {what}")
        return n

    def string(self) -> str:
        start = self.offset
        try:
            return self.take(self.scalar("Q")).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.file.path} is damaged: the text at byte {start} is not UTF-8") from None

    def value(self, key: str) -> Any:
        """The value of a key: its type, then itself."""
        kind = self._kind(key)
        if kind != GGUFValueType.ARRAY:
            return self._one(kind)
        kind = self._kind(key)
        n = self.count(MAX_ITEMS, f"items in {key}")
        if kind == GGUFValueType.ARRAY:
            raise UnsupportedError(f"{self.file.path} has an array of arrays in {key}, which fourfold does not read")
        if kind == GGUFValueType.STRING:
            return [self.string() for _ in range(n)]
        code = f"<{n}{_SCALARS[kind]}"
        return list(struct.unpack(code, self.take(struct.calcsize(code))))

    def _one(self, kind: GGUFValueType) -> Any:
        return self.string() if kind == GGUFValueType.STRING else self.scalar(_SCALARS[kind])

    def _kind(self, key: str) -> GGUFValueType:
        number = self.scalar("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise CheckpointError(f"{self.file.path} is damaged: {key} has the unknown type {number}") from None
