"""An open checkpoint, whatever it is on disk: a `Source`, and the memory-mapped files under it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fourfold.config import ModelConfig
from fourfold.errors import CheckpointError

if TYPE_CHECKING:
    from fourfold.models.rows import SourceTensor

MAX_JSON_BYTES = 256 << 20


@dataclass(frozen=True)
class Source:
    """One open checkpoint; a context manager that lets go of its files at the end.

    Tensors go by their Hugging Face names and have Hugging Face's row order; one that has no such name keeps the
    file's, for `check_complete` to refuse. Nothing is loaded until rows are asked for.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, SourceTensor]
    tokenizer_files: Mapping[str, bytes | Path]  # by the name each should have beside the converted model
    fingerprint: (
        str  # hexadecimal; changes when a file's name, size or time changes, or what we make of its configuration
    )
    _files: Sequence[MappedFile] = field(repr=False)

    def close(self) -> None:
        """Tensors cannot be read from here on; arrays that were read stay valid."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class MappedFile:
    """A file's bytes, mapped read-only. Raises CheckpointError where the file cannot be opened or is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes: NDArray[np.uint8] | None = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is empty") from error
        self.size = self._bytes.size

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """A view of bytes [start, stop), which must lie in the file. Raises ValueError after `close`."""
        if self._bytes is None:
            raise ValueError(f"{self.path} has been closed")
        return self._bytes[start:stop]

    def close(self) -> None:
        self._bytes = None


@dataclass(frozen=True)
class MappedTensor:
    """A tensor that lies in a file as it is, first axis outermost; rows are views of the mapping where aligned."""

    file: MappedFile
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> NDArray[np.generic]:
        assert 0 <= start <= stop <= self.shape[0]
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        packed = self.file.read(self.offset + start * row_bytes, self.offset + stop * row_bytes)
        return np.require(packed.view(self.dtype).reshape(stop - start, *self.shape[1:]), requirements="A")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError where there is none."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than any JSON file that belongs to a model")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def optional_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file. Raises CheckpointError for anything else."""
    return read_json(path) if path.is_file() else {}


def one_line(error: Exception) -> str:
    """What a library says, fit for the end of a sentence: it may quote the file."""
    return "".join(c if c.isprintable() else " " for c in str(error))


def fingerprint(config: ModelConfig, files: Iterable[Path]) -> str:
    """A stable name for the contents of these files, from what the file system says of them."""
    stats = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return hashlib.sha256(json.dumps([stats, config.to_dict()], sort_keys=True).encode()).hexdigest()
