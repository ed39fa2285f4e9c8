"""Rotary position angles as tables: what every step reads, computed once."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fourfold.config import ModelConfig, RopeAngles, RopeScaling


def rotary_tables(
    config: ModelConfig, n_positions: int, angles: RopeAngles
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines, (n_positions, head_dim / 2) each.

    `bf16` repeats what a model cast to bfloat16 computes, as the published Yuan code does: the position, the
    frequency, their product, and its cosine and sine are each rounded. Positions above 256 then share angles.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.power(np.float32(config.rope_theta), exponents)
    if config.rope_scaling:
        frequencies = _scaled(frequencies, config.rope_scaling)
    positions = np.arange(n_positions, dtype=np.float32)
    if angles == "bf16":
        turned = _bf16(np.outer(_bf16(positions), _bf16(frequencies)))
        return _bf16(np.cos(turned)), _bf16(np.sin(turned))
    turned = np.outer(positions, frequencies)
    return np.cos(turned), np.sin(turned)


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
