"""A checkpoint in memory: a small random llama, and what a conversion of it did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourfold.checkpoint import Source
from fourfold.config import ModelConfig
from fourfold.models import weight_specs

CONFIG = ModelConfig(
    model_type="llama", vocab_size=300, dim=128, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=200,
    norm_eps=1e-5, rope_theta=1e4, max_context=64, tie_embeddings=False, bos_id=1, eos_ids=(2,),
)  # fmt: skip
TOKENIZER = {"tokenizer.json": b'{"a tokenizer": 1}', "tokenizer_config.json": b"{}"}


@dataclass
class FakeTensor:
    data: NDArray[Any]
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        self.reads.append((start, stop))
        return self.data[start:stop]


def tensors(dtype: Any = np.float32, seed: int = 0, config: ModelConfig = CONFIG) -> dict[str, FakeTensor]:
    rng = np.random.default_rng(seed)
    shapes = {n: s for spec in weight_specs(config) for n, s in spec.rows.source_shapes().items()}
    return {name: FakeTensor((rng.standard_normal(shape) * 0.05).astype(dtype)) for name, shape in shapes.items()}


def source(
    tensors: Mapping[str, FakeTensor], fingerprint: str = "0123", files: Mapping[str, bytes | Path] = TOKENIZER
) -> Source:
    return Source(Path("fake"), CONFIG, tensors, files, fingerprint, [])


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}
