"""Hugging Face's `config.json` as a `ModelConfig`: the only reader of that file.

Every key is read, known to be harmless, or refused by name. A key is harmless where it cannot change the logits of one
sequence: what concerns training, saving, loading, sampling defaults, or special tokens that only a tokenizer needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from fourfold.checkpoint.fields import Fields, check
from fourfold.checkpoint.hf_rope import Rope, rope, scaling
from fourfold.config import ModelConfig
from fourfold.errors import CheckpointError, UnsupportedError

_HARMLESS = {
    "how it was made, saved and loaded": """
        _name_or_path _model_name_or_path _from_model_config _commit_hash _attn_implementation
        _attn_implementation_autoset _flash_attn_2_enabled attn_implementation auto_map torch_dtype dtype
        transformers_version transformers.js_config is_llama_config unsloth_version unsloth_fixed model_max_length
        keys_to_ignore_at_inference torchscript use_bfloat16 use_cache output_attentions output_hidden_states
        return_dict return_dict_in_generate output_scores is_decoder""",
    "training": """
        initializer_range attention_dropout hidden_dropout resid_dropout embd_dropout resid_pdrop embd_pdrop dropout
        attn_dropout attention_probs_dropout_prob hidden_dropout_prob gradient_checkpointing use_loss_mask
        neftune_noise_alpha""",
    "special tokens, which the tokenizer owns": """
        pad_token_id sep_token_id mask_token_id unk_token_id cls_token_id eod_token_id decoder_start_token_id sep_token
        forced_bos_token_id forced_eos_token_id tokenizer_class""",
    "heads of other kinds of model": "id2label label2id problem_type finetuning_task task_specific_params",
    "sampling, which is the caller's to choose": """
        do_sample temperature top_k top_p typical_p min_length max_length max_new_tokens repetition_penalty
        length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_beams num_beam_groups
        num_return_sequences diversity_penalty early_stopping exponential_decay_length_penalty
        remove_invalid_values begin_suppress_tokens suppress_tokens bad_words_ids""",
}
_YUAN_LATER = """
    attention_projection_size use_moe moe_config num_experts num_local_experts num_experts_per_tok router_type
    per_layer_experts_blocks rotary_percent output_router_logits num_key_value_heads head_dim rope_scaling
    rotary_base use_yarn use_rope_scaling use_lfa_bias llm_config vision_config"""
_GEMMA3_IMAGE_IDS = {"boi": 255999, "eoi": 256000, "image": 262144}  # where a file is silent
LATER_FAMILIES = "it belongs to Yuan2-M32 and Yuan 3.0, and for now fourfold runs the dense Yuan 2.0 models only"


def model_config(config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The model that a parsed `config.json` describes; `where` names the file in messages.

    Raises UnsupportedError, naming the key, for an architecture or an option that fourfold does not run, and
    CheckpointError for a missing key, a value of the wrong type, or numbers that make no model.
    """
    f = Fields(config, where)
    model_type = f.text("model_type")
    if model_type.startswith("yuan"):
        f.refuse(_YUAN_LATER.split(), LATER_FAMILIES)
    f.refuse(
        {"quantization_config"},
        "only the shape is asked for here; remove the key, or convert the checkpoint and give that",
    )
    if model_type not in _READERS:
        raise UnsupportedError(
            f"{where}: architecture {model_type!r} is not supported; fourfold runs {', '.join(_READERS)}"
        )
    reader, class_name = _READERS[model_type]
    f.only("architectures", [class_name])
    f.only("hidden_act", *([] if model_type.startswith("gemma3") else ["silu"]))
    _decodes_alone(f)
    result = reader(f)
    f.finish(_harmless())
    return check(result, where)


def _decodes_alone(f: Fields) -> None:
    for key in ("is_encoder_decoder", "tie_encoder_decoder", "add_cross_attention", "chunk_size_feed_forward"):
        f.only(key, False)


def _harmless() -> list[str]:
    return [key for keys in _HARMLESS.values() for key in keys.split()]


