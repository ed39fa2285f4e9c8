"""The tiny models whose logits are kept here: every trap of their architectures shows within a text of 90 tokens.

Windows are shorter than the text and end inside pages; heads share keys unevenly, do not fill the width, and can be cut
over four ranks; feed-forwards are ragged.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

import tiny

_COMMON = {
    "vocab_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_PHI3 = _COMMON | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_act": "silu"}
_FACTORS = {"short_factor": np.linspace(1.0, 1.5, 24).tolist(), "long_factor": np.geomspace(1.2, 9.0, 24).tolist()}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": _COMMON
    | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "tie_word_embeddings": True,
    },
    "mistral": _COMMON
    | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 288,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        "sliding_window": 24,
    },
    "phi3": _PHI3
    | {
        "hidden_size": 320,
        "original_max_position_embeddings": 256,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 1.0},
        "sliding_window": 31,
    },
    "phi3-long": _PHI3
    | {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope"} | _FACTORS,
    },
    "gemma3": _COMMON
    | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "query_pre_attn_scalar": 48,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e5, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 1e3, "rope_type": "default"},
        },
        "tie_word_embeddings": True,
    },
}
# Windows in some layers: from the second on, and as `layer_types` has them.
CONFIGS |= {
    "qwen2-windows": _COMMON
    | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
    },
    "qwen3-windows": CONFIGS["qwen3"]
    | {
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 21,
        "max_window_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    },
}
LENGTHS = {"phi3-long": (60, 90)}  # up to 64 tokens the short factors hold, then the long ones


def ids(model: str, length: int) -> list[int]:
    """A text of so many tokens."""
    return np.random.default_rng(len(model)).integers(3, 96, length).tolist()


def texts() -> list[tuple[str, int]]:
    """Each model with each length of text that there are logits of."""
    return [(model, length) for model in CONFIGS for length in LENGTHS.get(model, (90,))]


def logits_file(model: str, length: int) -> Path:
    """An .npz with `logits`, float32 (length, vocabulary), and `weights`, the fingerprint of what made them."""
    return Path(__file__).with_name(f"{model}-{length}.npz")


def weights(model: str) -> tiny.Tensors:
    """Of one of CONFIGS."""
    return tiny.balanced(CONFIGS[model])


def fingerprint(tensors: tiny.Tensors) -> str:
    """SHA-256 of all values, in order."""
    return hashlib.sha256(b"".join(values.tobytes() for values in tensors.values())).hexdigest()
