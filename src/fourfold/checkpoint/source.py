"""An open checkpoint, whatever it is on disk: a `Source`, and the memory-mapped files under it."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
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
    notes: tuple[str, ...] = ()  # sentences: what of it is left out, or not said, that its user may miss

    def close(self) -> None:
        """Tensors cannot be read from here on; arrays that were read stay valid."""
        for file in self._files:
            file.close()

    def forgetter(self) -> Callable[[], None]:
        """A function that gives back the memory of all that was read since the last call of this one.

        A mapped file's pages count as the process's own from when they are touched until then. Rows that are used again
        afterwards are read again.
        """
        reads = [(file, file.take_reads()) for file in self._files]

        def forget() -> None:
            for file, ranges in reads:
                file.forget(ranges)

        return forget

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class MappedFile:
    """A file's bytes, mapped read-only. Raises CheckpointError where the file cannot be opened or is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is empty") from error
        self.size = len(self._map)
        self._reads: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """A view of bytes [start, stop), fewer where the file ends before. Raises ValueError after `close`."""
        if self._map is None:
            raise ValueError(f"{self.path} has been closed")
        start, stop = min(start, self.size), min(stop, self.size)
        self._reads.append((start, stop))
        self._advise(mmap.MADV_WILLNEED, start, stop)  # a disk is asked for all of it at once, not for a page at a time
        return np.frombuffer(self._map, np.uint8, stop - start, start)

    def take_reads(self) -> list[tuple[int, int]]:
        """The ranges that were read since the last call."""
        reads, self._reads = self._reads, []
        return reads

    def forget(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Gives the memory of these ranges back; a page that is used again is mapped again."""
        for start, stop in ranges:
            self._advise(mmap.MADV_DONTNEED, start, stop)

    def close(self) -> None:
        self._map = None  # views keep the mapping

    def _advise(self, advice: int, start: int, stop: int) -> None:
        begin = start // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and stop > begin:
            with suppress(OSError):  # it is refused where, say, the process has its pages locked in memory
                self._map.madvise(advice, begin, stop - begin)


@dataclass(frozen=True)
class MappedTensor:
    """A tensor that lies in a file as it is, first axis outermost; rows are views of the mapping where aligned."""

    file: MappedFile
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
