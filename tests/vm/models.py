"""The models that run in the virtual machines, with the logits that they should give."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import reference
import tiny
from fourfold.checkpoint import open_source
from fourfold.checkpoint.fourfold_dir import open_directory
from fourfold.config import ModelConfig
from fourfold.conversion import convert

ROUNDING = 2.0**-24  # of a float32 result
# Four heads make four ranks, and a quarter of each of its largest matrices fills a huge page.
WIDE = tiny.YUAN | {"intermediate_size": 8192, "num_hidden_layers": 1}
WIDE_IDS = list(range(0, 300, 20))
GOLDEN_TOLERANCE = 1e-3  # what fourfold promises of the published code's logits


@dataclass(frozen=True)
class Model:
    """A fourfold directory (f32) with expected.npy in it."""

    path: Path
    ids: list[int]
    tolerance: float  # of the logits
    tolerance_of_ranks: float  # of the difference that the number of ranks makes


def write_models(folder: Path, golden: Path) -> dict[str, Model]:
    """Yuans: "small", the published code's golden model where `golden` is there, else a random one; and "wide"."""
    made = {}
    for name, source in (("small", golden), ("wide", None)):
        ids = WIDE_IDS
        if source is None or not source.is_dir():
            config = WIDE if name == "wide" else tiny.YUAN
            source = tiny.write_huggingface(folder / f"{name}-source", config, _tensors(config))
        path = folder / name
        with open_source(source) as opened:
            convert(opened, path, "f32")
        stored = open_directory(path).config
        if (source / "logits.safetensors").exists():
            published = load_file(source / "logits.safetensors")
            ids, expected = published["tokens"].tolist(), published["prefill"]
        else:
            expected = reference.forward(stored, load_file(source / "model.safetensors"), ids)
        np.save(path / "expected.npy", expected.astype(np.float32))
        noise = rounding_noise(stored) * float(np.abs(expected).max())
        tolerance = GOLDEN_TOLERANCE if source == golden else 3 * noise
        made[name] = Model(path, ids, tolerance, 3 * sqrt(2) * noise)
    return made


def _tensors(config: dict[str, Any]) -> tiny.Tensors:
    """Random ones that keep activations near 1, so that rounding is all that is lost."""
    drawn = tiny.tensors(config)
    return {name: w if w.ndim == 1 else w / np.float32(sqrt(w[0].size)) for name, w in drawn.items()}


def rounding_noise(config: ModelConfig) -> float:
    """Standard deviation, as a share of the largest logit, that float32 sums leave whose order is not fixed.

    A matrix that is cut by its inputs (o, down, the filter's second) adds up as many products as it has inputs, on each
    rank and then over the ranks; each addition rounds the sum so far, by ROUNDING at most, and independently.
    """
    n_additions = config.n_layers * (2 * config.dim + config.hidden_dim)
    return ROUNDING * sqrt(n_additions)
