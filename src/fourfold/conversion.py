"""From a checkpoint to a fourfold directory: every weight streamed in pieces through the native packer.

Pieces of a few MB are read by one thread, packed by as many as there are, each its own, and hashed and written by one,
all at once and in order. So few are under way that memory is bounded, whatever the model: READ_AHEAD of the source, two
for each thread, OUTPUTS packed ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

import ml_dtypes
import numpy as np
import platformdirs
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold.checkpoint import Source, check_complete, check_copied_head, open_source
from fourfold.checkpoint.fourfold_dir import VERSION, Progress, kind_of, open_directory
from fourfold.checkpoint.fourfold_writer import DirectoryWriter
from fourfold.config import WeightFormat
from fourfold.errors import CheckpointError, RuntimeFailure, UserError
from fourfold.format import SCALED, TILE_N, n_panels, panel_bytes, stored_bytes
from fourfold.keep import DEFAULT_FORMAT, Formats, choose_formats, is_coded, read_blocks
from fourfold.machine import checked_threads, choose_isa
from fourfold.matrix import check_format
from fourfold.models import WeightSpec, weight_specs
from fourfold.pipeline import ahead

PIECE_BYTES = 8 << 20  # of weights as float32
READ_AHEAD = 8  # pieces read before a thread is free for them
AS_CODED = "as-coded"  # in place of a format in a cached directory's name, where a quantized source decides
Notice = Callable[[str], None]
OUTPUTS = 2  # packed pieces that wait to be written, beside those under way
RECIPE = {
    "block": 64,
    "scales": "FP8 E4M3 per block, float32 per panel of 16 outputs",
    "encoder": "least squared error over four scales, mirrored and not (docs/format.md, section 4)",
}


@dataclass(frozen=True)
class Quality:
    """What a set of matrices lost, and what it costs."""

    weights: int
    relative_rms_error: float  # sqrt(sum (weight - stored)² / sum weight²)
    bits_per_weight: float  # all included


@dataclass(frozen=True)
class QualityReport:
    format: WeightFormat
    total: Quality
    kinds: Mapping[str, Quality]  # by what a matrix is for: q, k, v, o, gate, up, down, embed, ...

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    source: Source,
    dst: str | Path,
    fmt: str | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> QualityReport:
    """Writes `source` to the directory `dst`, matrices in `fmt` and vectors in float32, and says what was lost.

    `keep` says what None stands for, and what of a quantized source's codes is kept; `notice` hears of it in sentences,
    and of what the source leaves out.
    Memory is bounded; an interrupted conversion goes on where it stopped. `progress` counts bytes written. Raises
    CheckpointError where the source is incomplete or holds a number that is not finite, UserError where `dst` exists,
    and ResourceError where the disk has no room.
    """
    asked, n_threads = None if fmt is None else check_format(fmt), checked_threads(threads)
    specs = weight_specs(source.config)
    check_complete(specs, source)
    check_copied_head(source)
    formats = choose_formats(specs, source, asked)
    isa = choose_isa()  # before anything is made: it may raise
    if notice:
        for sentence in (*source.notes, *formats.notes):
            notice(sentence)
    with DirectoryWriter(Path(dst), source.config, formats.main, source.fingerprint, formats.of) as writer:
        pieces = list(_pieces(spec for spec in specs if spec.name not in writer.finished))
        packer, recorder = _Packer(formats, isa), _Recorder(writer, progress)
        with (
            closing(ahead(pieces, partial(_read, source, formats), READ_AHEAD)) as read,
            closing(ahead(read, packer.pack, n_threads + OUTPUTS, n_threads)) as packed,
        ):
            for output in packed:
                recorder.record(output)
                packer.reuse(output)
        report = _report(specs, writer, formats)
        said = {"source": source.notes, "codes": formats.notes}
        notes = {kind: "; ".join(sentences) for kind, sentences in said.items() if sentences}
        writer.finish(source.tokenizer_files, RECIPE | notes, report.to_dict())
    return report


def cache_root() -> Path:
    """Where conversions are kept; it may not be there yet."""
    return Path(os.environ.get("FOURFOLD_CACHE") or platformdirs.user_cache_dir("fourfold")).expanduser()


def cached(
    source_path: str | Path,
    fmt: str | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    notice: Notice | None = None,
    check: Callable[[Source], None] | None = None,
) -> Path:
    """The conversion of a checkpoint, made by the first process that asks for it and kept in the user's cache.

    `fmt`, `progress` and `notice` are `convert`'s. `check` sees the source before it is converted, and may raise.
    FOURFOLD_CACHE names another place for the cache. Raises what `open_source` and `convert` raise, and CheckpointError
    where the conversion that was kept is damaged, naming the directory to delete.
    """
    asked = None if fmt is None else check_format(fmt)
    root = cache_root()
    with open_source(source_path) as source:
        fmt = asked or (AS_CODED if is_coded(source) else DEFAULT_FORMAT)
        made = json.dumps([VERSION, fmt, RECIPE, source.fingerprint], sort_keys=True)  # another recipe, other codes
        key = hashlib.sha256(made.encode()).hexdigest()[:16]
        directory = root / f"{Path(source_path).resolve().stem}-{fmt}-{key}"
        if _is_kept(directory, source, notice):  # a cache need not be one's own to be read
            return directory
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock = _locked(root / f"{directory.name}.lock", notice)
        except OSError as error:
            raise UserError(
                f"the cache {root} cannot be written ({error.strerror}); name another in FOURFOLD_CACHE"
            ) from error
        try:
            if not _is_kept(directory, source, notice):
                if check:
                    check(source)
                convert(source, directory, asked, threads=threads, progress=progress, notice=notice)
        finally:
            Path(lock.name).unlink(missing_ok=True)
            lock.close()
    return directory


def _is_kept(directory: Path, source: Source, notice: Notice | None) -> bool:
    """Whether the conversion is there, whole; `notice` hears again what was said of the source when it was made."""
    if not directory.exists():  # while it is made, it has another name
        return False
    try:
        open_directory(directory)
    except CheckpointError as error:
        raise CheckpointError(
            f"a conversion in the cache is damaged, delete {directory} to have it anew: {error}"
        ) from error
    if notice:
        for sentence in source.notes:
            notice(sentence)
    return True


def _locked(path: Path, notice: Notice | None) -> IO[str]:
    """The file, locked by this process alone: whoever held it before may have taken it away while we waited.

    `notice` hears of the wait, which may be as long as a conversion.
    """
    while True:
        lock = path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if notice:
                notice(f"another process is converting this model already; waiting for it ({path})")
            fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()


@dataclass(frozen=True)
class _Piece:
    """Rows [start, stop) of a weight."""

    spec: WeightSpec
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        return self.stop == self.spec.shape[0]


def _pieces(specs: Iterable[WeightSpec]) -> Iterator[_Piece]:
    """Every weight in turn, in whole panels of bounded size."""
    for spec in specs:
        n = spec.shape[0]
        step = max(TILE_N, PIECE_BYTES // (4 * math.prod(spec.shape[1:])) // TILE_N * TILE_N)
        for start in range(0, n, step):
            yield _Piece(spec, start, min(start + step, n))


@dataclass(frozen=True)
class _Rows:
    """A piece as the source has it."""

    piece: _Piece
    values: NDArray[Any]  # numbers, or codes and scales (`coded.block_type`)


def _read(source: Source, formats: Formats, piece: _Piece) -> _Rows:
    spec = piece.spec
    if spec.name in formats.kept:
        blocks = read_blocks(spec, source, formats.of[spec.name], piece.start, piece.stop)
        return _Rows(piece, blocks)
    return _Rows(piece, np.ascontiguousarray(spec.rows.read(source.tensors, piece.start, piece.stop)))


@dataclass(frozen=True)
class _Output:
    """A piece as it is stored."""

    piece: _Piece
    data: NDArray[Any]  # panels, or a vector
    memory: NDArray[np.uint8] | None = None  # that panels lie in
    scales: NDArray[np.float32] | None = None
    error: float = 0.0
    reference: float = 0.0


class _Packer:
    """Packs pieces, each on the thread that asks, into memory that is used again."""

    def __init__(self, formats: Formats, isa: str) -> None:
        self._formats, self._isa = formats, isa
        self._memory: SimpleQueue[NDArray[np.uint8]] = SimpleQueue()

    def pack(self, rows: _Rows) -> _Output:
        pack = self._pack_matrix if rows.piece.spec.is_matrix else self._pack_vector
        return pack(rows.piece, rows.values)

    def reuse(self, output: _Output) -> None:
        """Gives an output's memory back, which is of no use from here on."""
        if output.memory is not None:
            self._memory.put(output.memory)

    def _pack_vector(self, piece: _Piece, rows: NDArray[Any]) -> _Output:
        vector = rows.astype("<f4")
        if not np.isfinite(vector).all():
            raise _not_finite(piece.spec)
        return _Output(piece, vector)

    def _pack_matrix(self, piece: _Piece, rows: NDArray[Any]) -> _Output:
        n, k, fmt = len(rows), piece.spec.shape[1], self._formats.of[piece.spec.name]
        p, n_bytes = n_panels(n), panel_bytes(fmt, k)
        memory = self._take(p * n_bytes)
        panels = memory[: p * n_bytes].reshape(p, n_bytes)
        scales = np.empty(p, np.float32) if fmt in SCALED else None
        try:
            if rows.dtype.names:
                assert scales is not None  # codes are kept in formats with scales
                parts = {name: np.ascontiguousarray(rows[name]) for name in rows.dtype.names}
                codes, of_blocks, zeros = parts["codes"], parts["scales"], parts.get("zeros")
                error, reference = _core.place(codes, of_blocks, fmt, panels, scales, zeros)
            else:
                numbers = rows.view(np.uint16) if rows.dtype == ml_dtypes.bfloat16 else rows
                error, reference = _core.pack(numbers, fmt, panels, scales, isa=self._isa)
        except ValueError as wrong:
            if "NaN or infinit" in str(wrong):
                raise _not_finite(piece.spec) from wrong
            raise RuntimeFailure(f"{piece.spec.name} could not be packed: {wrong}") from wrong
        return _Output(piece, panels, memory, scales, error, reference)

    def _take(self, n_bytes: int) -> NDArray[np.uint8]:
        """At least so many bytes: memory that was given back, where that is large enough, or new memory."""
        with contextlib.suppress(Empty):
            if (memory := self._memory.get_nowait()).size >= n_bytes:
                return memory
        return np.empty(n_bytes, np.uint8)


