"""Files of `torch.save`, read without torch: a zip of stored members, one of them a pickle, the others raw storages.

The pickle is read as data (`pickle_data`), never executed. A tensor in it is a view: a storage, an offset, sizes and
strides, each checked against the file before anything is read through it. Rows are read straight from the file, and
names that share a storage share its bytes.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections import deque
from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from fourfold.checkpoint.fields import MAX_ELEMENTS, check_names
from fourfold.checkpoint.pickle_data import Call, Name, Persistent, read_pickle
from fourfold.checkpoint.source import FileTensor, SourceFile, one_line
from fourfold.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from fourfold.models.rows import SourceTensor

DTYPES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_OTHER_STORAGES = (f"torch.{kind}Storage" for kind in ("Double", "Long", "Int", "Short", "Char", "Byte", "Bool"))
WEIGHTS = frozenset({_TENSOR, _PARAMETER, "collections.OrderedDict", *DTYPES, *_OTHER_STORAGES})

MAX_LISTING = 16 << 20  # bytes of a zip's table of contents
MAX_ENTRIES, MAX_DEPTH, MAX_NAME = 100_000, 8, 1000  # of dictionaries of tensors, and characters of a tensor's name
MAX_AXES = 8


class TorchFile:
    """One file of `torch.save`. `content` is what was saved, as `pickle_data` shows it; `tensors` makes its tensors."""

    def __init__(self, file: SourceFile, names: Container[str] | None = WEIGHTS) -> None:
        """`names`: all that the file may name; None where it holds more than weights (which stays a record).

        Raises CheckpointError where the file is damaged, is no such file, or names something else; UnsupportedError
        for the form that torch wrote before its version 1.6.
        """
        self.file = file
        self._storages = {}
        members = _members(file)
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{file.path} is a zip file, but not one of torch.save: it has no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        order = members.get(f"{root}byteorder")
        if order and file.read(*order).tobytes() != b"little":
            raise UnsupportedError(f"{file.path} was written on a big-endian machine, whose byte order is not read")
        self._storages = {
            name.removeprefix(f"{root}data/"): place
            for name, place in members.items()
            if name.startswith(f"{root}data/")
        }
        start, stop = members[pickles[0]]
        self.content = read_pickle(file.read(start, stop).tobytes(), str(file.path), names)

    def tensors(self, tree: object) -> dict[str, SourceTensor]:
        """Every tensor of a dictionary, or of dictionaries in it, by its keys joined with dots.

        Raises CheckpointError for anything else in there and for a tensor that does not fit its storage, and
        UnsupportedError for one that is not float32, float16 or bfloat16.
        """
        found: dict[str, SourceTensor] = {}
        waiting, seen = deque([("", 0, tree)]), 0
        while waiting:
            prefix, depth, branch = waiting.popleft()
            if not isinstance(branch, dict) or depth > MAX_DEPTH:
                where = f" under {_short(prefix)}" if prefix else ""
                raise CheckpointError(f"{self.file.path} holds no dictionary of tensors{where}")
            if (seen := seen + len(branch)) > MAX_ENTRIES:
                raise CheckpointError(f"{self.file.path} holds more than {MAX_ENTRIES} tensors")
            check_names((key for key in branch if isinstance(key, str)), str(self.file.path))
            for key, value in branch.items():
                fits = isinstance(key, str) and len(prefix) + len(key) <= MAX_NAME
                if not fits or (name := f"{prefix}{key}") in found:
                    raise CheckpointError(f"{self.file.path} is damaged: a tensor has no name, or that of another")
                if isinstance(value, dict):
                    waiting.append((f"{name}.", depth + 1, value))
                else:
                    found[name] = self._tensor(name, value)
        return found

    def _tensor(self, name: str, value: object) -> SourceTensor:
        if _is_call(value, _PARAMETER) and isinstance(value.arguments, tuple) and value.arguments:
            value = value.arguments[0]
        if not _is_call(value, _TENSOR):
            kind = repr(value) if isinstance(value, Call) else f"of Python's type {type(value).__name__}"
            raise CheckpointError(f"{self.file.path}: {_short(name)} is no tensor but {_short(kind)}")
        match value.arguments:
            case (Persistent(id=("storage", Name() as storage, str(key), str(), int(n))), int(offset), tuple(shape), \
                  tuple(strides), _, _, *metadata):  # fmt: skip
                pass
            case _:
                raise self._unfit(name)
        if any(metadata):
            raise UnsupportedError(f"{self.file.path}: tensor {_short(name)} is a negated or conjugated view")
        dtype = DTYPES.get(str(storage))
        if dtype is None:
            raise UnsupportedError(
                f"{self.file.path}: tensor {_short(name)} is in {_short(str(storage))}; fourfold reads only"
                f" {', '.join(known.removeprefix('torch.') for known in DTYPES)}"
            )
        sizes = (n, offset, *shape, *strides)
        if not all(type(size) is int and 0 <= size < MAX_ELEMENTS for size in sizes):
            raise self._unfit(name)
        if len(shape) != len(strides) or len(shape) > MAX_AXES or math.prod(shape) >= MAX_ELEMENTS:
            raise self._unfit(name)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        start, stop = self._storages.get(key, (0, 0))
        if stop - start != n * dtype.itemsize or (math.prod(shape) and last >= n):
            raise self._unfit(name)
        if not math.prod(shape) or _is_contiguous(shape, strides):
            return FileTensor(self.file, start + offset * dtype.itemsize, dtype, shape)
        return StridedTensor(self.file, start + offset * dtype.itemsize, dtype, shape, strides)

    def _unfit(self, name: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path} is damaged: tensor {_short(name)} does not fit its storage")


@dataclass(frozen=True)
class StridedTensor:
    """A tensor that lies in a file with gaps or out of order. `strides` in elements."""

    file: SourceFile
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def rows(self, start: int, stop: int) -> NDArray[np.generic]:
        assert 0 <= start <= stop <= self.shape[0]
        if start == stop:
            return np.empty((0, *self.shape[1:]), self.dtype)
        return self._gathered(start * self.strides[0], (stop - start, *self.shape[1:]), self.strides)

    def _gathered(self, first: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> NDArray[np.generic]:
        """Elements from the `first` on: all between them too where most are wanted, else by the outermost axis."""
        size = self.dtype.itemsize
        spans = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
        span, begin = 1 + sum(spans), self.offset + first * size
        if span <= 2 * math.prod(shape):
            elements = self.file.read(begin, begin + span * size).view(self.dtype)
            return as_strided(elements, shape, [stride * size for stride in strides], writeable=False)
        axis = spans.index(max(spans))
        rest, within = _without(shape, axis), _without(strides, axis)
        n_run = 1 + sum(spans) - spans[axis]
        if n_run <= 2 * math.prod(rest):
            runs = self.file.read_runs(begin, strides[axis] * size, shape[axis], n_run * size).view(self.dtype)
            inner = [stride * size for stride in within]
            found = as_strided(runs, (shape[axis], *rest), [runs.strides[0], *inner], writeable=False)
            return np.moveaxis(found, 0, axis)
        parts = [self._gathered(first + i * strides[axis], rest, within) for i in range(shape[axis])]
        return np.stack(parts, axis)


def weights(file: SourceFile) -> dict[str, SourceTensor]:
    """The tensors of a file that holds nothing else: a shard of a Hugging Face model. Raises as `TorchFile` does."""
    opened = TorchFile(file)
    return opened.tensors(opened.content)


class _Listing(io.FileIO):
    """A file whose reader believes no size that it finds in there."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_LISTING:
            raise zipfile.BadZipFile(f"its table of contents would have {size} bytes")
        return super().read(-1 if size is None else size)


