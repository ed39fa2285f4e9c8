"""GGUF metadata as a `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fourfold.checkpoint.fields import Fields, check
from fourfold.config import ModelConfig, RopeScaling
from fourfold.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from fourfold.models.rows import SourceTensor

ARCHITECTURES = ("llama", "qwen2")

# Llama 3.1 and later: GGUF keeps the divisors of the rotary frequencies, and not what they were computed from.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192


def model_config(
    metadata: Mapping[str, Any],
    where: str,
    *,
    vocab_size: int,
    tie_embeddings: bool,
    rope_divisors: SourceTensor | None,
) -> ModelConfig:
    """The model that GGUF metadata describes; the keywords are what its tensors say.

    `rope_divisors` (head_dim / 2,) is the tensor `rope_freqs.weight`. Raises UnsupportedError, naming the key, for an
    architecture or an option that fourfold does not run, and CheckpointError for missing or contradictory values.
    """
    general = Fields(metadata, where)
    arch = general.text("general.architecture")
    if arch not in ARCHITECTURES:
        raise UnsupportedError(
            f"{where}: architecture {arch!r} is not supported in GGUF; fourfold reads {' and '.join(ARCHITECTURES)}"
        )
    general.only("general.type", "model")
    general.only("split.count", 0, 1)
    prefix = f"{arch}."
    f = Fields({k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}, f"{where}, {prefix}*,")
    if f.size("vocab_size", vocab_size) != vocab_size:
        raise CheckpointError(
            f"{where}: vocab_size is {metadata[prefix + 'vocab_size']}, and the embedding has {vocab_size} rows"
        )
    f.only("expert_count", 0)
    f.only("expert_used_count", 0)
    f.only("rope.scaling.type", "none")
    f.only("rope.scale_linear", 1)
    f.only("tensor_data_layout", "Meta AI original pth")  # the interleaved rotary order that `Unpermuted` undoes
    f.ignore("rope.scaling.finetuned")
    n_heads, dim = f.size("attention.head_count"), f.size("embedding_length")
    head_dim = f.size("attention.key_length", dim // n_heads or 1)
    f.only("attention.value_length", head_dim)
    f.only("rope.dimension_count", head_dim)
    theta = f.real("rope.freq_base", 10000.0)
    config = ModelConfig(
        model_type=arch,
        vocab_size=vocab_size,
        dim=dim,
        n_layers=f.size("block_count"),
        n_heads=n_heads,
        n_kv_heads=f.size("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        hidden_dim=f.size("feed_forward_length"),
        norm_eps=_short_float(f.real("attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        max_context=f.size("context_length"),
        tie_embeddings=tie_embeddings,
        qkv_bias=arch == "qwen2",
        rope_scaling=None if rope_divisors is None else _llama3_scaling(rope_divisors, theta, head_dim, where),
        bos_id=next(iter(general.ids("tokenizer.ggml.bos_token_id")), None),
        eos_ids=tuple(
            dict.fromkeys(i for key in ("eos", "eot", "eom") for i in general.ids(f"tokenizer.ggml.{key}_token_id"))
        ),
    )
    f.finish()
    return check(config, where)


def _short_float(x: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-5, where the file's float32 widens to 9.99999974e-06."""
    return float(str(np.float32(x)))


def _llama3_scaling(divisors: SourceTensor, theta: float, head_dim: int, where: str) -> RopeScaling | None:
    """Llama 3's scaling from what it divides each frequency by; none where that is always 1."""
    n = head_dim // 2
    if divisors.shape != (n,):
        raise CheckpointError(f"{where}: tensor rope_freqs.weight should have shape {(n,)}, and has {divisors.shape}")
    given = divisors.rows(0, n).astype(np.float64)
    factor = _short_float(float(given.max()))
    wavelengths = 2 * np.pi * theta ** (np.arange(n) / n)
    smooth = np.clip((_LLAMA3_CONTEXT / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0, 1)
    if not 1 <= factor < np.inf or not np.allclose(given, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise UnsupportedError(
            f"{where}: the tensor rope_freqs.weight scales rotary frequencies in a way that is not Llama 3's"
        )
    return RopeScaling(factor, _LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT) if factor > 1 else None
