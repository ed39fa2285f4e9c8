"""A fourfold directory (docs/format.md, section 5): opened with every number checked, verified, and described.

Nothing in it is trusted: names, shapes and formats must be the ones that the model's own configuration implies, and
every offset must lie in the file, before one byte of a weight is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fourfold.checkpoint.fields import check
from fourfold.checkpoint.source import read_json
from fourfold.checkpoint.tokenizer_files import TOKENIZER_FILES
from fourfold.config import FORMATS, ModelConfig, RopeScaling, WeightFormat, scaling_kind
from fourfold.errors import CheckpointError
from fourfold.format import SCALED, n_panels, panel_bytes, stored_bytes
from fourfold.models import weight_specs
from fourfold.models.spec import WeightSpec

VERSION = 1
CONFIG, WEIGHTS, MANIFEST = "config.json", "model.safetensors", "manifest.json"
OWN_HASH, BLANK_HASH = "sha256", "0" * 64  # of the manifest, in itself
HASH_PIECE_BYTES = 4 << 20

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of model.safetensors."""

    name: str
    dtype: str  # "U8" or "F32"
    shape: tuple[int, ...]
    offset: int  # in bytes, from the start of the data

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype == "F32" else 1)


@dataclass(frozen=True)
class StoredWeight:
    """Where the panels of a matrix lie in model.safetensors; offsets are from the start of the file."""

    format: WeightFormat
    shape: tuple[int, int]  # (N, K)
    data_offset: int
    data_bytes: int  # n_panels(N) · panel_bytes(format, K)
    scale_offset: int | None  # of float32 (n_panels(N),); None where the format has no scales


@dataclass(frozen=True)
class FourfoldDirectory:
    """A converted model, checked. Its matrices are for the native loader; its vectors are here."""

    path: Path
    config: ModelConfig
    format: WeightFormat  # of the conversion; each weight has its own
    weights: Mapping[str, StoredWeight]
    vectors: Mapping[str, NDArray[np.float32]]  # (N,) each
    tensors: Mapping[str, StoredTensor]  # all of them, as stored
    data_start: int  # in bytes, from the start of the file
    manifest: Mapping[str, Any]

    @property
    def weights_path(self) -> Path:
        return self.path / WEIGHTS

    @property
    def identity(self) -> str:
        """SHA-256 that stands for all that the model consists of: its tensors, its configuration, its tokenizer."""
        hashes = [self.manifest["tensors"], self.manifest["files"]]
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def kind_of(name: str) -> str:
    """What a weight is for, whatever its layer: "layers.7.gate" is a "gate"."""
    return name.rsplit(".", 1)[-1]


def lay_out(specs: Iterable[WeightSpec], formats: Mapping[str, WeightFormat]) -> list[StoredTensor]:
    """The tensors of a model, one after another without a gap; `formats` gives that of each matrix."""
    tensors: list[StoredTensor] = []

    def add(name: str, dtype: str, *shape: int) -> None:
        offset = tensors[-1].offset + tensors[-1].n_bytes if tensors else 0
        tensors.append(StoredTensor(name, dtype, shape, offset))

    for spec in specs:
        if not spec.is_matrix:
            add(spec.name, "F32", *spec.shape)
            continue
        n, k = spec.shape
        add(spec.name, "U8", n_panels(n), panel_bytes(formats[spec.name], k))
        if formats[spec.name] in SCALED:
            add(f"{spec.name}.scale", "F32", n_panels(n))
    return tensors


def open_directory(path: str | Path) -> FourfoldDirectory:
    """Raises CheckpointError, naming the file or tensor, where anything is missing, unexpected or inconsistent."""
    path = Path(path)
    fields = read_json(path / CONFIG)
    if fields.get("fourfold") != VERSION:
        raise CheckpointError(f"{path} is not a fourfold directory of version {VERSION}; convert the model again")
    if set(fields) != {"fourfold", "format", "model", "weights"} or fields["format"] not in FORMATS:
        raise CheckpointError(f"{path / CONFIG} does not have the keys or the format that version {VERSION} has")
    listed = fields["weights"]
    if not isinstance(listed, dict):
        raise CheckpointError(f"{path / CONFIG} lists no weights")
    config = _read_model_config(path, fields["model"], n_tensors=len(listed))
    specs = weight_specs(config)
    formats = _read_formats(path, listed, specs)

    file = path / WEIGHTS
    found, data_start = _read_header(file)
    expected = lay_out(specs, formats)
    for tensor in expected:
        actual = found.get(tensor.name)
        if actual is None:
            raise CheckpointError(f"{file} lacks the tensor {tensor.name}")
        if (actual.dtype, actual.shape) != (tensor.dtype, tensor.shape):
            should, does = f"{tensor.dtype} {tensor.shape}", f"{actual.dtype} {actual.shape}"
            raise CheckpointError(f"{file}: tensor {tensor.name} should be {should}, and is {does}")
    if extra := set(found) - {tensor.name for tensor in expected}:
        raise CheckpointError(f"{file} holds the tensor {min(extra)}, which the model does not have")

    weights = {}
    for name, fmt in formats.items():
        n, k = next(spec.shape for spec in specs if spec.name == name)
        scale = data_start + found[f"{name}.scale"].offset if fmt in SCALED else None
        weights[name] = StoredWeight(fmt, (n, k), data_start + found[name].offset, found[name].n_bytes, scale)
    vectors = {}
    for spec in specs:
        if not spec.is_matrix:
            offset = data_start + found[spec.name].offset
            vectors[spec.name] = np.fromfile(file, "<f4", math.prod(spec.shape), offset=offset)
    manifest = read_manifest(path)
    if _damaged_files(path, {CONFIG: manifest["files"][CONFIG]}):
        raise CheckpointError(f"{path} is damaged (file {CONFIG}); delete it and convert the model again")
    return FourfoldDirectory(path, config, fields["format"], weights, vectors, found, data_start, manifest)