def _llama(f: Fields) -> ModelConfig:
    for key in ("attention_bias", "mlp_bias", "rope_interleaved"):
        f.only(key, False)
    f.only("pretraining_tp", 1)
    _all_global(f)
    return _llama_like(f, "llama", n_kv_heads=f.size("num_attention_heads"), max_context=2048, eps=1e-6)


def _qwen2(f: Fields) -> ModelConfig:
    return _windows(f, replace(_llama_like(f, "qwen2"), qkv_bias=True))


def _qwen3(f: Fields) -> ModelConfig:
    f.only("attention_bias", False)
    return _windows(f, _llama_like(f, "qwen3", head_dim=128))


def _windows(f: Fields, c: ModelConfig) -> ModelConfig:
    """Qwen's, where they are used: in the layers from `max_window_layers` on, or in those that `layer_types` names."""
    if not f.flag("use_sliding_window", False) or f.is_null("sliding_window"):
        f.ignore("sliding_window", "max_window_layers")  # without effect
        _all_global(f)
        return c
    window = f.size("sliding_window", 4096)
    first = 0 if f.equals("max_window_layers", 0) else f.size("max_window_layers", 28)
    global_layers = tuple(range(min(first, c.n_layers)))
    if "layer_types" in f:
        global_layers = _global_layers(f, c.n_layers)
    return c if len(global_layers) == c.n_layers else replace(c, sliding_window=window, global_layers=global_layers)


def _global_layers(f: Fields, n_layers: int) -> tuple[int, ...]:
    """The layers that `layer_types` says see all positions; the others have a window."""
    types = f.many("layer_types", str)
    if len(types) != n_layers:
        raise CheckpointError(f"{f.where} sets layer_types to {len(types)} kinds for {n_layers} layers")
    for unknown in set(types) - {"full_attention", "sliding_attention"}:
        raise UnsupportedError(
            f"{f.where} has {unknown[:80]!r} among layer_types; fourfold knows full_attention and sliding_attention"
        )
    return tuple(i for i, kind in enumerate(types) if kind == "full_attention")


def _all_global(f: Fields) -> None:
    if "layer_types" in f and set(f.many("layer_types", str)) != {"full_attention"}:
        raise UnsupportedError(
            f"{f.where} sets layer_types to other than full_attention, and no window that fourfold knows of in such a"
            " model"
        )


def _mistral(f: Fields) -> ModelConfig:
    _all_global(f)
    config = _llama_like(f, "mistral", n_kv_heads=8, max_context=131072, eps=1e-6)
    window = None if f.is_null("sliding_window") else f.size("sliding_window", 4096)
    return replace(config, sliding_window=window)


def _phi3(f: Fields) -> ModelConfig:
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        f.only(key, False)
    for key in ("full_attn_mod", "interpolate_factor"):  # of Phi-4-mini, where they change nothing
        f.only(key, 1)
    _all_global(f)
    long_context = f.size("original_max_position_embeddings", 4096)
    n_heads = f.size("num_attention_heads")
    config = _llama_like(f, "phi3", n_kv_heads=n_heads, max_context=4096, eps=1e-5, long_context=long_context)
    return replace(config, sliding_window=f.size("sliding_window") if "sliding_window" in f else None)


