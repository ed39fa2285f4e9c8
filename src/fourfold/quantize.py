"""From a checkpoint to a fourfold directory: every weight streamed in pieces through the native packer."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import ml_dtypes
import numpy as np
import platformdirs
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold.checkpoint import Source, check_complete, open_source
from fourfold.checkpoint.fourfold_dir import VERSION, Progress, kind_of, open_directory
from fourfold.checkpoint.fourfold_writer import DirectoryWriter
from fourfold.config import FORMATS, WeightFormat
from fourfold.errors import CheckpointError, RuntimeFailure, UserError
from fourfold.format import SCALED, TILE_N, n_panels, panel_bytes, stored_bytes
from fourfold.machine import choose_isa, read_machine
from fourfold.models import WeightSpec, weight_specs

MAX_THREADS = 4096
PIECE_BYTES = 64 << 20  # of weights as float32: at most three pieces are in memory
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
    source: Source, dst: str | Path, fmt: str, *, threads: int | None = None, progress: Progress | None = None
) -> QualityReport:
    """Writes `source` to the directory `dst`, matrices in `fmt` and vectors in float32, and says what was lost.

    Memory is bounded; an interrupted conversion goes on where it stopped. `progress` counts bytes written. Raises
    CheckpointError where the source is incomplete or holds a number that is not finite, UserError where `dst` exists,
    and ResourceError where the disk has no room.
    """
    fmt = _checked_format(fmt)
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UserError(f"threads must be a whole number from 1 to {MAX_THREADS}, not {threads}")
    specs = weight_specs(source.config)
    check_complete(specs, source)
    isa, n_threads = choose_isa(), threads or read_machine().n_threads
    with DirectoryWriter(Path(dst), source.config, fmt, source.fingerprint) as writer:
        n_bytes = writer.finished_bytes
        unfinished = [spec for spec in specs if spec.name not in writer.finished]
        error = reference = 0.0
        for piece, rows in _prefetch(source, _pieces(unfinished)):
            spec = piece.spec
            if spec.is_matrix:
                panels, scales, sums = _pack(spec, rows, fmt, n_threads, isa)
                writer.write(spec.name, panels)
                n_bytes += panels.nbytes
                if scales is not None:
                    writer.write(f"{spec.name}.scale", scales)
                    n_bytes += scales.nbytes
                error, reference = error + sums[0], reference + sums[1]
            else:
                vector = rows.astype("<f4")
                if not np.isfinite(vector).all():
                    raise _not_finite(spec)
                writer.write(spec.name, vector)
                n_bytes += vector.nbytes
            if piece.is_last:
                writer.commit(spec.name, error, reference)
                error = reference = 0.0
            if progress:
                progress(n_bytes, writer.data_bytes)
        report = _report(specs, writer, fmt)
        writer.finish(source.tokenizer_files, RECIPE, report.to_dict())
    return report


def cache_root() -> Path:
    """Where conversions are kept; it may not be there yet."""
    return Path(os.environ.get("FOURFOLD_CACHE") or platformdirs.user_cache_dir("fourfold")).expanduser()


def cached(
    source_path: str | Path,
    fmt: str,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    check: Callable[[Source], None] | None = None,
) -> Path:
    """The conversion of a checkpoint, made by the first process that asks for it and kept in the user's cache.

    `check` sees the source before it is converted, and may raise.
    FOURFOLD_CACHE names another place for the cache. Raises what `open_source` and `convert` raise, and CheckpointError
    where the conversion that was kept is damaged, naming the directory to delete.
    """
    fmt = _checked_format(fmt)
    root = cache_root()
    with open_source(source_path) as source:
        made = json.dumps([VERSION, fmt, RECIPE, source.fingerprint], sort_keys=True)  # another recipe, other codes
        key = hashlib.sha256(made.encode()).hexdigest()[:16]
        directory = root / f"{Path(source_path).resolve().stem}-{fmt}-{key}"
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock = _locked(root / f"{directory.name}.lock")
        except OSError as error:
            raise UserError(
                f"the cache {root} cannot be written ({error.strerror}); name another in FOURFOLD_CACHE"
            ) from error
        try:
            if directory.exists():
                _check_kept(directory)
            else:
                if check:
                    check(source)
                convert(source, directory, fmt, threads=threads, progress=progress)
        finally:
            Path(lock.name).unlink(missing_ok=True)
            lock.close()
    return directory


def _check_kept(directory: Path) -> None:
    try:
        open_directory(directory)
    except CheckpointError as error:
        raise CheckpointError(
            f"a conversion in the cache is damaged, delete {directory} to have it anew: {error}"
        ) from error


def _locked(path: Path) -> IO[str]:
    """The file, locked by this process alone: whoever held it before may have taken it away while we waited."""
    while True:
        lock = path.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()


def _checked_format(fmt: str) -> WeightFormat:
    if fmt not in FORMATS:
        raise UserError(f"there is no format {fmt!r}; choose one of {', '.join(FORMATS)}")
    return cast(WeightFormat, fmt)


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


def _prefetch(source: Source, pieces: Iterable[_Piece]) -> Iterator[tuple[_Piece, NDArray[Any]]]:
    """The rows of each piece, read while the one before it is worked on."""

    def read(piece: _Piece) -> NDArray[Any]:
        rows = np.ascontiguousarray(piece.spec.rows.read(source.tensors, piece.start, piece.stop))
        rows.reshape(-1).view(np.uint8)[
            ::4096
        ].max()  # a mapped file is read when it is touched: here, not in the packer
        return rows

    with ThreadPoolExecutor(1) as reader:
        waiting: deque[tuple[_Piece, Future[NDArray[Any]]]] = deque()
        for piece in pieces:
            waiting.append((piece, reader.submit(read, piece)))
            if len(waiting) > 1:
                ready, rows = waiting.popleft()
                yield ready, rows.result()
        for ready, rows in waiting:
            yield ready, rows.result()


def _pack(
    spec: WeightSpec, rows: NDArray[Any], fmt: WeightFormat, n_threads: int, isa: str
) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None, tuple[float, float]]:
    """Rows (n, K) to panels, panel scales, and the sums of squared errors and of squared weights."""
    n, k = rows.shape
    panels = np.empty((n_panels(n), panel_bytes(fmt, k)), np.uint8)
    scales = np.empty(n_panels(n), np.float32) if fmt in SCALED else None
    numbers = rows.view(np.uint16) if rows.dtype == ml_dtypes.bfloat16 else rows
    try:
        sums = _core.pack(numbers, fmt, panels, scales, n_threads, isa)
    except ValueError as error:
        if "NaN or infinity" in str(error):
            raise _not_finite(spec) from error
        raise RuntimeFailure(f"{spec.name} could not be packed: {error}") from error
    return panels, scales, sums


def _not_finite(spec: WeightSpec) -> CheckpointError:
    return CheckpointError(
        f"{' and '.join(spec.rows.names)} ({spec.name}) holds NaN or infinity; the source is damaged"
    )


def _report(specs: Iterable[WeightSpec], writer: DirectoryWriter, fmt: WeightFormat) -> QualityReport:
    kinds: dict[str, list[WeightSpec]] = {}
    for spec in specs:
        if spec.is_matrix:
            kinds.setdefault(kind_of(spec.name), []).append(spec)

    def quality(specs: list[WeightSpec]) -> Quality:
        weights = sum(math.prod(spec.shape) for spec in specs)
        n_bytes = sum(stored_bytes(fmt, (spec.shape[0], spec.shape[1])) for spec in specs)
        error = math.fsum(writer.finished[spec.name].error for spec in specs)
        reference = math.fsum(writer.finished[spec.name].reference for spec in specs)
        return Quality(weights, math.sqrt(error / reference) if reference else 0.0, 8 * n_bytes / weights)

    total = quality([spec for specs in kinds.values() for spec in specs])
    return QualityReport(fmt, total, {kind: quality(specs) for kind, specs in kinds.items()})
