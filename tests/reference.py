"""The models as their papers and published code state them, in numpy: slow, obvious, and what the engine must match.

Nothing here is shared with fourfold's kernels or model files, so that an error has to be made twice to go unseen.
T tokens, H heads, G key/value heads, D head dim, C width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from fourfold.config import LinearScaling, LongRope, ModelConfig, RopeScaling

F64 = NDArray[np.float64]


def forward(
    config: ModelConfig, tensors: Mapping[str, ArrayLike], ids: Sequence[int] | NDArray[Any], rope_angles: str = "f32"
) -> F64:
    """Logits (T, vocab) in float64 of one sequence, from tensors by their Hugging Face names.

    Everything but the rotary angles is computed in float64; `rope_angles` ("f32" or "bf16") says how those are rounded.
    """

    def w(name: str) -> F64:
        return np.asarray(tensors[name]).astype(np.float64)

    block = {"yuan": yuan_layer, "gemma3": gemma3_layer}.get(config.model_type, llama_layer)
    embedding = w("model.embed_tokens.weight")
    x = embedding[np.asarray(ids)] * config.embed_scale  # (T, C)
    for i in range(config.n_layers):
        cos, sin = rotary_tables(config, len(ids), rope_angles, is_local=config.window(i) is not None)
        x = block(config, lambda name, i=i: w(f"model.layers.{i}.{name}"), x, cos, sin, config.window(i))
    x = rms_norm(x, w("model.norm.weight") + (config.model_type == "gemma3"), config.norm_eps)
    return x @ (embedding if config.tie_embeddings else w("lm_head.weight")).T


def llama_layer(config: ModelConfig, w: Any, x: F64, cos: F64, sin: F64, window: int | None) -> F64:
    """Llama, Mistral; Qwen2 where `qkv_bias` is set; Qwen3 with normed heads; Phi-3 with stacked matrices."""
    u = rms_norm(x, w("input_layernorm.weight"), config.norm_eps)
    if config.model_type == "phi3":
        heads = np.cumsum([config.n_heads, config.n_kv_heads]) * config.head_dim
        q, k, v = np.split(u @ w("self_attn.qkv_proj.weight").T, heads, axis=1)
    else:
        q, k, v = (u @ w(f"self_attn.{p}_proj.weight").T for p in "qkv")
    if config.qkv_bias:
        q, k, v = (y + w(f"self_attn.{p}_proj.bias") for y, p in zip((q, k, v), "qkv", strict=True))
    q, k, v = (y.reshape(len(x), -1, config.head_dim) for y in (q, k, v))
    if config.model_type == "qwen3":
        q, k = (rms_norm(y, w(f"self_attn.{p}_norm.weight"), config.norm_eps) for y, p in ((q, "q"), (k, "k")))
    seen = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, window)
    x = x + seen @ w("self_attn.o_proj.weight").T
    u = rms_norm(x, w("post_attention_layernorm.weight"), config.norm_eps)
    if config.model_type == "phi3":
        gate, up = np.split(u @ w("mlp.gate_up_proj.weight").T, 2, axis=1)
    else:
        gate, up = u @ w("mlp.gate_proj.weight").T, u @ w("mlp.up_proj.weight").T
    return x + (silu(gate) * up) @ w("mlp.down_proj.weight").T


def gemma3_layer(config: ModelConfig, w: Any, x: F64, cos: F64, sin: F64, window: int | None) -> F64:
    """Gemma 3: norms before and behind both parts, all of whose weights are kept as differences from 1."""

    def norm(y: F64, name: str) -> F64:
        return rms_norm(y, 1 + w(f"{name}.weight"), config.norm_eps)

    u = norm(x, "input_layernorm")
    q, k, v = ((u @ w(f"self_attn.{p}_proj.weight").T).reshape(len(x), -1, config.head_dim) for p in "qkv")
    q, k = rotate(norm(q, "self_attn.q_norm"), cos, sin), rotate(norm(k, "self_attn.k_norm"), cos, sin)
    seen = attention(q, k, v, window, config.attention_scale)
    x = x + norm(seen @ w("self_attn.o_proj.weight").T, "post_attention_layernorm")
    u = norm(x, "pre_feedforward_layernorm")
    hidden = gelu_tanh(u @ w("mlp.gate_proj.weight").T) * (u @ w("mlp.up_proj.weight").T)
    return x + norm(hidden @ w("mlp.down_proj.weight").T, "post_feedforward_layernorm")


def yuan_layer(config: ModelConfig, w: Any, x: F64, cos: F64, sin: F64, window: int | None) -> F64:
    """Yuan 2.0: a filter over time in front of q and k, whose rows lie interleaved; SiLU on `up_proj`."""
    heads, d = config.n_heads, config.head_dim
    u = rms_norm(x, w("input_layernorm.weight"), config.norm_eps)
    c1 = filter_over_time(u, w("self_attn.lf_gate.conv1.weight"), w("self_attn.lf_gate.conv1.bias"))
    c2 = filter_over_time(c1, w("self_attn.lf_gate.conv2.weight"), w("self_attn.lf_gate.conv2.bias"))
    f = rms_norm(u + c2, w("self_attn.lf_gate.output_layernorm.weight"), config.norm_eps)
    both = np.concatenate([f @ w("self_attn.q_proj.weight").T, f @ w("self_attn.k_proj.weight").T], axis=1)
    q, k = np.split(both.reshape(len(x), heads, 2 * d), 2, axis=2)
    v = (u @ w("self_attn.v_proj.weight").T).reshape(len(x), heads, d)
    x = x + attention(rotate(q, cos, sin), rotate(k, cos, sin), v) @ w("self_attn.o_proj.weight").T
    u = rms_norm(x, w("post_attention_layernorm.weight"), config.norm_eps)
    hidden = silu(u @ w("mlp.up_proj.weight").T) * (u @ w("mlp.gate_proj.weight").T)
    return x + hidden @ w("mlp.down_proj.weight").T


def rms_norm(x: F64, weight: F64, eps: float) -> F64:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x: F64) -> F64:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: F64) -> F64:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def filter_over_time(x: F64, weight: F64, bias: F64) -> F64:
    """y[t] = W[..., 0] x[t-1] + W[..., 1] x[t] + b with x[-1] = 0; weight (N, C, 2, 1)."""
    previous = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
    return previous @ weight[:, :, 0, 0].T + x @ weight[:, :, 1, 0].T + bias


def attention(q: F64, k: F64, v: F64, window: int | None = None, scale: float | None = None) -> F64:
    """Causal softmax attention: q (T, H, D), k and v (T, G, D) -> (T, H·D); query head h reads key head h // (H/G).

    `window`: positions that a token sees, its own the last; `scale`: of the scores, D^-1/2 where there is none.
    """
    t, heads, d = q.shape
    k, v = (np.repeat(y, heads // y.shape[1], axis=1) for y in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) * (d**-0.5 if scale is None else scale)
    back = np.arange(t)[:, None] - np.arange(t)
    scores[:, (back < 0) | (back >= (window or t))] = -np.inf
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", p, v).reshape(t, heads * d)


def rotate(x: F64, cos: F64, sin: F64) -> F64:
    """Rotary embedding of the first R dimensions of x (T, H, D), i paired with i + R/2; cos and sin (T, R/2)."""
    r = cos.shape[-1]
    a, b, rest = np.split(x, [r, 2 * r], axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def rotary_tables(config: ModelConfig, t: int, rope_angles: str, is_local: bool = False) -> tuple[F64, F64]:
    """cos and sin (T, R/2) of positions 0..T-1; frequency i is theta^(-2i/R), in float32.

    "f32": angle = position · frequency in float32.
    "bf16": what the published Yuan code does in a model cast to bfloat16; every step rounds, to nearest even:
        p = bf16(position), w = bf16(frequency), a = bf16(p · w), then bf16(cos a) and bf16(sin a).
    Leaving out any one of the four roundings (the last one least) misses golden/yuan-d128-bf16angles: without it the
    logits are off by 7e-2, without another by 3 to 7, with all of them by 9e-5.
    """
    d, size = config.rotary_dim or config.head_dim, np.float32(1)
    theta, s = config.rope_theta, config.rope_scaling
    if is_local and config.local_rope_theta is not None:
        theta, s = config.local_rope_theta, None
    exponents = np.arange(0, d, 2, dtype=np.float32) / np.float32(d)
    frequencies = np.float32(1) / np.power(np.float32(theta), exponents)
    if isinstance(s, LinearScaling):
        frequencies = frequencies / np.float32(s.factor)
    elif isinstance(s, LongRope):
        factors = s.short if t <= s.original_context else s.long
        frequencies, size = frequencies / np.array(factors, np.float32), np.float32(s.attention_factor)
    elif s:
        frequencies = scaled(frequencies, s)
    positions = np.arange(t, dtype=np.float32)
    if rope_angles == "bf16":
        angles = bf16(np.outer(bf16(positions), bf16(frequencies)))
        cos, sin = bf16(np.cos(angles)), bf16(np.sin(angles))
    else:
        angles = np.outer(positions, frequencies)
        cos, sin = np.cos(angles), np.sin(angles)
    return (cos * size).astype(np.float64), (sin * size).astype(np.float64)


def bf16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to bfloat16, to nearest even, and widened again."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def scaled(frequencies: NDArray[np.float32], s: RopeScaling) -> NDArray[np.float32]:
    """Llama 3's scaling: long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    wavelengths = 2 * np.pi / frequencies
    smooth = (s.original_context / wavelengths - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)
    return ((1 - smooth) * frequencies / s.factor + smooth * frequencies).astype(np.float32)
