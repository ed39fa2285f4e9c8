"""Phi-3 and Phi-4: Llama with q, k and v in one matrix of the checkpoint, gate and up in another.

They become the matrices that every other model has, so that a rank holds whole heads of each.
"""

from __future__ import annotations

from dataclasses import replace

from fourfold.config import ModelConfig
from fourfold.models import llama
from fourfold.models.llama import describe
from fourfold.models.rows import Slice
from fourfold.models.spec import WeightSpec

__all__ = ["describe", "weight_specs"]


def weight_specs(c: ModelConfig) -> list[WeightSpec]:
    """Llama's, but for where the rows of five of them come from."""
    q_dim, kv_dim = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    qkv, gate_up = (q_dim + 2 * kv_dim, c.dim), (2 * c.hidden_dim, c.dim)
    fused = {
        "q": ("self_attn.qkv_proj.weight", qkv, 0),
        "k": ("self_attn.qkv_proj.weight", qkv, q_dim),
        "v": ("self_attn.qkv_proj.weight", qkv, q_dim + kv_dim),
        "gate": ("mlp.gate_up_proj.weight", gate_up, 0),
        "up": ("mlp.gate_up_proj.weight", gate_up, c.hidden_dim),
    }

    def of_phi3(spec: WeightSpec) -> WeightSpec:
        layer, _, part = spec.name.rpartition(".")
        if part not in fused:
            return spec
        name, shape, begin = fused[part]
        return replace(spec, rows=Slice(f"model.{layer}.{name}", shape, begin))

    return [of_phi3(spec) for spec in llama.weight_specs(c)]
