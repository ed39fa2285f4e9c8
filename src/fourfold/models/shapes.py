"""Shapes of published models by name, for planning and for synthetic weights: no file is needed to ask about one.

Sources: the Yuan 2.0 training scripts (IEIT-Yuan/Yuan-2.0, examples/pretrain_yuan2.0_*.sh), arXiv 2311.15786, table 8;
the published config.json of Llama 2 (7B), Llama 3.1 (8B, 70B), Llama 3.2 (1B, 3B), Qwen2 (0.5B), SmolLM2 (135M,
360M), Qwen3 (0.6B), Mistral (7B v0.1), Phi-3 (mini, 4k) and Gemma 3 (1B, 27B).
llama-3b alone is not as published: it has Llama 2's vocabulary, so that it stays below 3 B and its embedding small.
"""

from __future__ import annotations

from dataclasses import replace

from fourfold.config import LinearScaling, ModelConfig, RopeScaling


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


_GEMMA3_1B = ModelConfig(
    model_type="gemma3",
    vocab_size=262144,
    dim=1152,
    n_layers=26,
    n_heads=4,
    n_kv_heads=1,
    head_dim=256,
    hidden_dim=6912,
    norm_eps=1e-6,
    rope_theta=1e6,
    max_context=32768,
    tie_embeddings=True,
    sliding_window=512,
    global_every=6,
    local_rope_theta=1e4,
    attention_scale=256**-0.5,
    embed_scale=34.0,  # the root of the width in bfloat16
    bos_id=2,
    eos_ids=(1, 106),
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
    "qwen3-0.6b": ModelConfig(
        model_type="qwen3",
        vocab_size=151936,
        dim=1024,
        n_layers=28,
        n_heads=16,
        n_kv_heads=8,
        head_dim=128,
        hidden_dim=3072,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        max_context=40960,
        tie_embeddings=True,
        bos_id=151643,
        eos_ids=(151645,),
    ),
    "mistral-7b": ModelConfig(
        model_type="mistral",
        vocab_size=32000,
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        hidden_dim=14336,
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_context=32768,
        tie_embeddings=False,
        sliding_window=4096,
        bos_id=1,
        eos_ids=(2,),
    ),
    "phi3-mini": ModelConfig(
        model_type="phi3",
        vocab_size=32064,
        dim=3072,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        head_dim=96,
        hidden_dim=8192,
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_context=4096,
        tie_embeddings=False,
        sliding_window=2047,
        bos_id=1,
        eos_ids=(32000,),
    ),
    "gemma3-1b": _GEMMA3_1B,
    "gemma3-27b": replace(
        _GEMMA3_1B,
        vocab_size=262208,
        dim=5376,
        n_layers=62,
        n_heads=32,
        n_kv_heads=16,
        head_dim=128,
        hidden_dim=21504,
        max_context=131072,
        rope_scaling=LinearScaling(8.0),
        sliding_window=1024,
        attention_scale=168**-0.5,
        embed_scale=73.5,
        image_ids=(255999, 256000, 262144),
    ),
    "smollm2-360m": _smollm2(32, 960, 15, 5, 2560),
    "smollm2-135m": _smollm2(30, 576, 9, 3, 1536),
}
