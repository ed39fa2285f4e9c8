"""Mistral: Llama with a window of positions in every layer (`ModelConfig.sliding_window`), or later without one."""

from fourfold.models.llama import describe, weight_specs

__all__ = ["describe", "weight_specs"]
