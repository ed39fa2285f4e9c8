"""Yuan 2.0: Llama with a Localized Filtering-based Attention (arXiv 2311.15786) in front of q and k.

The filter is two convolutions over time, each of this token and the one before it, and a norm:
    c1[t] = W1 [u[t-1]; u[t]] + b1,   c2[t] = W2 [c1[t-1]; c1[t]] + b2,   f = norm(u + c2),   u[-1] = c1[-1] = 0
q and k are projections of f, v of u. The traps: q and k rows lie interleaved by heads in the checkpoint; SiLU is on
`up_proj`, not `gate_proj`; the head is the embedding even where a copy is stored.
"""

from __future__ import annotations

from fourfold.config import ModelConfig
from fourfold.models.rows import HeadPairs, Rows, Tensor, TimeConv
from fourfold.models.spec import WeightSpec
from fourfold.program import ProgramBuilder


def weight_specs(c: ModelConfig) -> list[WeightSpec]:
    """Hugging Face names on the right; shapes (N, K) or (N,)."""

    def weight(name: str, source: str, *shape: int) -> WeightSpec:
        return WeightSpec(name, shape, Tensor(source, shape))

    half = c.dim // 2
    specs = [weight("embed", "model.embed_tokens.weight", c.vocab_size, c.dim)]
    for i in range(c.n_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention = f"{theirs}.self_attn"

        def head_pairs(which: int, attention: str = attention) -> Rows:
            q, k = f"{attention}.q_proj.weight", f"{attention}.k_proj.weight"
            return HeadPairs(q, k, which, c.n_heads, c.head_dim, c.dim)

        specs += [
            weight(f"{ours}.attention_norm", f"{theirs}.input_layernorm.weight", c.dim),
            weight(f"{ours}.v", f"{attention}.v_proj.weight", c.dim, c.dim),
            WeightSpec(f"{ours}.conv1", (half, 2 * c.dim), TimeConv(f"{attention}.lf_gate.conv1.weight", half, c.dim)),
            weight(f"{ours}.conv1_bias", f"{attention}.lf_gate.conv1.bias", half),
            WeightSpec(f"{ours}.conv2", (c.dim, 2 * half), TimeConv(f"{attention}.lf_gate.conv2.weight", c.dim, half)),
            weight(f"{ours}.conv2_bias", f"{attention}.lf_gate.conv2.bias", c.dim),
            weight(f"{ours}.filter_norm", f"{attention}.lf_gate.output_layernorm.weight", c.dim),
            WeightSpec(f"{ours}.q", (c.dim, c.dim), head_pairs(0)),
            WeightSpec(f"{ours}.k", (c.dim, c.dim), head_pairs(1)),
            weight(f"{ours}.o", f"{attention}.o_proj.weight", c.dim, c.dim),
            weight(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm.weight", c.dim),
            weight(f"{ours}.up", f"{theirs}.mlp.up_proj.weight", c.hidden_dim, c.dim),
            weight(f"{ours}.gate", f"{theirs}.mlp.gate_proj.weight", c.hidden_dim, c.dim),
            weight(f"{ours}.down", f"{theirs}.mlp.down_proj.weight", c.dim, c.hidden_dim),
        ]
    specs.append(weight("norm", "model.norm.weight", c.dim))
    return specs


def describe(c: ModelConfig, p: ProgramBuilder) -> None:
    """The walk of one token."""
    heads, hidden, filtered = p.heads(), p.split(c.hidden_dim), p.split(c.dim // 2)
    x = p.embed("embed")
    for i in range(c.n_layers):
        w = f"layers.{i}"
        u = p.norm(x, f"{w}.attention_norm")
        (c1,) = p.linear(p.with_previous(u), [f"{w}.conv1"], rows=[filtered], biases=[f"{w}.conv1_bias"])
        c2 = p.sum_linear(u, p.with_previous(c1), f"{w}.conv2", inputs=filtered, taps=2, bias=f"{w}.conv2_bias")
        f = p.norm(c2, f"{w}.filter_norm")
        (v,) = p.linear(u, [f"{w}.v"], rows=[heads])
        q, k = p.linear(f, [f"{w}.q", f"{w}.k"], rows=[heads, heads])
        p.add_linear(x, p.attend(q, k, v, layer=i), f"{w}.o", inputs=heads)
        h = p.norm(x, f"{w}.mlp_norm")
        up, gate = p.linear(h, [f"{w}.up", f"{w}.gate"], rows=[hidden, hidden])
        p.add_linear(x, p.gated(up, gate), f"{w}.down", inputs=hidden)
    p.head(x, "norm", "embed")
