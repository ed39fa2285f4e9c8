"""What a model is, in our own words: the only vocabulary that the rest of the house speaks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

FORMATS = ("nf4", "int4", "fp4", "fp4_bnb", "uint4", "int8", "bf16", "f32")
KV_FORMATS = ("bf16", "int8", "f32")

WeightFormat = Literal["nf4", "int4", "fp4", "fp4_bnb", "uint4", "int8", "bf16", "f32"]
KVFormat = Literal["bf16", "int8", "f32"]
RopeAngles = Literal["f32", "bf16"]
Gate = Literal["silu", "gelu_tanh"]  # what a feed-forward's gate goes through


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of rotary frequencies: low ones are divided by `factor`, high ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class LinearScaling:
    """Every rotary frequency is divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class LongRope:
    """Each rotary frequency is divided by a factor of its own (arXiv 2402.13753), cosines and sines are multiplied.

    Which factors hold is chosen for a whole text: `short` where its context is at most `original_context`.
    """

    short: tuple[float, ...]  # one for each pair of rotated dimensions
    long: tuple[float, ...]
    original_context: int
    attention_factor: float  # of cosines and sines


Scaling = RopeScaling | LinearScaling | LongRope


def scaling_kind(fields: Mapping[str, Any]) -> type[Scaling]:
    """The scaling that has such fields."""
    return LongRope if "short" in fields else RopeScaling if "low_freq_factor" in fields else LinearScaling


def seen(window: int | None, position: int) -> int:
    """Positions of those before `position` that are seen through a window, which holds the position itself."""
    return position if window is None else min(position, window - 1)


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only model. Nothing downstream reads a Hugging Face config."""

    model_type: str  # the module in fourfold.models that describes it
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
    rope_scaling: Scaling | None = None
    rotary_dim: int | None = None  # of each head's dimensions, the first that turn; None: all
    sliding_window: int | None = None  # positions that a token of a local layer sees, its own included
    global_every: int = 0  # of the layers with a window, every so many one sees all positions; 0: none does
    global_layers: tuple[int, ...] = ()  # of the layers with a window, others that see all positions, in order
    local_rope_theta: float | None = None  # of local layers, which then have no scaling; None: as the others
    attention_scale: float | None = None  # of the scores; None: head_dim ** -0.5
    embed_scale: float = 1.0  # of the embedding's rows where they are looked up
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    image_ids: tuple[int, ...] = ()  # that stand for images, and so for nothing here: refused in a prompt

    def window(self, layer: int) -> int | None:
        """Positions that a token of this layer sees, its own included; None where it sees all before it."""
        is_global = self.global_every > 0 and (layer + 1) % self.global_every == 0
        return None if is_global or layer in self.global_layers else self.sliding_window

    def seen(self, layer: int, position: int) -> int:
        """Positions of those before `position` that the token there sees in this layer, its own left out."""
        return seen(self.window(layer), position)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`. Raises TypeError on an unknown or a missing field."""
        fields = dict(fields)
        if scaling := fields.get("rope_scaling"):
            values: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in scaling.items()
            }
            fields["rope_scaling"] = scaling_kind(values)(**values)
        for key in ("eos_ids", "global_layers", "image_ids"):
            fields[key] = tuple(fields.get(key, ()))
        return cls(**fields)
