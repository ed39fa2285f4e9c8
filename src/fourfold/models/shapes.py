"""Shapes of published models by name, for planning and for synthetic weights: no file is needed to ask about one.

Sources: the Yuan 2.0 training scripts (IEIT-Yuan/Yuan-2.0, examples/pretrain_yuan2.0_*.sh), arXiv 2311.15786, table 8;
the published config.json of Llama 2 (7B), Llama 3.1 (8B, 70B), Llama 3.2 (1B, 3B), Qwen2 (0.5B) and SmolLM2 (135M,
360M).
llama-3b alone is not as published: it has Llama 2's vocabulary, so that it stays below 3 B and its embedding small.
"""

from __future__ import annotations

from dataclasses import replace

from fourfold.config import ModelConfig, RopeScaling


def _yuan(n_layers: int, dim: int, n_heads: int, max_context: int) -> ModelConfig:
    return ModelConfig(
        model_type="yuan",
        vocab_size=135040,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=dim // n_heads,
        hidden_dim=4 * dim,
        norm_eps=1e-6,
        rope_theta=10000.0,
        max_context=max_context,
        tie_embeddings=True,
        eos_ids=(77185,),
    )


def _llama3(
    n_layers: int, dim: int, n_heads: int, head_dim: int, hidden_dim: int, scale: float, tie_embeddings: bool
) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        vocab_size=128256,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=8,
        head_dim=head_dim,
        hidden_dim=hidden_dim,
        norm_eps=1e-5,
        rope_theta=500000.0,
        max_context=131072,
        tie_embeddings=tie_embeddings,
        rope_scaling=RopeScaling(scale, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
        bos_id=128000,
        eos_ids=(128001,),
    )


def _smollm2(n_layers: int, dim: int, n_heads: int, n_kv_heads: int, hidden_dim: int) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        vocab_size=49152,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=64,
        hidden_dim=hidden_dim,
        norm_eps=1e-5,
        rope_theta=100000.0,
        max_context=8192,
        tie_embeddings=True,
        bos_id=1,
        eos_ids=(2,),
    )


SHAPES: dict[str, ModelConfig] = {
    "yuan2-102b": _yuan(84, 8192, 64, 4096),
    "yuan2-51b": _yuan(42, 8192, 64, 4096),
    "yuan2-2b": _yuan(24, 2048, 32, 8192),
    "llama-70b": _llama3(80, 8192, 64, 128, 28672, 8.0, tie_embeddings=False),
    "llama-8b": _llama3(32, 4096, 32, 128, 14336, 8.0, tie_embeddings=False),
    "llama-7b": ModelConfig(
        model_type="llama",
        vocab_size=32000,
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        head_dim=128,
        hidden_dim=11008,
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_context=4096,
        tie_embeddings=False,
        bos_id=1,
        eos_ids=(2,),
    ),
    "llama-3b": replace(
        _llama3(28, 3072, 24, 128, 8192, 32.0, tie_embeddings=True), vocab_size=32000, bos_id=1, eos_ids=(2,)
    ),
    "llama-1b": _llama3(16, 2048, 32, 64, 8192, 32.0, tie_embeddings=True),
    "qwen2-0.5b": ModelConfig(
        model_type="qwen2",
        vocab_size=151936,
        dim=896,
        n_layers=24,
        n_heads=14,
        n_kv_heads=2,
        head_dim=64,
        hidden_dim=4864,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        max_context=32768,
        tie_embeddings=True,
        qkv_bias=True,
        bos_id=151643,
        eos_ids=(151643,),
    ),
    "smollm2-360m": _smollm2(32, 960, 15, 5, 2560),
    "smollm2-135m": _smollm2(30, 576, 9, 3, 1536),
}
