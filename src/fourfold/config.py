"""What a model is, in our own words: the only vocabulary that the rest of the house speaks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

FORMATS = ("nf4", "int4", "fp4", "fp4_bnb", "int8", "bf16", "f32")
KV_FORMATS = ("bf16", "int8", "f32")

WeightFormat = Literal["nf4", "int4", "fp4", "fp4_bnb", "int8", "bf16", "f32"]
KVFormat = Literal["bf16", "int8", "f32"]
RopeAngles = Literal["f32", "bf16"]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling (the only kind that fourfold honours)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only model. Nothing downstream reads a Hugging Face config."""

    model_type: str  # "llama", "qwen2", "yuan": the module in fourfold.models that describes it
    vocab_size: int
    dim: int  # width of the residual stream
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int  # width of the feed-forward
    norm_eps: float
    rope_theta: float
    max_context: int  # positions that the model was trained for
    tie_embeddings: bool  # the head is the embedding
    qkv_bias: bool = False
    rope_scaling: RopeScaling | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`. Raises TypeError on an unknown or a missing field."""
        fields = dict(fields)
        if fields.get("rope_scaling"):
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        fields["eos_ids"] = tuple(fields.get("eos_ids", ()))
        return cls(**fields)
