"""Qwen2: Llama with biases on q, k and v (`ModelConfig.qkv_bias`)."""

from fourfold.models.llama import describe, weight_specs

__all__ = ["describe", "weight_specs"]
