"""Gemma 3, its text part: local layers that see a window, and between them global ones.

Beside Llama: the embedding's rows are scaled; heads of q and k are normed before they are rotated; what attention and
feed-forward put out is normed before it is added; the gate is GELU; local layers turn by angles of their own. The trap:
the checkpoint keeps every norm's weights as their difference from 1.
"""

from __future__ import annotations

from fourfold.config import ModelConfig
from fourfold.models.rows import PlusOne, Tensor
from fourfold.models.spec import WeightSpec
from fourfold.program import ProgramBuilder


def weight_specs(c: ModelConfig) -> list[WeightSpec]:
    """Hugging Face names on the right; shapes (N, K) or (N,)."""

    def weight(name: str, source: str, *shape: int) -> WeightSpec:
        return WeightSpec(name, shape, Tensor(f"model.{source}.weight", shape))

    def norm(name: str, source: str, n: int = c.dim) -> WeightSpec:
        return WeightSpec(name, (n,), PlusOne(f"model.{source}.weight", (n,)))

    q_dim, kv_dim = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    specs = [weight("embed", "embed_tokens", c.vocab_size, c.dim)]
    for i in range(c.n_layers):
        w = f"layers.{i}"
        specs += [
            norm(f"{w}.attention_norm", f"{w}.input_layernorm"),
            weight(f"{w}.q", f"{w}.self_attn.q_proj", q_dim, c.dim),
            weight(f"{w}.k", f"{w}.self_attn.k_proj", kv_dim, c.dim),
            weight(f"{w}.v", f"{w}.self_attn.v_proj", kv_dim, c.dim),
            norm(f"{w}.q_norm", f"{w}.self_attn.q_norm", c.head_dim),
            norm(f"{w}.k_norm", f"{w}.self_attn.k_norm", c.head_dim),
            weight(f"{w}.o", f"{w}.self_attn.o_proj", c.dim, q_dim),
            norm(f"{w}.attention_out_norm", f"{w}.post_attention_layernorm"),
            norm(f"{w}.mlp_norm", f"{w}.pre_feedforward_layernorm"),
            weight(f"{w}.gate", f"{w}.mlp.gate_proj", c.hidden_dim, c.dim),
            weight(f"{w}.up", f"{w}.mlp.up_proj", c.hidden_dim, c.dim),
            weight(f"{w}.down", f"{w}.mlp.down_proj", c.dim, c.hidden_dim),
            norm(f"{w}.mlp_out_norm", f"{w}.post_feedforward_layernorm"),
        ]
    specs.append(norm("norm", "norm"))
    if not c.tie_embeddings:
        shape = (c.vocab_size, c.dim)
        specs.append(WeightSpec("head", shape, Tensor("lm_head.weight", shape)))
    return specs


def describe(c: ModelConfig, p: ProgramBuilder) -> None:
    """The walk of one token."""
    heads, kv_heads, hidden = p.heads(), p.kv_heads(), p.split(c.hidden_dim)
    x = p.embed("embed")
    for i in range(c.n_layers):
        w = f"layers.{i}"
        h = p.norm(x, f"{w}.attention_norm")
        q, k, v = p.linear(h, [f"{w}.q", f"{w}.k", f"{w}.v"], rows=[heads, kv_heads, kv_heads])
        a = p.attend(q, k, v, layer=i, head_norms=(f"{w}.q_norm", f"{w}.k_norm"))
        p.add_normed_linear(x, a, f"{w}.o", inputs=heads, norm=f"{w}.attention_out_norm")
        h = p.norm(x, f"{w}.mlp_norm")
        gate, up = p.linear(h, [f"{w}.gate", f"{w}.up"], rows=[hidden, hidden])
        gated = p.gated(gate, up, "gelu_tanh")
        p.add_normed_linear(x, gated, f"{w}.down", inputs=hidden, norm=f"{w}.mlp_out_norm")
    p.head(x, "norm", "embed" if c.tie_embeddings else "head")
