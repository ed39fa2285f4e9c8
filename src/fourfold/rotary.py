"""Rotary position angles as tables: what every step reads, computed once."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fourfold.config import LinearScaling, LongRope, ModelConfig, RopeAngles, RopeScaling, Scaling

F32 = 4  # bytes

Table = tuple[NDArray[np.float32], NDArray[np.float32]]  # cosines, sines


def rotary_tables(config: ModelConfig, n_positions: int, angles: RopeAngles) -> list[Table]:
    """Cosines and sines, (n_positions, rotated dimensions / 2) each; of local layers a second pair where they differ.

    `bf16` repeats what a model cast to bfloat16 computes, as the published Yuan code does: the position, the
    frequency, their product, and its cosine and sine are each rounded. Positions above 256 then share angles.
    """
    tables = [_table(config, config.rope_theta, config.rope_scaling, n_positions, angles)]
    if config.local_rope_theta is not None:
        tables.append(_table(config, config.local_rope_theta, None, n_positions, angles))
    return tables


def table_of(config: ModelConfig, layer: int) -> int:
    """Which of `rotary_tables` a layer turns by."""
    return int(config.local_rope_theta is not None and config.window(layer) is not None)


def table_bytes(config: ModelConfig, n_positions: int) -> int:
    """What `rotary_tables` take."""
    n_tables = 1 if config.local_rope_theta is None else 2
    return n_tables * n_positions * (config.rotary_dim or config.head_dim) * F32


def _table(config: ModelConfig, theta: float, scaling: Scaling | None, n_positions: int, angles: RopeAngles) -> Table:
    dim = config.rotary_dim or config.head_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    turns = np.power(np.float32(theta), exponents)
    if isinstance(scaling, LongRope):
        factors = scaling.short if n_positions <= scaling.original_context else scaling.long
        turns = np.array(factors, np.float32) * turns
    frequencies = np.float32(1) / turns
    if isinstance(scaling, RopeScaling):
        frequencies = _scaled(frequencies, scaling)
    if isinstance(scaling, LinearScaling):
        frequencies = frequencies / np.float32(scaling.factor)
    size = np.float32(scaling.attention_factor if isinstance(scaling, LongRope) else 1)
    positions = np.arange(n_positions, dtype=np.float32)
    if angles == "bf16":
        turned = _bf16(np.outer(_bf16(positions), _bf16(frequencies)))
        return _bf16(np.cos(turned) * size), _bf16(np.sin(turned) * size)
    turned = np.outer(positions, frequencies)
    return np.cos(turned) * size, np.sin(turned) * size


def _bf16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def _scaled(frequencies: NDArray[np.float32], scaling: RopeScaling) -> NDArray[np.float32]:
    """Llama 3: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    blend = (scaling.original_context / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = np.clip(blend, 0, 1)
    return ((1 - blend) * frequencies / scaling.factor + blend * frequencies).astype(np.float32)
