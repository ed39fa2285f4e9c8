"""One file per `model_type`; this registry is the only place that lists them."""

from __future__ import annotations

from importlib import import_module

from fourfold.config import ModelConfig
from fourfold.errors import UnsupportedError
from fourfold.models.spec import Architecture, WeightSpec

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3", "yuan")

__all__ = ["MODEL_TYPES", "Architecture", "WeightSpec", "architecture", "weight_specs"]


def architecture(model_type: str) -> Architecture:
    """The description of a model type. Raises UnsupportedError for an unknown one."""
    if model_type not in MODEL_TYPES:
        raise UnsupportedError(f"architecture {model_type!r} is not supported; fourfold runs {', '.join(MODEL_TYPES)}")
    module: Architecture = import_module(f"fourfold.models.{model_type}")
    return module


def weight_specs(config: ModelConfig) -> list[WeightSpec]:
    """Every weight of a model, in the order in which a step reads them."""
    return architecture(config.model_type).weight_specs(config)
