"""Models of random weights, written straight in the quantized format at the speed of the disk.

A matrix (N, K) is Gaussian of standard deviation K^-1/2, quantized: a linear then keeps the scale of what it reads, and
since every linear reads a normalized activation, nothing grows but the residual stream, as the square root of its
layers. So activations stay finite at any depth and the logits have a standard deviation near 1. Norms are 1.

Quantizing 10^11 numbers would take an hour; here a pool of groups of tiles is quantized once for each K, and every
matrix is laid out of groups drawn from the pool. Two outputs share a group at the same inputs with a chance of
1 / POOL_GROUPS.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold.checkpoint.fields import check
from fourfold.checkpoint.fourfold_dir import Progress, kind_of
from fourfold.checkpoint.fourfold_writer import DirectoryWriter
from fourfold.config import ModelConfig, WeightFormat
from fourfold.errors import UserError
from fourfold.format import CODE_BYTES, GROUP_TILES, SCALE_BYTES, SCALED, TILE_K, TILE_N, n_panels, panel_bytes
from fourfold.machine import checked_threads, choose_isa
from fourfold.matrix import check_format
from fourfold.models import WeightSpec

POOL_GROUPS = 2048  # 4 MB of NF4: drawn from, it stays in the caches
PIECE_BYTES = 4 << 20  # written at once; each thread holds one
BIAS_SIGMA = 0.02
VERSION = 1  # of what a seed gives; a change of the bytes is another version

Panels = NDArray[np.uint8]  # (panels, bytes of a panel)
Scales = NDArray[np.float32] | None  # (panels,); None where the format has none


def synthesize(
    config: ModelConfig,
    dst: str | Path,
    fmt: str,
    *,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a model of random weights, the same for the same seed, to the directory `dst`; it has no tokenizer.

    Interrupted, it goes on where it stopped. Memory is some 10 MB a thread and 10 MB (f32: 70 MB) for each K.
    `progress` counts bytes written. Raises UserError where `dst` exists or for a model, format, seed or number of
    threads that cannot be, ResourceError where the disk has no room.
    """
    fmt, n_threads = check_format(fmt), checked_threads(threads)
    check(config, "what is asked for")
    if seed < 0:
        raise UserError(f"seed must be at least 0, not {seed}")
    recipe: dict[str, Any] = {"weights": "random, of no source", "seed": seed, "synth": VERSION}
    with DirectoryWriter(Path(dst), config, fmt, f"random weights {VERSION}, seed {seed}") as writer:
        pools = _Pools(fmt, seed)
        n_bytes, lock = writer.finished_bytes, Lock()

        def write(index: int, spec: WeightSpec) -> None:
            nonlocal n_bytes
            rng = _rng(seed, 1, index)
            for name, data in _tensors(spec, fmt, pools, rng):
                writer.write(name, data)
                with lock:
                    n_bytes += data.nbytes
                    if progress:
                        progress(n_bytes, writer.data_bytes)
            writer.commit(spec.name)

        left = [(i, spec) for i, spec in enumerate(writer.specs) if spec.name not in writer.finished]
        with ThreadPoolExecutor(n_threads) as pool:
            work = [pool.submit(write, *one) for one in left]
            try:
                for done in work:
                    done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        writer.finish({}, recipe, quality=None)


def _rng(seed: int, *place: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, *place])))


def _tensors(
    spec: WeightSpec, fmt: WeightFormat, pools: _Pools, rng: np.random.Generator
) -> Iterator[tuple[str, NDArray[Any]]]:
    """The stored tensors of a weight, in pieces, in order."""
    if not spec.is_matrix:
        yield spec.name, _vector(spec, rng)
        return
    n, k = spec.shape
    pieces = _drawn(n, k, fmt, pools.of(k), rng) if k % TILE_K == 0 else _quantized(n, k, fmt, rng)
    for panels, scales in pieces:
        yield spec.name, panels
        if scales is not None:
            yield f"{spec.name}.scale", scales


