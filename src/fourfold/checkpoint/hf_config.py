"""Hugging Face's `config.json` as a `ModelConfig`: the only reader of that file.

Every key is read, known to be harmless, or refused by name. A key is harmless where it cannot change the logits of one
sequence: what concerns training, saving, loading, sampling defaults, or special tokens that only a tokenizer needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fourfold.checkpoint.fields import Fields, check
from fourfold.config import ModelConfig, RopeScaling
from fourfold.errors import CheckpointError, UnsupportedError

_HARMLESS = {
    "how it was made, saved and loaded": """
        _name_or_path _from_model_config _commit_hash _attn_implementation _attn_implementation_autoset
        _flash_attn_2_enabled attn_implementation auto_map torch_dtype dtype transformers_version transformers.js_config
        is_llama_config unsloth_version unsloth_fixed model_max_length keys_to_ignore_at_inference torchscript
        use_bfloat16 use_cache output_attentions output_hidden_states return_dict return_dict_in_generate
        output_scores is_decoder""",
    "training": """
        initializer_range attention_dropout hidden_dropout resid_dropout embd_dropout dropout attn_dropout
        attention_probs_dropout_prob hidden_dropout_prob gradient_checkpointing use_loss_mask neftune_noise_alpha""",
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
    f.refuse({"quantization_config"}, "this asks for the shape alone; convert the checkpoint, and give the result")
    if model_type not in _READERS:
        raise UnsupportedError(
            f"{where}: architecture {model_type!r} is not supported; fourfold runs {', '.join(_READERS)}"
        )
    reader, class_name = _READERS[model_type]
    f.only("architectures", [class_name])
    f.only("hidden_act", "silu")
    for key in ("is_encoder_decoder", "tie_encoder_decoder", "add_cross_attention", "chunk_size_feed_forward"):
        f.only(key, False)
    result = reader(f)
    f.finish(key for keys in _HARMLESS.values() for key in keys.split())
    return check(result, where)


def _llama(f: Fields) -> ModelConfig:
    for key in ("attention_bias", "mlp_bias", "rope_interleaved"):
        f.only(key, False)
    f.only("pretraining_tp", 1)
    return _llama_like(f, "llama", n_kv_heads=f.size("num_attention_heads"), max_context=2048, eps=1e-6)


def _qwen2(f: Fields) -> ModelConfig:
    f.only("use_sliding_window", False)
    f.ignore("sliding_window", "max_window_layers")  # without effect unless the window is used
    return _llama_like(f, "qwen2", qkv_bias=True)


def _llama_like(
    f: Fields,
    model_type: str,
    *,
    qkv_bias: bool = False,
    n_kv_heads: int | None = None,
    max_context: int | None = None,
    eps: float | None = None,
) -> ModelConfig:
    """What Llama and Qwen2 share; the keywords are what the published classes assume where the file is silent."""
    if "layer_types" in f and set(f.many("layer_types", str)) != {"full_attention"}:
        raise UnsupportedError(
            f"{f.where} sets layer_types to other than full_attention, which fourfold does not support"
        )
    n_heads, dim = f.size("num_attention_heads"), f.size("hidden_size")
    theta, scaling = _rope(f)
    return ModelConfig(
        model_type=model_type,
        vocab_size=f.size("vocab_size"),
        dim=dim,
        n_layers=f.size("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=f.size("num_key_value_heads", n_kv_heads),
        head_dim=f.size("head_dim", _head_dim(f, dim, n_heads)),
        hidden_dim=f.size("intermediate_size"),
        norm_eps=f.real("rms_norm_eps", eps),
        rope_theta=theta,
        max_context=f.size("max_position_embeddings", max_context),
        tie_embeddings=f.flag("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        rope_scaling=scaling,
        bos_id=next(iter(f.ids("bos_token_id")), None),
        eos_ids=f.ids("eos_token_id"),
    )


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


def _rope(f: Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling: `rope_theta` with `rope_scaling`, or `rope_parameters`, which is the newer name of both."""
    f.only("partial_rotary_factor", 1)
    if "rope_scaling" in f and "rope_parameters" in f:
        raise CheckpointError(f"{f.where} sets both rope_scaling and rope_parameters; only one of them can hold")
    r = f.fields("rope_parameters" if "rope_parameters" in f else "rope_scaling")
    if "rope_theta" in f and "rope_theta" in r and f.real("rope_theta") != r.real("rope_theta"):
        raise CheckpointError(f"{f.where} sets rope_theta twice, to different values")
    theta = r.real("rope_theta", f.real("rope_theta", 10000.0))
    r.only("partial_rotary_factor", 1)
    for key in ("rope_type", "type"):
        r.only(key, "default", "llama3")
    scaling = None
    if "llama3" in (r.text("rope_type", "default"), r.text("type", "default")):
        scaling = RopeScaling(
            factor=r.real("factor"),
            low_freq_factor=r.real("low_freq_factor"),
            high_freq_factor=r.real("high_freq_factor"),
            original_context=r.size("original_max_position_embeddings"),
        )
    r.finish()
    return theta, scaling


_READERS: dict[str, tuple[Callable[[Fields], ModelConfig], str]] = {
    "llama": (_llama, "LlamaForCausalLM"),
    "qwen2": (_qwen2, "Qwen2ForCausalLM"),
    "yuan": (_yuan, "YuanForCausalLM"),
}
