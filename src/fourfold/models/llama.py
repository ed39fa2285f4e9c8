"""Llama: pre-norm, rotary attention with grouped heads, SiLU-gated feed-forward.

Qwen2 adds biases to q, k and v, Qwen3 a norm of every head of q and k, Mistral a window, which both of them may have in
some layers; Phi-3 stores it in other rows.
"""

from __future__ import annotations

from fourfold.config import ModelConfig
from fourfold.models.rows import Tensor
from fourfold.models.spec import WeightSpec
from fourfold.program import ProgramBuilder


def weight_specs(c: ModelConfig, *, head_norms: bool = False) -> list[WeightSpec]:
    """Hugging Face names on the right; shapes (N, K) or (N,)."""

    def weight(name: str, source: str, *shape: int) -> WeightSpec:
        return WeightSpec(name, shape, Tensor(source, shape))

    q_dim, kv_dim = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    specs = [weight("embed", "model.embed_tokens.weight", c.vocab_size, c.dim)]
    for i in range(c.n_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        specs.append(weight(f"{ours}.attention_norm", f"{theirs}.input_layernorm.weight", c.dim))
        for part, n in (("q", q_dim), ("k", kv_dim), ("v", kv_dim)):
            specs.append(weight(f"{ours}.{part}", f"{theirs}.self_attn.{part}_proj.weight", n, c.dim))
            if c.qkv_bias:
                specs.append(weight(f"{ours}.{part}_bias", f"{theirs}.self_attn.{part}_proj.bias", n))
        for part in ("q_norm", "k_norm") if head_norms else ():
            specs.append(weight(f"{ours}.{part}", f"{theirs}.self_attn.{part}.weight", c.head_dim))
        specs += [
            weight(f"{ours}.o", f"{theirs}.self_attn.o_proj.weight", c.dim, q_dim),
            weight(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm.weight", c.dim),
            weight(f"{ours}.gate", f"{theirs}.mlp.gate_proj.weight", c.hidden_dim, c.dim),
            weight(f"{ours}.up", f"{theirs}.mlp.up_proj.weight", c.hidden_dim, c.dim),
            weight(f"{ours}.down", f"{theirs}.mlp.down_proj.weight", c.dim, c.hidden_dim),
        ]
    specs.append(weight("norm", "model.norm.weight", c.dim))
    if not c.tie_embeddings:
        specs.append(weight("head", "lm_head.weight", c.vocab_size, c.dim))
    return specs


def describe(c: ModelConfig, p: ProgramBuilder, *, head_norms: bool = False) -> None:
    """The walk of one token."""
    heads, kv_heads, hidden = p.heads(), p.kv_heads(), p.split(c.hidden_dim)
    x = p.embed("embed")
    for i in range(c.n_layers):
        w = f"layers.{i}"
        h = p.norm(x, f"{w}.attention_norm")
        biases = [f"{w}.{part}_bias" if c.qkv_bias else None for part in "qkv"]
        q, k, v = p.linear(h, [f"{w}.q", f"{w}.k", f"{w}.v"], rows=[heads, kv_heads, kv_heads], biases=biases)
        a = p.attend(q, k, v, layer=i, head_norms=(f"{w}.q_norm", f"{w}.k_norm") if head_norms else None)
        p.add_linear(x, a, f"{w}.o", inputs=heads)
        h = p.norm(x, f"{w}.mlp_norm")
        gate, up = p.linear(h, [f"{w}.gate", f"{w}.up"], rows=[hidden, hidden])
        p.add_linear(x, p.gated(gate, up), f"{w}.down", inputs=hidden)
    p.head(x, "norm", "embed" if c.tie_embeddings else "head")
