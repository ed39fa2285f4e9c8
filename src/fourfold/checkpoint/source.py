"""An open checkpoint, whatever it is on disk: a `Source`, and the files under it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import fourfold._core as _core
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
    _files: Sequence[SourceFile] = field(repr=False)
    notes: tuple[str, ...] = ()  # sentences: what of it is left out, or not said, that its user may miss

    def close(self) -> None:
        """Tensors cannot be read from here on; arrays that were read stay valid."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class SourceFile:
    """A file's bytes, read as they are asked for. Raises CheckpointError where it cannot be opened or is empty.

    It is never mapped: a file that shrinks under a mapping ends the process. It is open only while it is read, since a
    checkpoint may have more files than a process may have open; another one in its place is noticed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                facts = os.fstat(file.fileno())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        if facts.st_size == 0:
            raise CheckpointError(f"{path} is empty")
        self.size = facts.st_size
        self._stamp = facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns
        self._is_closed = False

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop), fewer where the file ends before. Raises as `read_runs` does."""
        start, stop = min(start, self.size), min(stop, self.size)
        return self.read_runs(start, 0, 1, stop - start).reshape(-1)

    def read_runs(self, start: int, stride: int, n_runs: int, n_bytes: int) -> NDArray[np.uint8]:
        """Runs of `n_bytes` whose begins lie `stride` bytes apart, (n_runs, n_bytes), all inside the file.

        Raises ValueError after `close`, and CheckpointError where the file is another by now, or cannot be read.
        """
        if self._is_closed:
            raise ValueError(f"{self.path} has been closed")
        runs: NDArray[np.uint8] = np.empty((n_runs, n_bytes), np.uint8)
        try:
            file = _core.ReadFile(str(self.path))
            if file.stamp != self._stamp:
                raise CheckpointError(f"{self.path} has changed since it was opened; begin again")
            file.read_runs(start, stride, runs)
        except _core.StallError as error:
            raise CheckpointError(str(error)) from None
        return runs

    def close(self) -> None:
        self._is_closed = True


@dataclass(frozen=True)
class FileTensor:
    """A tensor that lies in a file as it is, first axis outermost."""

    file: SourceFile
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def octets(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of it, whatever they mean."""
        assert 0 <= start <= stop <= self.n_bytes
        return self.file.read(self.offset + start, self.offset + stop)

    def rows(self, start: int, stop: int) -> NDArray[np.generic]:
        assert 0 <= start <= stop <= self.shape[0]
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        packed = self.file.read(self.offset + start * row_bytes, self.offset + stop * row_bytes)
        return packed.view(self.dtype).reshape(stop - start, *self.shape[1:])

    def columns(self, start: int, stop: int) -> NDArray[np.generic]:
        """Columns [start, stop) of a matrix; nothing else of it is read."""
        n, width = self.shape
        assert 0 <= start <= stop <= width
        size = self.dtype.itemsize
        runs = self.file.read_runs(self.offset + start * size, width * size, n, (stop - start) * size)
        return runs.view(self.dtype)


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