def _vector(spec: WeightSpec, rng: np.random.Generator) -> NDArray[np.float32]:
    if kind_of(spec.name).endswith("norm"):
        return np.ones(spec.shape, np.float32)
    assert kind_of(spec.name).endswith("bias"), f"what is the vector {spec.name}?"
    return rng.standard_normal(spec.shape, np.float32) * np.float32(BIAS_SIGMA)


def _drawn(n: int, k: int, fmt: WeightFormat, pool: _Pool, rng: np.random.Generator) -> Iterator[tuple[Panels, Scales]]:
    """A matrix whose K is whole tiles: its whole panels out of the pool, a ragged last one by itself."""
    whole, step = n // TILE_N, max(1, PIECE_BYTES // panel_bytes(fmt, k))
    for begin in range(0, whole, step):
        panels = pool.panels(min(step, whole - begin), k, rng)
        yield panels, np.full(len(panels), pool.scale, np.float32) if fmt in SCALED else None
    if ragged := n % TILE_N:
        yield from _quantized(ragged, k, fmt, rng)


def _quantized(n: int, k: int, fmt: WeightFormat, rng: np.random.Generator) -> Iterator[tuple[Panels, Scales]]:
    """A matrix of any shape, drawn number by number and quantized."""
    step = max(1, PIECE_BYTES // (4 * k * TILE_N)) * TILE_N
    for begin in range(0, n, step):
        yield _pack(rng, min(step, n - begin), k, k, fmt)


def _pack(rng: np.random.Generator, n: int, k: int, inputs: int, fmt: WeightFormat) -> tuple[Panels, Scales]:
    """Gaussian (n, k) for so many inputs, quantized."""
    rows = rng.standard_normal((n, k), np.float32) * np.float32(1 / math.sqrt(inputs))
    panels = np.empty((n_panels(n), panel_bytes(fmt, k)), np.uint8)
    scales = np.empty(n_panels(n), np.float32) if fmt in SCALED else None
    _core.pack(rows, fmt, panels, scales, isa=choose_isa())
    return panels, scales


@dataclass(frozen=True)
class _Pool:
    """Groups of tiles (docs/format.md, section 3) under one panel scale."""

    groups: NDArray[np.uint8]  # (POOL_GROUPS, bytes of a group)
    scale: float
    tile_scales: int  # bytes of scales a tile
    tile_codes: int  # bytes of codes a tile

    def panels(self, count: int, k: int, rng: np.random.Generator) -> Panels:
        """Panels of K inputs."""
        full, rest = divmod(k // TILE_K, GROUP_TILES)
        drawn = self._draw(self.groups, count * full, rng).reshape(count, -1)
        if not rest:
            return drawn
        tails = self._draw(self._tails(rest), count, rng)
        return np.concatenate([drawn, tails], axis=1)

    def _tails(self, tiles: int) -> NDArray[np.uint8]:
        """The first tiles of each group, as a group that ends a panel has them."""
        codes = GROUP_TILES * self.tile_scales
        parts = self.groups[:, : tiles * self.tile_scales], self.groups[:, codes : codes + tiles * self.tile_codes]
        return np.concatenate(parts, axis=1)

    @staticmethod
    def _draw(groups: NDArray[np.uint8], count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        return np.take(groups, rng.integers(0, len(groups), count), axis=0, mode="clip")


class _Pools:
    """A pool for each number of inputs; threads share them."""

    def __init__(self, fmt: WeightFormat, seed: int) -> None:
        self._lock, self._pools = Lock(), dict[int, _Pool]()
        self._make = partial(self._new, fmt, seed)

    def of(self, k: int) -> _Pool:
        with self._lock:
            if k not in self._pools:
                self._pools[k] = self._make(k)
            return self._pools[k]

    @staticmethod
    def _new(fmt: WeightFormat, seed: int, k: int) -> _Pool:
        one_panel = POOL_GROUPS * GROUP_TILES * TILE_K  # so that all groups have one panel scale
        panels, scales = _pack(_rng(seed, 0, k), TILE_N, one_panel, k, fmt)
        scale = 1.0 if scales is None else float(scales[0])
        return _Pool(panels.reshape(POOL_GROUPS, -1), scale, SCALE_BYTES[fmt], CODE_BYTES[fmt])