class _Recorder:
    """Writes pieces in order, commits each weight with its last, and says how far it is."""

    def __init__(self, writer: DirectoryWriter, progress: Progress | None) -> None:
        self._writer, self._progress = writer, progress
        self._n_bytes = writer.finished_bytes
        self._error = self._reference = 0.0

    def record(self, output: _Output) -> None:
        name = output.piece.spec.name
        self._writer.write(name, output.data)
        self._n_bytes += output.data.nbytes
        if output.scales is not None:
            self._writer.write(f"{name}.scale", output.scales)
            self._n_bytes += output.scales.nbytes
        self._error, self._reference = self._error + output.error, self._reference + output.reference
        if output.piece.is_last:
            self._writer.commit(name, self._error, self._reference)
            self._error = self._reference = 0.0
        if self._progress:
            self._progress(self._n_bytes, self._writer.data_bytes)


def _not_finite(spec: WeightSpec) -> CheckpointError:
    return CheckpointError(
        f"{' and '.join(spec.rows.names)} ({spec.name}) holds NaN or infinity; the source is damaged"
    )


def _report(specs: Iterable[WeightSpec], writer: DirectoryWriter, formats: Formats) -> QualityReport:
    kinds: dict[str, list[WeightSpec]] = {}
    for spec in specs:
        if spec.is_matrix:
            kinds.setdefault(kind_of(spec.name), []).append(spec)

    def quality(specs: list[WeightSpec]) -> Quality:
        weights = sum(math.prod(spec.shape) for spec in specs)
        n_bytes = sum(stored_bytes(formats.of[spec.name], (spec.shape[0], spec.shape[1])) for spec in specs)
        error = math.fsum(writer.finished[spec.name].error for spec in specs)
        reference = math.fsum(writer.finished[spec.name].reference for spec in specs)
        return Quality(weights, math.sqrt(error / reference) if reference else 0.0, 8 * n_bytes / weights)

    total = quality([spec for specs in kinds.values() for spec in specs])
    return QualityReport(formats.main, total, {kind: quality(specs) for kind, specs in kinds.items()})
