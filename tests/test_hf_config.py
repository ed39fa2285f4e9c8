"""`config.json`: what is read, what is harmless, and what is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import tiny
from fourfold.checkpoint.hf_config import model_config
from fourfold.config import ModelConfig, RopeScaling
from fourfold.errors import CheckpointError, UnsupportedError
from fourfold.models import weight_specs

# The keys of the published configs: the 102B's own could not be read, and has its scripts' sizes under the 51B's keys.
YUAN_102B = {
    "architectures": ["YuanForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_yuan.YuanConfig"},
    "model_type": "yuan",
    "vocab_size": 135040,
    "hidden_size": 8192,
    "intermediate_size": 32768,
    "num_hidden_layers": 84,
    "num_attention_heads": 64,
    "max_position_embeddings": 4096,
    "model_max_length": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "causal_mask": True,
    "use_flash_attention": True,
    "reset_attention_mask": True,
    "reset_position_ids": True,
    "use_loss_mask": False,
    "dropout": 0.1,
    "eod_token": 77185,
    "sep_token": 77187,
    "sep_token_id": 77185,
    "eod_token_id": 77185,
    "eos_token_id": 77185,
    "bos_token_id": 77185,
    "pad_token_id": 77185,
    "mask_token_id": 77185,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.30.2",
    "use_cache": True,
}
YUAN_51B = YUAN_102B | {"num_hidden_layers": 42}  # does not say tie_word_embeddings
YUAN_2B = YUAN_102B | {
    "_from_model_config": True,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "max_position_embeddings": 8192,
    "model_max_length": 8192,
    "tie_word_embeddings": True,
    "tokenizer_class": "YuanTokenizer",
    "use_flash_attention": False,
}
M32 = YUAN_2B | {
    "num_attention_heads": 16,
    "attention_projection_size": 4096,
    "moe_config": {"moe_num_experts": 32, "moe_top_k": 2, "ffn_hidden_size": 8192, "gated_linear_unit": True},
    "use_moe": True,
    "rotary_percent": 0.5,
}
YUAN_3 = M32 | {"vocab_size": 136064, "tie_word_embeddings": False, "rotary_base": 1000000, "use_rope_scaling": False}
YUAN_3_VISION = {
    "architectures": ["YuanVLChatModel"],
    "model_type": "yuanvl",
    "llm_config": YUAN_3,
    "vision_config": {"model_type": "intern_vit_6b"},
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_yuan_infers_what_its_config_leaves_out() -> None:
    assert model_config(YUAN_102B) == ModelConfig(
        model_type="yuan",
        vocab_size=135040,
        dim=8192,
        n_layers=84,
        n_heads=64,
        n_kv_heads=64,
        head_dim=128,
        hidden_dim=32768,
        norm_eps=1e-6,
        rope_theta=10000.0,
        max_context=4096,
        tie_embeddings=True,
        eos_ids=(77185,),
    )


@pytest.mark.parametrize(
    ("raw", "layers", "dim", "heads", "hidden", "context", "parameters", "n_tensors"),
    [
        (YUAN_2B, 24, 2048, 32, 8192, 8192, 2_088_724_480, 338),
        (YUAN_51B, 42, 8192, 64, 32768, 4096, 51_842_105_344, 590),
        (YUAN_102B, 84, 8192, 64, 32768, 4096, 102_577_954_816, 1178),
    ],
)
def test_the_published_yuan_models_have_their_size(
    raw: dict[str, Any], layers: int, dim: int, heads: int, hidden: int, context: int, parameters: int, n_tensors: int
) -> None:
    c = model_config(raw)
    assert (c.n_layers, c.dim, c.n_heads, c.head_dim) == (layers, dim, heads, dim // heads)
    assert (c.hidden_dim, c.max_context, c.vocab_size) == (hidden, context, 135040)
    assert (c.norm_eps, c.rope_theta, c.tie_embeddings, c.eos_ids) == (1e-6, 10000.0, True, (77185,))
    shapes = {name: shape for spec in weight_specs(c) for name, shape in spec.rows.source_shapes().items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    assert len(shapes) == n_tensors


def test_llama_with_every_harmless_habit() -> None:
    habits = {
        "_name_or_path": "/home/someone/model",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "is_llama_config": True,
        "mlp_bias": False,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "quantization_config": None,
        "rope_interleaved": False,
        "rope_scaling": None,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "transformers_version": "4.42.3",
        "use_cache": True,
    }
    assert model_config(tiny.CONFIG | habits) == model_config(tiny.CONFIG)


def test_qwen2_has_biases_and_may_mention_a_window_it_does_not_use() -> None:
    window = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}
    config = model_config(tiny.QWEN2 | window | {"layer_types": ["full_attention"] * 2})
    assert config.qkv_bias
    assert not config.tie_embeddings
    assert config.eos_ids == (257,)


def test_both_spellings_of_rope_say_the_same() -> None:
    old = model_config(tiny.CONFIG | {"rope_theta": 5e5, "rope_scaling": LLAMA3})
    new = model_config(without(tiny.CONFIG, "rope_theta") | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}})
    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert model_config(without(tiny.CONFIG, "rope_theta") | plain) == model_config(tiny.CONFIG)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mamba"}, "'mamba'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act to 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type to 'yarn'"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "rope_type to 'longrope'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type to 'dynamic'"),
        ({"rope_scaling": LLAMA3 | {"attention_factor": 2}}, "attention_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"a_key_of_tomorrow": 1}, "a_key_of_tomorrow"),
    ],
)
def test_llama_refuses_by_name_what_changes_the_result(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        model_config(tiny.CONFIG | change)


def test_qwen2_has_windows_where_it_uses_them() -> None:
    def windows(**changes: Any) -> list[int | None]:
        config = model_config(tiny.QWEN2 | {"num_hidden_layers": 4, "use_sliding_window": True} | changes)
        return [config.window(layer) for layer in range(4)]

    local, full = "sliding_attention", "full_attention"
    assert windows(sliding_window=64, max_window_layers=3) == [None, None, None, 64]
    assert windows(sliding_window=64, max_window_layers=0) == [64] * 4
    assert windows(max_window_layers=2) == [None, None, 4096, 4096]
    for nowhere in ({}, {"sliding_window": 64, "max_window_layers": 4}, {"sliding_window": None}):
        assert windows(**nowhere) == [None] * 4
    assert windows(sliding_window=64, layer_types=[local, full, local, full]) == [64, None, 64, None]
    assert windows(sliding_window=64, max_window_layers=0, layer_types=[full] * 4) == [None] * 4


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"use_sliding_window": False, "layer_types": ["sliding_attention"] * 2}, UnsupportedError, "layer_types to"),
        ({"sliding_window": None, "layer_types": ["sliding_attention"] * 2}, UnsupportedError, "layer_types to other"),
        ({"layer_types": ["chunked_attention"] * 2}, UnsupportedError, "'chunked_attention' among layer_types"),
        ({"layer_types": ["full_attention"] * 3}, CheckpointError, "layer_types to 3 kinds for 2 layers"),
        ({"sliding_window": 0}, CheckpointError, "sliding_window to 0"),
        ({"max_window_layers": -1}, CheckpointError, "max_window_layers to -1"),
        ({"use_sliding_window": 1}, CheckpointError, "use_sliding_window to 1"),
    ],
)
def test_qwen2_refuses_windows_that_are_none(change: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        model_config(tiny.QWEN2 | {"use_sliding_window": True} | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_projection_size": 4096}, "attention_projection_size.*for now"),
        ({"moe_config": {"moe_num_experts": 32}}, "moe_config.*for now"),
        ({"rope_theta": 1e6}, "rope_theta"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"causal_mask": False}, "causal_mask"),
    ],
)
def test_yuan_refuses_its_later_families_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        model_config(YUAN_102B | change)


@pytest.mark.parametrize("raw", [M32, M32 | {"quantization_config": {"bits": 4}}, YUAN_3, YUAN_3_VISION])
def test_the_later_families_are_told_from_their_configs(raw: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"it belongs to Yuan2-M32 and Yuan 3\.0, and for now fourfold runs the"):
        model_config(raw)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, [8], 2**31, 10**400])
def test_sizes_are_positive_integers(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{key}.*must be an integer from 1"):
        model_config(tiny.CONFIG | {key: value})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": 2_000_000, "hidden_size": 1_000_000}, r"the embedding would have 2000000000000 elements"),
        ({"intermediate_size": 2**31 - 1, "hidden_size": 2**20}, r"a feed-forward matrix"),
        ({"num_hidden_layers": 100_000}, "100000 layers"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"head_dim": 15}, "even head dimension"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ({"eos_token_id": 300}, "token 300 lies outside the vocabulary of 300"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": without(LLAMA3, "factor")}, "rope_scaling.*factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": {"rope_theta": 2.0}}, "rope_theta twice"),
    ],
)
def test_numbers_that_make_no_model(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        model_config(tiny.CONFIG | change)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "model_type"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"does not say {key}"):
        model_config(without(tiny.CONFIG, key))


def test_a_key_that_would_write_on_the_terminal() -> None:
    with pytest.raises(CheckpointError, match="cannot be printed"):
        model_config(tiny.CONFIG | {"\x1b[2J": 1})


def test_goldens(shared: Path) -> None:
    for name in ("golden/yuan-d64", "golden/yuan-d128-bf16angles", "stories15M", "stories260K"):
        raw = json.loads((shared / name / "config.json").read_text())
        config = model_config(raw)
        assert config.dim == raw["hidden_size"]
        assert config.head_dim == raw["hidden_size"] // raw["num_attention_heads"]
        assert config.eos_ids == (raw["eos_token_id"],)
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
