"""Writes a fourfold directory, weight by weight, under a temporary name: it is whole or it is not there.

DST.partial holds model.safetensors at its final size, and a journal: a line saying what is being converted from what,
then a line per finished weight with the SHA-256 of its tensors. A conversion that was interrupted, however roughly,
goes on from the journal: what it lists is hashed again and kept where it is sound, so nothing needs to have reached the
disk in any order.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourfold.checkpoint.fourfold_dir import (
    CONFIG,
    MANIFEST,
    VERSION,
    WEIGHTS,
    StoredTensor,
    encode_json,
    hash_tensors,
    lay_out,
    seal,
)
from fourfold.config import ModelConfig, WeightFormat
from fourfold.errors import CheckpointError, ResourceError, UserError
from fourfold.models import weight_specs

JOURNAL = "journal.jsonl"
DATA_ALIGNMENT = 4096  # bytes: the data starts on a page
SMALL_FILES_BYTES = 32 << 20  # room for the tokenizer, the manifest and the journal


@dataclass(frozen=True)
class Finished:
    """A weight that is written."""

    sha256: Mapping[str, str]  # of its tensors
    error: float  # sum of (weight - stored value)²
    reference: float  # sum of weight²


class DirectoryWriter:
    """A context manager: `write` tensors, `commit` each weight, then `finish`. Threads may write different weights.

    `formats` gives matrices a format of their own, in place of `fmt`.

    Left without `finish`, DST.partial stays for the next attempt, unless the source was found bad (CheckpointError).
    Raises UserError where DST exists, or DST.partial is another conversion's or in use; ResourceError where the disk is
    full.
    """

    def __init__(
        self,
        dst: Path,
        config: ModelConfig,
        fmt: WeightFormat,
        source: str,
        formats: Mapping[str, WeightFormat] = MappingProxyType({}),
    ) -> None:
        self.dst = dst
        if not dst.name:
            raise UserError(f"{dst} is not a name for a new directory; choose another destination")
        self.partial = dst.with_name(dst.name + ".partial")
        self.specs = weight_specs(config)
        self._formats = {spec.name: formats.get(spec.name, fmt) for spec in self.specs if spec.is_matrix}
        self.tensors = {tensor.name: tensor for tensor in lay_out(self.specs, self._formats)}
        self.data_bytes = sum(tensor.n_bytes for tensor in self.tensors.values())
        self.finished: dict[str, Finished] = {}
        self._identity = {"fourfold": VERSION, "format": fmt, "source": source, "model": config.to_dict()}
        if others := {name: other for name, other in self._formats.items() if other != fmt}:
            self._identity["formats"] = others
        self._header = _encode_header(self.tensors.values())
        self._written: dict[str, tuple[int, hashlib._Hash]] = {}  # bytes and hash so far, of tensors not committed

    @property
    def finished_bytes(self) -> int:
        """Of data, in committed weights."""
        return sum(self.tensors[tensor].n_bytes for done in self.finished.values() for tensor in done.sha256)

    def __enter__(self) -> DirectoryWriter:
        self._check_destination()
        with _disk_errors(self.partial):
            self._check_space()
            self.partial.mkdir(exist_ok=True)
            self._journal = (self.partial / JOURNAL).open("ab+", buffering=0)
            try:
                self._lock_and_resume()
            except BaseException:
                self._journal.close()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._fd)
        if isinstance(error, CheckpointError):
            shutil.rmtree(self.partial)
        self._journal.close()

    def write(self, name: str, data: NDArray[Any]) -> None:
        """Appends bytes to a tensor. A tensor that is begun again after an interruption is written over."""
        with _disk_errors(self.partial):
            n_written, sha256 = self._written.get(name) or (0, hashlib.sha256())
            piece = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
            sha256.update(piece)
            start = len(self._header) + self.tensors[name].offset
            while len(piece):
                n = os.pwrite(self._fd, piece, start + n_written)
                piece, n_written = piece[n:], n_written + n
            self._written[name] = n_written, sha256

    def commit(self, weight: str, error: float = 0.0, reference: float = 0.0) -> None:
        """Journals a weight, all of whose tensors are written; the sums go into the quality report."""
        hashes = {}
        for name in self._tensors_of(weight):
            n_written, sha256 = self._written.pop(name)
            assert n_written == self.tensors[name].n_bytes, f"{name} is not whole"
            hashes[name] = sha256.hexdigest()
        self.finished[weight] = Finished(hashes, error, reference)
        with _disk_errors(self.partial):
            self._append({"weight": weight, "sha256": hashes, "error": error, "reference": reference})

    def finish(
        self, files: Mapping[str, bytes | Path], recipe: Mapping[str, Any], quality: Mapping[str, Any] | None
    ) -> None:
        """Writes the other files, syncs everything, and gives the directory its name.

        `files` are the tokenizer's; `quality` is None for weights that stand for no others.
        """
        identity = self._identity
        shapes = {spec.name: spec.shape for spec in self.specs}
        weights = {name: {"format": fmt, "shape": shapes[name]} for name, fmt in self._formats.items()}
        config = {key: identity[key] for key in ("fourfold", "format", "model")} | {"weights": weights}
        contents = {CONFIG: encode_json(config)}
        for name, content in files.items():
            contents[name] = content if isinstance(content, bytes) else content.read_bytes()
        manifest = {
            "fourfold": VERSION,
            "source": identity["source"],
            "recipe": recipe,
            "quality": quality,
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
            "tensors": {name: h for spec in self.specs for name, h in self.finished[spec.name].sha256.items()},
        }
        with _disk_errors(self.partial):
            for name, content in (contents | {MANIFEST: seal(manifest)}).items():
                with (self.partial / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            os.fsync(self._fd)
            _sync_directory(self.partial)
            self._check_destination()
            self.partial.rename(self.dst)
            _sync_directory(self.dst.parent)
            (self.dst / JOURNAL).unlink()

    def _check_destination(self) -> None:
        if os.path.lexists(self.dst):
            raise UserError(f"{self.dst} exists already; remove it or choose another destination")
        if not self.dst.parent.is_dir():
            raise UserError(f"there is no directory {self.dst.parent} to write {self.dst.name} in")

    def _check_space(self) -> None:
        file = self.partial / WEIGHTS
        held = file.stat().st_blocks * 512 if file.exists() else 0
        needed = len(self._header) + self.data_bytes + SMALL_FILES_BYTES - held
        if (free := shutil.disk_usage(self.dst.parent).free) < needed:
            raise ResourceError(
                f"{self.dst} needs {needed / 1e9:.2f} GB more on its disk, which has {free / 1e9:.2f} GB free; "
                "make room or choose another disk"
            )

    def _lock_and_resume(self) -> None:
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {self.partial}; wait for it to end") from None
        records = self._read_journal()
        self._fd = os.open(self.partial / WEIGHTS, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not records:
                self._append(self._identity)
            os.ftruncate(self._fd, len(self._header) + self.data_bytes)  # sparse until it is written
            os.pwrite(self._fd, self._header, 0)
            self._keep_sound(records[1:])
        except BaseException:
            os.close(self._fd)
            raise

    def _read_journal(self) -> list[dict[str, Any]]:
        """The lines of an earlier attempt, identity first, as far as they reached the disk whole; the rest is cut off.

        A machine that lost its power may leave a line that is cut short, or zeros where lines were.
        """
        self._journal.seek(0)
        text = self._journal.read()
        records: list[dict[str, Any]] = []
        end = 0
        for line in text.splitlines(keepends=True):
            if (record := _record(line)) is None or (records and not self._is_of_a_weight(record)):
                break
            records.append(record)
            end += len(line)
        is_other = records[0] != self._in_json if records else b"\n" in text.strip(b"\0")
        if is_other:
            raise UserError(
                f"{self.partial} is an unfinished conversion of another source or format; remove it, or finish that one"
            )
        self._journal.truncate(end)
        return records

    @property
    def _in_json(self) -> Any:
        return json.loads(encode_json(self._identity))

    def _is_of_a_weight(self, record: Mapping[str, Any]) -> bool:
        numbers = (record.get("error"), record.get("reference"))
        return (
            isinstance(record.get("sha256"), dict)
            and all(isinstance(x, float) for x in numbers)
            and any(spec.name == record.get("weight") for spec in self.specs)
        )

    def _keep_sound(self, records: list[dict[str, Any]]) -> None:
        listed = {record["weight"]: record for record in records}
        tensors = [self.tensors[tensor] for weight in listed for tensor in self._tensors_of(weight)]
        actual = {t.name: sha256 for t, sha256 in hash_tensors(self.partial / WEIGHTS, len(self._header), tensors)}
        for weight, record in listed.items():
            if record["sha256"] == {tensor: actual[tensor] for tensor in self._tensors_of(weight)}:
                self.finished[weight] = Finished(record["sha256"], record["error"], record["reference"])

    def _tensors_of(self, weight: str) -> list[str]:
        return [name for name in (weight, f"{weight}.scale") if name in self.tensors]

    def _append(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(record) + "\n").encode()
        if self._journal.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of the journal; None for one that is not whole."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _encode_header(tensors: Iterable[StoredTensor]) -> bytes:
    """A safetensors header, spaces at its end, that makes the data start on a page."""
    entries = {
        t.name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": [t.offset, t.offset + t.n_bytes]} for t in tensors
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _disk_errors(partial: Path) -> Iterator[None]:
    """Says in a sentence what the operating system refused."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"there is no room to write {partial} ({error.strerror}); make room and run the same command again: it "
                "goes on where it stopped"
            ) from error
        raise UserError(f"{partial} cannot be written: {error.strerror or error}") from error