def _members(file: SourceFile) -> dict[str, tuple[int, int]]:
    """Where the bytes of each member of a zip file lie: from, to. All are stored as they are, and inside the file."""
    magic = file.read(0, 4).tobytes()
    if magic[:1] == b"\x80":
        raise UnsupportedError(
            f"{file.path} is a bare pickle, as torch wrote before version 1.6; where you trust it, write it anew with"
            " torch.save(torch.load(FILE, map_location='cpu', weights_only=True), FILE)"
        )
    if magic != b"PK\x03\x04":
        raise CheckpointError(f"{file.path} is not a file of torch.save")
    try:
        with _Listing(file.path) as listing, zipfile.ZipFile(listing) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, OverflowError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"{file.path} is not a whole zip file ({one_line(error)}); copy it again") from error
    places = {info.filename: _place(file, info) for info in infos}
    if len(places) != len(infos):
        raise CheckpointError(f"{file.path} is damaged: two of its members have the same name")
    return places


def _place(file: SourceFile, info: zipfile.ZipInfo) -> tuple[int, int]:
    at, name = info.header_offset, _short(info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
        raise UnsupportedError(f"{file.path}: {name} is compressed or encrypted, which torch.save never does")
    header = file.read(at, at + 30).tobytes() if 0 <= at < file.size else b""
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{file.path} is damaged: {name} is not where its table of contents says")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    start = at + 30 + name_bytes + extra_bytes
    if start + info.file_size > file.size:
        raise CheckpointError(f"{file.path} is damaged: {name} would reach beyond its end")
    return start, start + info.file_size


def _without(values: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return values[:axis] + values[axis + 1 :]


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _is_call(value: object, name: str) -> TypeGuard[Call]:
    return isinstance(value, Call) and isinstance(value.function, Name) and str(value.function) == name


def _short(text: str) -> str:
    """Fit for a message, whatever the file says."""
    return "".join(c if c.isprintable() else "?" for c in (text if len(text) <= 120 else f"{text[:117]}..."))
