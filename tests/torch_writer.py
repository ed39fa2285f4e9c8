"""Files of torch.save without torch: a pickle assembled by hand, in a zip file. What torch itself writes is compared.

Being assembled by hand, it can say what no honest program writes.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.int64): "LongStorage",
}


@dataclass(frozen=True)
class Global:
    module: str
    name: str


@dataclass(frozen=True)
class Reduce:
    function: Any
    arguments: Any
    items: Mapping[str, Any] | None = None  # that it is filled with
    state: Any = None  # that it is then given


@dataclass(frozen=True)
class Persistent:
    id: Any


@dataclass(frozen=True)
class Raw:
    """Instructions as they are."""

    code: bytes


def ordered(items: Mapping[str, Any], state: Any = None) -> Reduce:
    return Reduce(Global("collections", "OrderedDict"), (), items, state)


def namespace(**fields: Any) -> Raw:
    """argparse.Namespace, as which Megatron keeps its arguments."""
    return Raw(b"cargparse\nNamespace\n)\x81" + _pickled(fields) + b"b")


@dataclass
class Storages:
    """The raw members of a file, and the tensors that look at them."""

    members: list[NDArray[Any]] = field(default_factory=list)

    def tensor(self, array: NDArray[Any]) -> Reduce:
        """A contiguous tensor with a storage of its own."""
        return self.view(self.add(array), 0, array.shape, [s // array.itemsize for s in _contiguous(array).strides])

    def add(self, array: NDArray[Any]) -> int:
        self.members.append(_contiguous(array))
        return len(self.members) - 1

    def view(
        self,
        storage: int,
        offset: Any,
        shape: Sequence[Any],
        strides: Sequence[Any],
        numel: Any = None,
        metadata: Any = (),
    ) -> Reduce:
        member = self.members[storage]
        kind = Global("torch", STORAGES[member.dtype])
        place = Persistent(("storage", kind, str(storage), "cpu", member.size if numel is None else numel))
        arguments = (place, offset, tuple(shape), tuple(strides), False, ordered({}), *metadata)
        return Reduce(Global("torch._utils", "_rebuild_tensor_v2"), arguments)

    def parameter(self, tensor: Reduce) -> Reduce:
        return Reduce(Global("torch._utils", "_rebuild_parameter"), (tensor, True, ordered({})))

    def write(
        self, path: Path, content: Any, *, root: str = "archive", pickle: bytes | None = None, **other: bytes
    ) -> Path:
        """The file; `pickle` stands in for that of `content`, `other` members are added."""
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{root}/data.pkl", pickled(content) if pickle is None else pickle)
            for name, data in {"byteorder": b"little", "version": b"3\n", **other}.items():
                archive.writestr(f"{root}/{name}", data)
            for i, member in enumerate(self.members):
                info = zipfile.ZipInfo(f"{root}/data/{i}")
                at = archive.fp.tell() + 30 + len(info.filename)  # type: ignore[union-attr]
                padding = -(at + 4) % 64  # to a multiple of 64, in an extra field, as torch does
                info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
                archive.writestr(info, member.tobytes())
        return path


def write(path: Path, tensors: Mapping[str, NDArray[Any]], shared: Mapping[str, str] | None = None) -> Path:
    """A state dict, of which the names in `shared` have another's storage."""
    storages = Storages()
    content = {name: storages.tensor(tensor) for name, tensor in tensors.items()}
    content |= {name: content[of] for name, of in (shared or {}).items()}
    return storages.write(path, ordered(content, {"_metadata": ordered({"": {"version": 1}})}))


def pickled(value: Any) -> bytes:
    """Protocol 2, without a memo."""
    return b"\x80\x02" + _pickled(value) + b"."


def _pickled(value: Any) -> bytes:
    match value:
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case bytes():  # as Python 3 writes them in this protocol
            return _pickled(Reduce(Global("_codecs", "encode"), (value.decode("latin-1"), "latin1")))
        case tuple():
            return b"(" + b"".join(map(_pickled, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_pickled, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_pickled(k) + _pickled(v) for k, v in value.items()) + b"u"
        case Raw(code):
            return code
        case Global(module, name):
            return f"c{module}\n{name}\n".encode()
        case Persistent(id):
            return _pickled(id) + b"Q"
        case Reduce(function, arguments, items, state):
            code = _pickled(function) + _pickled(arguments) + b"R"
            if items:
                code += b"(" + b"".join(_pickled(k) + _pickled(v) for k, v in items.items()) + b"u"
            return code + (_pickled(state) + b"b" if state is not None else b"")
    raise TypeError(value)


def _contiguous(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array)
