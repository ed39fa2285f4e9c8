"""How fast a checkpoint is quantized, end to end: read from the page cache, packed, hashed, written and synced."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import ml_dtypes
import numpy as np

import fourfold._core as _core
from fourfold.bench.limits import Limits, check_counts, fractions, spread
from fourfold.checkpoint import open_source
from fourfold.checkpoint.hf_config import model_config
from fourfold.conversion import convert
from fourfold.errors import UserError
from fourfold.format import SCALED, n_panels, panel_bytes
from fourfold.keep import DEFAULT_FORMAT
from fourfold.machine import Machine, checked_threads, choose_isa, plan_ranks, read_machine
from fourfold.matrix import check_format
from fourfold.models import weight_specs

# The checkpoint that is made where none is given; layers are added until it is large enough.
MADE: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 2048, "hidden_size": 2048,
    "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
LIMIT_SHAPE = (2048, 8192)  # of the matrix that the packer is measured on
WRITE_PIECE_BYTES = 8 << 20


def quantize(
    *,
    format: str | None = None,
    threads: int | None = None,
    gigabytes: float = 1.0,
    directory: str | None = None,
    repeats: int = 3,
) -> dict[str, Any]:
    """Time of whole conversions, and of the two things that none can do without: packing, and writing the result.

    The source is a bfloat16 Llama of `gigabytes`, made under `directory` (default: where temporary files go) and taken
    away again. Raises UserError for what cannot be asked, and what `convert` raises.
    """
    check_counts(repeats=repeats)
    fmt, n_threads = check_format(format or DEFAULT_FORMAT), checked_threads(threads)
    if not 0 < gigabytes < 1e6:
        raise UserError(f"gigabytes must be more than 0, not {gigabytes}")
    with tempfile.TemporaryDirectory(prefix="fourfold-bench-", dir=directory) as place:
        n_bytes = _make_source(Path(place, "source"), gigabytes)
        run = _Conversions(Path(place, "source"), Path(place, "converted"), fmt, n_threads)
        run.once()  # brings the source into the page cache
        limits = _ConversionLimits(read_machine(), run, n_bytes)
        seconds = np.array(limits.interleave(repeats, run.once))
    rates = (n_bytes / seconds).tolist()
    return {
        "bench": "quantize",
        "format": fmt,
        "ranks": 1,
        "threads": n_threads,
        "repeats": repeats,
        "isa": choose_isa(),
        "source_bytes": n_bytes,
        "stored_bytes": run.stored_bytes,
        "limits": limits.describe(),
        "seconds": spread(seconds.tolist()),
        "gb_s": spread([rate / 1e9 for rate in rates]),
        "of_pack": limits.fractions_of_pack(rates),
        "of_write": limits.fractions_of_write(rates),
        "notes": ["GB/s are of the source; time includes hashing, and syncing the result to its disk."],
    }


class _Conversions:
    """One conversion after another of the same source, each taken away again."""

    def __init__(self, source: Path, destination: Path, fmt: str, n_threads: int) -> None:
        self._source, self.destination, self.format, self.n_threads = source, destination, fmt, n_threads
        self.stored_bytes = 0

    def once(self) -> float:
        """Seconds of one."""

        def count(done: int, total: int) -> None:
            self.stored_bytes = total

        begin = perf_counter()
        with open_source(self._source) as source:
            convert(source, self.destination, self.format, threads=self.n_threads, progress=count)
        seconds = perf_counter() - begin
        shutil.rmtree(self.destination)
        return seconds


class _ConversionLimits(Limits):
    """Bytes of source a second that packing alone reaches in memory, and that writing alone reaches on the disk."""

    def __init__(self, machine: Machine, run: _Conversions, n_bytes: int) -> None:
        super().__init__(machine, plan_ranks(machine))
        self._run, self._n_bytes = run, n_bytes
        self._pack: list[float] = []
        self._write: list[float] = []
        rows = np.random.default_rng(0).standard_normal(LIMIT_SHAPE, np.float32)
        self._rows = rows.astype(ml_dtypes.bfloat16).view(np.uint16)
        n, k = LIMIT_SHAPE
        self._panels = np.ones((n_panels(n), panel_bytes(check_format(run.format), k)), np.uint8)
        self._scales = np.empty(len(self._panels), np.float32) if run.format in SCALED else None

    def fractions_of_pack(self, rates: Sequence[float]) -> dict[str, float]:
        """Spread of each repetition's bytes/s over the packer's around it."""
        return fractions(rates, self._pack)

    def fractions_of_write(self, rates: Sequence[float]) -> dict[str, float]:
        """Spread of each repetition's bytes/s over the disk's around it."""
        return fractions(rates, self._write)

    def describe(self) -> dict[str, Any]:
        return {
            "pack_gb_s": spread([rate / 1e9 for rate in self._pack]),
            "write_gb_s": spread([rate / 1e9 for rate in self._write]),
        }

    def _measure(self) -> None:
        arguments = self._rows, self._run.format, self._panels, self._scales, self._run.n_threads, choose_isa()
        _core.pack(*arguments)  # pages and clock rates settle
        begin = perf_counter()
        _core.pack(*arguments)
        self._pack.append(self._rows.nbytes / (perf_counter() - begin))
        piece = self._panels.reshape(-1).data[:WRITE_PIECE_BYTES]
        with tempfile.TemporaryFile(dir=self._run.destination.parent, buffering=0) as file:
            begin = perf_counter()
            for _ in range(-(-self._run.stored_bytes // len(piece))):
                file.write(piece)
            os.fsync(file.fileno())
        self._write.append(self._n_bytes / (perf_counter() - begin))


def _make_source(path: Path, gigabytes: float) -> int:
    """Writes a Hugging Face directory of random bfloat16 weights, the same numbers again and again; its bytes."""
    n_layers = 1
    while (n_bytes := 2 * sum(math.prod(shape) for shape in _shapes(n_layers).values())) < gigabytes * 1e9:
        n_layers += 1
    path.mkdir()
    (path / "config.json").write_text(json.dumps(MADE | {"num_hidden_layers": n_layers}))
    header, at = {}, 0
    for name, shape in _shapes(n_layers).items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at := at + 2 * math.prod(shape)]}
    text = json.dumps(header).encode()
    numbers = (np.random.default_rng(0).standard_normal(LIMIT_SHAPE, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while at:
            at -= file.write(numbers.reshape(-1).view(np.uint8)[:at].data)
    return n_bytes


def _shapes(n_layers: int) -> dict[str, tuple[int, ...]]:
    specs = weight_specs(model_config(MADE | {"num_hidden_layers": n_layers}))
    return {name: shape for spec in specs for name, shape in spec.rows.source_shapes().items()}