def _llama_like(
    f: Fields,
    model_type: str,
    *,
    n_kv_heads: int | None = None,
    head_dim: int | None = None,
    max_context: int | None = None,
    eps: float | None = None,
    long_context: int | None = None,
) -> ModelConfig:
    """What Llama and its kin share; the keywords are what the published classes assume where the file is silent.

    `long_context`: the positions after which LongRope's second factors hold, for an architecture that may have them and
    rotate a part of each head alone.
    """
    n_heads, dim = f.size("num_attention_heads"), f.size("hidden_size")
    head_dim = f.size("head_dim", head_dim or _head_dim(f, dim, n_heads))
    turns = rope(f, long_context=long_context)
    if turns.partial != 1 and long_context is None:
        raise UnsupportedError(f"{f.where} sets partial_rotary_factor, which fourfold does not support in {model_type}")
    return ModelConfig(
        model_type=model_type,
        vocab_size=f.size("vocab_size"),
        dim=dim,
        n_layers=f.size("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=f.size("num_key_value_heads", n_kv_heads),
        head_dim=head_dim,
        hidden_dim=f.size("intermediate_size"),
        norm_eps=f.real("rms_norm_eps", eps),
        rope_theta=turns.theta,
        max_context=f.size("max_position_embeddings", max_context),
        tie_embeddings=f.flag("tie_word_embeddings", False),
        rope_scaling=turns.scaling,
        rotary_dim=None if turns.partial == 1 else int(head_dim * turns.partial),
        bos_id=next(iter(f.ids("bos_token_id")), None),
        eos_ids=f.ids("eos_token_id"),
    )


def _gemma3(f: Fields) -> ModelConfig:
    """The text part of a model that also sees. Its images are nothing that fourfold takes, and so are their tokens."""
    text = f.fields("text_config")
    text.only("model_type", "gemma3_text")
    text.only("architectures", ["Gemma3ForCausalLM"], ["Gemma3TextModel"])
    _decodes_alone(text)
    f.only("tie_word_embeddings", text.flag("tie_word_embeddings", True))
    f.ignore("vision_config", "mm_tokens_per_image")
    dtype = f.text("dtype", f.text("torch_dtype", ""))
    config = _gemma3_text(text, dtype)
    text.finish(_harmless())
    image_ids = [_image_id(f, kind, default) for kind, default in _GEMMA3_IMAGE_IDS.items()]
    return replace(
        config,
        eos_ids=f.ids("eos_token_id") or config.eos_ids,
        image_ids=tuple(sorted({i for i in image_ids if i < config.vocab_size})),
    )


def _image_id(f: Fields, kind: str, default: int) -> int:
    """Which has one name in older files and another in newer ones."""
    found = [i for name in ("index", "id") for i in f.ids(f"{kind}_token_{name}")]
    if len(set(found)) > 1:
        raise CheckpointError(f"{f.where} sets {kind}_token_index and {kind}_token_id to different tokens")
    return found[0] if found else default


def _gemma3_text(f: Fields, dtype: str = "") -> ModelConfig:
    """What a file leaves out is as Transformers' Gemma3TextConfig has it."""
    f.only("hidden_activation", "gelu_pytorch_tanh")
    for key in ("attention_bias", "use_bidirectional_attention"):
        f.only(key, False)
    f.refuse(("attn_logit_softcapping", "final_logit_softcapping"), "fourfold caps neither scores nor logits")
    f.ignore("cache_implementation")  # where Transformers keeps keys and values
    n_layers, dim, head_dim = f.size("num_hidden_layers", 26), f.size("hidden_size", 2304), f.size("head_dim", 256)
    window, (global_every, global_layers) = f.size("sliding_window", 4096), _gemma3_globals(f, n_layers)
    turns, local_theta = _gemma3_ropes(f)
    dtype = f.text("dtype", f.text("torch_dtype", dtype or "float32"))
    return ModelConfig(
        model_type="gemma3",
        vocab_size=f.size("vocab_size", 262208),
        dim=dim,
        n_layers=n_layers,
        n_heads=f.size("num_attention_heads", 8),
        n_kv_heads=f.size("num_key_value_heads", 4),
        head_dim=head_dim,
        hidden_dim=f.size("intermediate_size", 9216),
        norm_eps=f.real("rms_norm_eps", 1e-6),
        rope_theta=turns.theta,
        max_context=f.size("max_position_embeddings", 131072),
        tie_embeddings=f.flag("tie_word_embeddings", True),
        rope_scaling=turns.scaling,
        sliding_window=None if global_every == 1 else window,
        global_every=global_every,
        global_layers=global_layers,
        local_rope_theta=local_theta,
        attention_scale=f.real("query_pre_attn_scalar", 256) ** -0.5,
        embed_scale=_rounded(dim**0.5, dtype, f.where),
        bos_id=next(iter(f.ids("bos_token_id")), 2),
        eos_ids=f.ids("eos_token_id") or (1,),
    )


def _gemma3_globals(f: Fields, n_layers: int) -> tuple[int, tuple[int, ...]]:
    """Every so many layers one sees all positions (1: all do; 0: none does), and which others do besides."""
    every = f.size("sliding_window_pattern", f.size("_sliding_window_pattern", 6))
    if "layer_types" not in f:
        return every, ()
    found = _global_layers(f, n_layers)
    every = found[0] + 1 if found else 0
    return (every, ()) if not every or found == tuple(range(every - 1, n_layers, every)) else (0, found)


def _gemma3_ropes(f: Fields) -> tuple[Rope, float]:
    """Of global layers, and the base of local ones: in the newer files each has its own `rope_parameters`."""
    if "rope_parameters" not in f:
        local_theta = f.real("rope_local_base_freq", 10000.0)
        return Rope(f.real("rope_theta", 1e6), scaling(f, f.fields("rope_scaling")), 1.0), local_theta
    f.refuse(("rope_theta", "rope_local_base_freq", "rope_scaling"), "rope_parameters is there too")
    both = f.fields("rope_parameters")
    of_all, of_local = both.fields("full_attention"), both.fields("sliding_attention")
    both.finish()
    of_local.only("rope_type", "default")
    thetas = of_all.real("rope_theta", 1e6), of_local.real("rope_theta", 10000.0)
    of_local.finish()
    return Rope(thetas[0], scaling(f, of_all), 1.0), thetas[1]


def _rounded(x: float, dtype: str, where: str) -> float:
    """As Transformers has it, which keeps this factor in the type of the model's weights."""
    types = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    if dtype not in types:
        raise UnsupportedError(f"{where} sets dtype to {dtype!r}; fourfold knows {', '.join(types)}")
    return float(types[dtype](x))


def _yuan(f: Fields) -> ModelConfig:
    f.only("tie_word_embeddings", True)  # a copy may be stored as lm_head; the published models tie
    f.only("causal_mask", True)
    f.only("rope_theta", 10000)
    f.ignore("use_flash_attention")  # another way to the same sums
    # These two matter only where several documents share a sequence: positions stay 0..T-1 in the published code either
    # way, and the mask is cut only after an end-of-document token inside the prompt.
    f.ignore("reset_attention_mask", "reset_position_ids")
    f.ignore("bos_token_id")  # the model was trained without one
    n_heads, dim = f.size("num_attention_heads"), f.size("hidden_size")
    if dim % 2:
        raise CheckpointError(f"{f.where} sets hidden_size to {dim}; Yuan's filter halves it, so it must be even")
    eos = f.ids("eos_token_id")
    return ModelConfig(
        model_type="yuan",
        vocab_size=f.size("vocab_size"),
        dim=dim,
        n_layers=f.size("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=_head_dim(f, dim, n_heads),
        hidden_dim=f.size("intermediate_size"),
        norm_eps=f.real("rms_norm_eps", 1e-6),
        rope_theta=10000.0,
        max_context=f.size("max_position_embeddings"),
        tie_embeddings=True,
        eos_ids=f.ids("eod_token") or eos,
    )


def _head_dim(f: Fields, dim: int, n_heads: int) -> int:
    if "head_dim" not in f and dim % n_heads:
        raise CheckpointError(f"{f.where}: hidden_size {dim} is not a multiple of num_attention_heads {n_heads}")
    return dim // n_heads or 1


_READERS: dict[str, tuple[Callable[[Fields], ModelConfig], str]] = {
    "llama": (_llama, "LlamaForCausalLM"),
    "mistral": (_mistral, "MistralForCausalLM"),
    "qwen2": (_qwen2, "Qwen2ForCausalLM"),
    "qwen3": (_qwen3, "Qwen3ForCausalLM"),
    "phi3": (_phi3, "Phi3ForCausalLM"),
    "gemma3_text": (_gemma3_text, "Gemma3ForCausalLM"),
    "gemma3": (_gemma3, "Gemma3ForConditionalGeneration"),
    "yuan": (_yuan, "YuanForCausalLM"),
}