def verify(path: str | Path, progress: Progress | None = None) -> int:
    """Hashes every tensor and every other file again; returns how many bytes the tensors have.

    Raises CheckpointError naming what is damaged, or whatever `open_directory` finds.
    """
    directory = open_directory(path)
    expected, files = directory.manifest["tensors"], directory.manifest["files"]
    damaged = [f"file {name}" for name in _damaged_files(directory.path, files)]
    damaged += [f"file {name}, which was not converted" for name in _further_files(directory.path, files)]
    n_bytes = 0
    total = sum(tensor.n_bytes for tensor in directory.tensors.values())
    for tensor, sha256 in hash_tensors(directory.weights_path, directory.data_start, directory.tensors.values()):
        n_bytes += tensor.n_bytes
        if progress:
            progress(n_bytes, total)
        if expected.get(tensor.name) != sha256:
            damaged.append(f"tensor {tensor.name}")
    if damaged:
        shown = ", ".join(damaged[:5]) + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "")
        raise CheckpointError(f"{path} is damaged ({shown}); delete it and convert the model again")
    return n_bytes


def inspect(path: str | Path) -> dict[str, Any]:
    """What a directory holds, as JSON-ready values: model, format, recipe, source, quality, tensors, kinds and totals.

    Bits per weight count codes, block scales, panel scales and padding, over the matrices.
    """
    directory = open_directory(path)
    manifest = directory.manifest
    rows: list[dict[str, Any]] = []
    for name, weight in directory.weights.items():
        n_bytes, n_weights = stored_bytes(weight.format, weight.shape), math.prod(weight.shape)
        rows.append(
            {"name": name, "kind": kind_of(name), "format": weight.format, "shape": list(weight.shape)}
            | {"weights": n_weights, "bytes": n_bytes, "bits_per_weight": 8 * n_bytes / n_weights}
        )
    for name, vector in directory.vectors.items():
        rows.append(
            {"name": name, "kind": kind_of(name), "format": "f32", "shape": [vector.size]}
            | {"weights": vector.size, "bytes": vector.nbytes, "bits_per_weight": 32.0}
        )
    kinds: dict[str, dict[str, Any]] = defaultdict(lambda: {"count": 0, "weights": 0, "bytes": 0})
    for row in rows:
        kind = kinds[row["kind"]]
        kind["count"] += 1
        kind["weights"] += row["weights"]
        kind["bytes"] += row["bytes"]
    matrices = [row for row in rows if len(row["shape"]) == 2]
    return {
        "path": str(directory.path),
        "format": directory.format,
        "model": directory.config.to_dict(),
        "weights": sum(row["weights"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "bits_per_weight": 8 * sum(row["bytes"] for row in matrices) / sum(row["weights"] for row in matrices),
        "kinds": {k: v | {"bits_per_weight": 8 * v["bytes"] / v["weights"]} for k, v in kinds.items()},
        "recipe": manifest["recipe"],
        "source": manifest["source"],
        "quality": manifest["quality"],
        "tensors": rows,
    }


def seal(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it is written: its last entry is the hash of all its bytes, with zeros in place of that hash."""
    blank = encode_json({**manifest, OWN_HASH: BLANK_HASH})
    begin, _, end = blank.rpartition(BLANK_HASH.encode())
    return begin + hashlib.sha256(blank).hexdigest().encode() + end


def encode_json(value: Mapping[str, Any]) -> bytes:
    """As every JSON file of a directory is written."""
    return (json.dumps(value, indent=1) + "\n").encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the directory at `path`. Raises CheckpointError where it is not one, or is not as it was written.

    One without a hash of its own is from before there was one.
    """
    file = path / MANIFEST
    manifest = read_json(file)
    keys = {"fourfold", "source", "recipe", "quality", "files", "tensors"}
    if manifest.get("fourfold") != VERSION or set(manifest) - {OWN_HASH} != keys:
        raise CheckpointError(f"{file} is not a manifest of version {VERSION}")
    if OWN_HASH in manifest:
        recorded = str(manifest[OWN_HASH]).encode(errors="backslashreplace")
        blank = file.read_bytes().replace(recorded, BLANK_HASH.encode())
        if hashlib.sha256(blank).hexdigest().encode() != recorded:
            raise CheckpointError(f"{path} is damaged (file {MANIFEST}); delete it and convert the model again")
    for table in ("tensors", "files"):
        hashes = manifest[table]
        if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
            raise CheckpointError(f"{file} lacks the hashes of the {table}")
    if CONFIG not in manifest["files"] or any(Path(name).name != name for name in manifest["files"]):
        raise CheckpointError(f"{file} does not list the directory's own files")
    return manifest


def _damaged_files(path: Path, recorded: Mapping[str, str]) -> list[str]:
    """The names of those that are not there, or not as they were written."""
    return [
        name
        for name, sha256 in recorded.items()
        if not (path / name).is_file() or hashlib.sha256((path / name).read_bytes()).hexdigest() != sha256
    ]


def _further_files(path: Path, recorded: Mapping[str, str]) -> list[str]:
    """What would be read as the tokenizer's, or the chat template, but was put there later."""
    return [name for name in TOKENIZER_FILES if name not in recorded and (path / name).is_file()]


def hash_tensors(file: Path, data_start: int, tensors: Iterable[StoredTensor]) -> Iterable[tuple[StoredTensor, str]]:
    """SHA-256 of each tensor's bytes, in order, on every core."""
    fd = os.open(file, os.O_RDONLY)

    def digest(tensor: StoredTensor) -> tuple[StoredTensor, str]:
        sha256, at, end = hashlib.sha256(), data_start + tensor.offset, data_start + tensor.offset + tensor.n_bytes
        while at < end and (piece := os.pread(fd, min(end - at, HASH_PIECE_BYTES), at)):
            sha256.update(piece)
            at += len(piece)
        return tensor, sha256.hexdigest()

    try:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            yield from pool.map(digest, tensors)
    finally:
        os.close(fd)


def _read_header(file: Path) -> tuple[dict[str, StoredTensor], int]:
    """The tensors of a safetensors file, and where its data starts. The library checks that they fill it exactly."""
    try:
        with safe_open(file, framework="numpy"), file.open("rb") as raw:
            n_header = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(n_header))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
    header.pop("__metadata__", None)
    found = {
        name: StoredTensor(name, entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return found, 8 + n_header


def _read_formats(path: Path, listed: dict[str, Any], specs: list[WeightSpec]) -> dict[str, WeightFormat]:
    """The format of each matrix, in the order of `specs`."""
    formats = {}
    for spec in specs:
        if not spec.is_matrix:
            continue
        entry = listed.get(spec.name)
        if not isinstance(entry, dict) or entry.get("format") not in FORMATS or entry.get("shape") != list(spec.shape):
            raise CheckpointError(f"{path / CONFIG} should list {spec.name} with a format and the shape {spec.shape}")
        formats[spec.name] = entry["format"]
    if extra := set(listed) - set(formats):
        raise CheckpointError(f"{path / CONFIG} lists {min(extra)}, which the model does not have")
    return formats


def _read_model_config(path: Path, fields: Any, n_tensors: int) -> ModelConfig:
    """A ModelConfig whose fields have their types and make a model; its layers do not outnumber the tensors."""
    wrong = CheckpointError(f"{path / CONFIG} does not describe a model")
    if not isinstance(fields, dict):
        raise wrong
    _check_types(path, ModelConfig, fields)
    if scaling := fields.get("rope_scaling"):
        _check_types(path, scaling_kind(scaling) if isinstance(scaling, dict) else RopeScaling, scaling)
    try:
        config = ModelConfig.from_dict(fields)
    except TypeError:  # a field is missing
        raise wrong from None
    if config.n_layers > n_tensors:
        raise wrong
    return check(config, str(path / CONFIG))


def _check_types(path: Path, record: type, fields: Any) -> None:
    """Every one of `fields` is a field of a dataclass of ours and has its type."""
    accepted: dict[str, tuple[type, ...]] = {
        "str": (str,), "bool": (bool,), "int": (int,), "float": (int, float), "int | None": (int, type(None)),
        "float | None": (int, float, type(None)), "tuple[int, ...]": (list, tuple), "tuple[float, ...]": (list, tuple),
        "Scaling | None": (dict, type(None)),
    }  # fmt: skip
    known = {field.name: str(field.type) for field in dataclasses.fields(record)}
    if not isinstance(fields, dict) or not set(fields) <= set(known):
        raise CheckpointError(f"{path / CONFIG} has a field that {record.__name__} of this version does not have")
    for name, value in fields.items():
        right = isinstance(value, accepted[known[name]]) and (isinstance(value, bool) == (known[name] == "bool"))
        if isinstance(value, list | tuple):
            items = (int,) if known[name] == "tuple[int, ...]" else (int, float)
            right = right and all(type(item) in items for item in value)
        if not right or (isinstance(value, float) and not math.isfinite(value)):
            raise CheckpointError(f"{path / CONFIG}: {name} is {value!r}, which is not {known[name]}")
