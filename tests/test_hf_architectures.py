"""The newer architectures' `config.json`: as published, in old words and in new, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tiny
from fourfold.checkpoint import check_complete, open_source
from fourfold.checkpoint.fourfold_dir import inspect
from fourfold.checkpoint.hf_config import model_config
from fourfold.config import LinearScaling, LongRope, ModelConfig
from fourfold.conversion import cached, convert
from fourfold.engine import Engine
from fourfold.errors import CheckpointError, UnsupportedError, UserError
from fourfold.llm import LLM
from fourfold.models import weight_specs
from fourfold.models.shapes import SHAPES
from goldens import models

Json = dict[str, Any]

# As published, but for keys that say how they were made.
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
PHI3_MINI = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32064,
}  # fmt: skip
PHI3_MINI_128K = PHI3_MINI | {
    "max_position_embeddings": 131072,
    "rope_scaling": {"type": "su", "short_factor": [1.05] * 48, "long_factor": [1, 1.5] * 24},
    "sliding_window": 262144,
}
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
    "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
GEMMA3_27B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "boi_token_index": 255999,
    "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "text_config": {
        "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text",
        "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"},
}  # fmt: skip


def without(config: Json, *keys: str) -> Json:
    return {key: value for key, value in config.items() if key not in keys}


def n_parameters(config: ModelConfig) -> int:
    """Of the tensors that a checkpoint holds."""
    shapes = {name: shape for spec in weight_specs(config) for name, shape in spec.rows.source_shapes().items()}
    return sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize(
    ("raw", "parameters"),
    [
        (QWEN3_06B, 596_049_920),
        (MISTRAL_7B, 7_241_732_096),
        (PHI3_MINI, 3_821_079_552),
        (GEMMA3_1B, 999_885_952),
    ],
    ids=["qwen3-0.6b", "mistral-7b", "phi3-mini", "gemma3-1b"],
)
def test_the_published_models_have_their_size(raw: Json, parameters: int) -> None:
    config = model_config(raw)
    assert n_parameters(config) == parameters
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_known_shapes_are_the_published_ones() -> None:
    for name, raw in (("qwen3-0.6b", QWEN3_06B), ("mistral-7b", MISTRAL_7B), ("phi3-mini", PHI3_MINI)):
        assert SHAPES[name] == model_config(raw)
    assert SHAPES["gemma3-1b"] == model_config(GEMMA3_1B)
    assert SHAPES["gemma3-27b"] == model_config(GEMMA3_27B)


def test_qwen3_has_heads_of_its_own_size() -> None:
    c = model_config(QWEN3_06B)
    assert (c.head_dim, c.n_heads * c.head_dim, c.qkv_bias) == (128, 2 * c.dim, False)
    assert model_config(without(QWEN3_06B, "head_dim")) == c
    newer = without(QWEN3_06B, "rope_theta", "rope_scaling") | {
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "layer_types": ["full_attention"] * 28,
    }  # fmt: skip
    assert model_config(newer) == c


def test_mistrals_window_is_none_where_it_is_null_and_4096_where_nothing_is_said() -> None:
    for change, window in (({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 100}, 100)):
        config = model_config(MISTRAL_7B | change)
        assert [config.window(layer) for layer in (0, 31)] == [window] * 2
    assert model_config(without(MISTRAL_7B, "sliding_window")).sliding_window == 4096
    assert model_config(MISTRAL_7B | {"head_dim": None, "rope_theta": 1e6}).head_dim == 128


def test_phi3s_longer_contexts() -> None:
    short, long = model_config(PHI3_MINI), model_config(PHI3_MINI_128K)
    assert (short.rope_scaling, short.sliding_window, short.rotary_dim) == (None, 2047, None)
    assert long.rope_scaling == LongRope(
        short=(1.05,) * 48, long=(1.0, 1.5) * 24, original_context=4096,
        attention_factor=math.sqrt(1 + math.log(32) / math.log(4096)),
    )  # fmt: skip
    newer = without(PHI3_MINI_128K, "rope_scaling", "rope_theta", "original_max_position_embeddings")
    factors = without(PHI3_MINI_128K["rope_scaling"], "type") | {"rope_type": "longrope", "rope_theta": 10000.0}
    assert model_config(newer | {"rope_parameters": factors | {"partial_rotary_factor": 1.0}}) == long
    mini4 = PHI3_MINI_128K | {"num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75}
    assert model_config(mini4 | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}).rotary_dim == 96


def test_gemma3_in_old_words_and_in_new() -> None:
    old = model_config(GEMMA3_1B)
    assert [old.window(layer) for layer in range(7)] == [512] * 5 + [None, 512]
    assert (old.rope_theta, old.local_rope_theta, old.rope_scaling) == (1e6, 1e4, None)
    assert (old.attention_scale, old.embed_scale, old.eos_ids) == (1 / 16, 34.0, (1, 106))  # sqrt(1152) in bfloat16
    pattern = ["sliding_attention"] * 5 + ["full_attention"]
    new = without(GEMMA3_1B, "rope_local_base_freq", "rope_scaling", "rope_theta", "sliding_window_pattern",
                  "torch_dtype") | {
        "layer_types": (pattern * 5)[:26], "_sliding_window_pattern": 6, "dtype": "bfloat16",
        "use_bidirectional_attention": False,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    }  # fmt: skip
    assert model_config(new) == old
    assert model_config(GEMMA3_1B | {"torch_dtype": "float32"}).embed_scale == float(np.float32(math.sqrt(1152)))
    assert model_config(GEMMA3_1B | {"torch_dtype": "float16"}).embed_scale == float(np.float16(math.sqrt(1152)))


def test_gemma3s_global_layers_may_be_any() -> None:
    kinds = {None: "full_attention", 512: "sliding_attention"}
    for windows in ([None] * 3 + [512] * 23, [512, None, 512, None, None] + [512] * 21, [512] * 26, [None] * 26):
        config = model_config(GEMMA3_1B | {"layer_types": [kinds[window] for window in windows]})
        assert [config.window(layer) for layer in range(26)] == windows
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_gemma3_that_sees_leaves_most_of_its_text_config_out() -> None:
    c = model_config(GEMMA3_27B)
    assert (c.model_type, c.vocab_size, c.rope_scaling, c.max_context) == ("gemma3", 262208, LinearScaling(8.0), 131072)
    assert (c.n_layers, c.sliding_window, c.global_every, c.tie_embeddings) == (62, 1024, 6, True)
    assert (c.attention_scale, c.embed_scale, c.eos_ids) == (168**-0.5, 73.5, (1, 106))


def test_gemma3s_tokens_for_images_are_known_by_their_names_or_as_published() -> None:
    published = (255999, 256000, 262144)
    newer = {"boi_token_id": 255999, "eoi_token_id": 256000, "image_token_id": 262144}
    older = {f"{kind}_token_index" for kind in ("boi", "eoi", "image")}
    for raw in (GEMMA3_27B, without(GEMMA3_27B, *older), without(GEMMA3_27B, *older) | newer):
        assert model_config(raw).image_ids == published
    assert model_config(GEMMA3_27B | {"image_token_index": 7}).image_ids == (7, 255999, 256000)
    assert model_config(GEMMA3_1B).image_ids == ()
    with pytest.raises(CheckpointError, match="boi_token_index and boi_token_id to different tokens"):
        model_config(GEMMA3_27B | {"boi_token_id": 3})


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (QWEN3_06B | {"attention_bias": True}, "attention_bias"),
        (QWEN3_06B | {"layer_types": ["sliding_attention"] * 28}, "layer_types"),
        (QWEN3_06B | {"model_type": "qwen3_moe"}, "'qwen3_moe'"),
        (MISTRAL_7B | {"model_type": "mistral3"}, "'mistral3'"),
        (MISTRAL_7B | {"num_experts": 8}, "num_experts"),
        (MISTRAL_7B | {"partial_rotary_factor": 0.5}, "partial_rotary_factor, which fourfold does not support in mis"),
        (MISTRAL_7B | {"rope_scaling": {"type": "su"}}, "type to 'su'"),
        (PHI3_MINI | {"rope_scaling": {"type": "yarn"}}, "type to 'yarn'"),
        (PHI3_MINI | {"interpolate_factor": 2}, "interpolate_factor"),
        (PHI3_MINI_128K | {"rope_scaling": PHI3_MINI_128K["rope_scaling"] | {"mscale": 2}}, "mscale"),
        (GEMMA3_1B | {"final_logit_softcapping": 30.0}, "final_logit_softcapping: fourfold caps neither"),
        (GEMMA3_1B | {"hidden_activation": "gelu"}, "hidden_activation"),
        (GEMMA3_1B | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3_1B | {"torch_dtype": "float8"}, "dtype to 'float8'"),
        (GEMMA3_1B | {"layer_types": ["chunked_attention"] * 26}, "'chunked_attention' among layer_types"),
        (GEMMA3_1B | {"rope_parameters": {}}, "rope_local_base_freq: rope_parameters is there too"),
        (GEMMA3_27B | {"text_config": GEMMA3_27B["text_config"] | {"a_key": 1}}, "text_config, sets a_key"),
        (GEMMA3_27B | {"audio_config": {}}, "audio_config"),
    ],
)
def test_what_changes_the_result_is_refused_by_name(raw: Json, named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        model_config(raw)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (MISTRAL_7B | {"sliding_window": 0}, "sliding_window to 0"),
        (PHI3_MINI | {"num_attention_heads": 7}, "not a multiple of num_attention_heads"),
        (PHI3_MINI_128K | {"partial_rotary_factor": 0.5}, "48 factors for 24 frequencies"),
        (PHI3_MINI_128K | {"rope_scaling": {"type": "su", "short_factor": [1]}}, "does not say long_factor"),
        (PHI3_MINI_128K | {"rope_scaling": {"type": "su", "short_factor": [0], "long_factor": 1}}, "short_factor to"),
        (PHI3_MINI | {"partial_rotary_factor": 0.001}, "0 of 96 dimensions are to be rotated"),
        (PHI3_MINI | {"partial_rotary_factor": 2}, "192 of 96 dimensions are to be rotated"),
        (PHI3_MINI | {"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "two kinds of scaling"),
        (GEMMA3_27B | {"text_config": 5}, "text_config to 5"),
        (GEMMA3_1B | {"sliding_window": -1}, "sliding_window to -1"),
    ],
)
def test_numbers_that_make_no_model(raw: Json, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        model_config(raw)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_of_a_gemma3_that_sees_what_speaks_is_read(tmp_path: Path, prefix: str) -> None:
    text, weights = models.CONFIGS["gemma3"], models.weights("gemma3")
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text,
              "vision_config": {"model_type": "siglip_vision_model"}, "dtype": "float32"}  # fmt: skip
    sees = "model." if prefix.startswith("model.") else ""
    named = {name.replace("model.", prefix, 1): weight for name, weight in weights.items()}
    named |= {
        f"{sees}vision_tower.vision_model.embeddings.patch_embedding.weight": np.ones((4, 4), np.float32),
        f"{sees}multi_modal_projector.mm_soft_emb_norm.weight": np.ones(4, np.float32),
    }
    logits = []
    for folder, raw, tensors in (("sees", config, named), ("speaks", text, weights)):
        heard: list[str] = []
        with open_source(tiny.write_huggingface(tmp_path / folder, raw, tensors)) as source:
            check_complete(weight_specs(source.config), source)
            convert(source, tmp_path / f"{folder}-f32", "f32", notice=heard.append)
        said = [f"{tmp_path / folder} also sees: 2 tensors of its vision tower and projector are not read, and images"
                " are refused; the text part runs"] if folder == "sees" else []  # fmt: skip
        assert heard == said
        assert inspect(tmp_path / f"{folder}-f32")["recipe"].get("source", "") == "".join(said)
        logits.append(Engine(tmp_path / f"{folder}-f32").logits(models.ids("gemma3", 30)))
    np.testing.assert_array_equal(*logits)
    named["audio_tower.weight"] = np.ones(4, np.float32)
    with open_source(tiny.write_huggingface(tmp_path / "hears", config, named)) as source:
        specs = weight_specs(source.config)
        with pytest.raises(CheckpointError, match=r"holds the tensor audio_tower\.weight"):
            check_complete(specs, source)


def test_images_are_refused_by_a_gemma3_that_could_see_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    config = {"model_type": "gemma3", "text_config": models.CONFIGS["gemma3"], "vision_config": {}, "dtype": "float32",
              "boi_token_index": 93, "eoi_token_index": 94, "image_token_index": 95}  # fmt: skip
    path = tiny.write_huggingface(tmp_path / "model", config, models.weights("gemma3"))
    with LLM(path) as llm:
        assert np.isfinite(llm.logits([5, 6, 92])).all()
        for id in (93, 94, 95):
            for ask in (llm.logits, llm.generate):
                with pytest.raises(UserError, match=f"the token {id}, which stands for an image, .* takes text only"):
                    ask([5, id, 6])


def test_what_is_left_out_is_said_each_time_a_model_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    config = {"model_type": "gemma3", "text_config": models.CONFIGS["gemma3"], "dtype": "float32"}
    weights = models.weights("gemma3") | {"model.vision_tower.x.weight": np.ones(4, np.float32)}
    path = tiny.write_huggingface(tmp_path / "model", config, weights)
    heard: list[str] = []
    for _ in range(2):
        cached(path, notice=heard.append)
    assert len(heard) == 2
    assert heard[0] == heard[1]
    assert "also sees: 1 tensor of its vision tower and projector is not read" in heard[0]


def test_norms_kept_as_differences_in_bfloat16_are_added_in_float32(tmp_path: Path) -> None:
    """As Transformers does: 1 + w of a bfloat16 w would lose most of w where it is added in bfloat16."""
    weights = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in models.weights("gemma3").items()}
    with open_source(tiny.write_huggingface(tmp_path / "source", models.CONFIGS["gemma3"], weights)) as source:
        spec = next(spec for spec in weight_specs(source.config) if spec.name == "norm")
        rows = spec.rows.read(source.tensors, 3, 9)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, 1 + weights["model.norm.weight"][3:9].astype(np.float32))


def test_windows_say_what_is_seen() -> None:
    c = dataclasses.replace(model_config(GEMMA3_1B), sliding_window=4)
    assert [c.seen(0, position) for position in range(6)] == [0, 1, 2, 3, 3, 3]
    assert [c.seen(5, position) for position in range(6)] == [0, 1, 2, 3, 4, 5]
