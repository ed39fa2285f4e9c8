"""GGUF metadata as a `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fourfold.checkpoint.fields import Fields, check
from fourfold.config import LinearScaling, LongRope, ModelConfig, RopeScaling, Scaling
from fourfold.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from fourfold.models.rows import SourceTensor

ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma3")

# Llama 3.1 and later: GGUF keeps the divisors of the rotary frequencies, and not what they were computed from.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192
# Of Gemma 3 the format leaves out what all published sizes share: every so many layers one is global, and the base of
# the local ones' angles; and that the 27B, known by its layers, scales scores by a head's share of the width.
_GEMMA3_GLOBAL_EVERY, _GEMMA3_LOCAL_THETA, _GEMMA3_27B_LAYERS = 6, 10000.0, 62


# Of Mistral 7B v0.1 and what was made from it, the format leaves the window out; later versions have another base.
_MISTRAL_01 = {
    "model_type": "llama",
    "dim": 4096,
    "n_layers": 32,
    "n_kv_heads": 8,
    "hidden_dim": 14336,
    "rope_theta": 10000.0,
    "max_context": 32768,
}
_MISTRAL_01_WINDOW = 4096


@dataclass(frozen=True)
class RopeTensors:
    """The rotary factors that a GGUF file keeps as tensors, (rotated dimensions / 2,) each; None where it has none."""

    divisors: SourceTensor | None
    short: SourceTensor | None
    long: SourceTensor | None

    @classmethod
    def taken(cls, tensors: dict[str, SourceTensor]) -> RopeTensors:
        """Out of a file's tensors."""
        return cls(**{field: tensors.pop(name, None) for field, name in ROPE_TENSORS.items()})


ROPE_TENSORS = {
    "divisors": "rope_freqs.weight",
    "short": "rope_factors_short.weight",
    "long": "rope_factors_long.weight",
}


def model_config(
    metadata: Mapping[str, Any], where: str, *, vocab_size: int, tie_embeddings: bool, rope: RopeTensors
) -> ModelConfig:
    """The model that GGUF metadata describes; the keywords are what its tensors say.

    Raises UnsupportedError, naming the key, for an architecture or an option that fourfold does not run, and
    CheckpointError for missing or contradictory values.
    """
    general = Fields(metadata, where)
    arch = general.text("general.architecture")
    if arch not in ARCHITECTURES:
        raise UnsupportedError(
            f"{where}: architecture {arch!r} is not supported in GGUF; fourfold reads {', '.join(ARCHITECTURES)}"
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
    f.only("rope.scale_linear", 1)
    f.only("tensor_data_layout", "Meta AI original pth")  # the interleaved rotary order that `Unpermuted` undoes
    f.ignore("rope.scaling.finetuned")
    n_heads, dim = f.size("attention.head_count"), f.size("embedding_length")
    head_dim = f.size("attention.key_length", dim // n_heads or 1)
    f.only("attention.value_length", head_dim)
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
        rope_theta=f.real("rope.freq_base", 1e6 if arch == "gemma3" else 10000.0),
        max_context=f.size("context_length"),
        tie_embeddings=tie_embeddings,
        qkv_bias=arch == "qwen2",
        bos_id=next(iter(general.ids("tokenizer.ggml.bos_token_id")), None),
        eos_ids=tuple(
            dict.fromkeys(i for key in ("eos", "eot", "eom") for i in general.ids(f"tokenizer.ggml.{key}_token_id"))
        ),
    )
    config = _OF_ITS_OWN.get(arch, _whole_heads)(config, f, rope)
    f.finish()
    return check(config, where)


def notes(config: ModelConfig, where: str) -> tuple[str, ...]:
    """What the format leaves out, and its user may miss, in sentences."""
    if all(getattr(config, name) == value for name, value in _MISTRAL_01.items()):
        return (
            f"{where} has the shape of Mistral 7B v0.1, whose layers see {_MISTRAL_01_WINDOW} positions; it does not"
            " say so, and every layer sees all",
        )
    return ()


def _whole_heads(c: ModelConfig, f: Fields, rope: RopeTensors) -> ModelConfig:
    """Rotary embedding of all dimensions of a head, as most have it."""
    f.only("rope.dimension_count", c.head_dim)
    f.only("rope.scaling.type", "none", "linear")
    scaling: Scaling | None = None
    is_linear = f.text("rope.scaling.type", "none") == "linear"
    _refuse(f, rope, *([] if is_linear else ["divisors"]))
    if is_linear:
        scaling = LinearScaling(f.real("rope.scaling.factor"))
    elif rope.divisors is not None:
        scaling = _llama3_scaling(rope.divisors, c.rope_theta, c.head_dim, f.where)
    return replace(c, rope_scaling=scaling)


def _refuse(f: Fields, rope: RopeTensors, *known: str) -> None:
    """Raises UnsupportedError where the file has rotary factors that mean nothing here."""
    for name in vars(rope).keys() - set(known):
        if getattr(rope, name) is not None:
            raise UnsupportedError(f"{f.where} has the tensor {ROPE_TENSORS[name]}, which fourfold does not know here")


def _llama(c: ModelConfig, f: Fields, rope: RopeTensors) -> ModelConfig:
    """Mistral's files have this name too: one with a window is known by it."""
    c = _whole_heads(c, f, rope)
    if "attention.sliding_window" not in f:
        return c
    return replace(c, model_type="mistral", sliding_window=f.size("attention.sliding_window"))


def _phi3(c: ModelConfig, f: Fields, rope: RopeTensors) -> ModelConfig:
    f.only("rope.scaling.type", "none", "longrope")
    window = None if f.is_zero("attention.sliding_window") else f.size("attention.sliding_window")
    rotary_dim, original = f.size("rope.dimension_count", c.head_dim), f.size("rope.scaling.original_context_length", 1)
    attention_factor = f.real("rope.scaling.attn_factor", 1.0)
    scaling = None
    _refuse(f, rope, *(["short", "long"] if rope.short is not None and rope.long is not None else []))
    if rope.short is not None and rope.long is not None:
        short, long = (tuple(t.rows(0, t.shape[0]).astype(float).tolist()) for t in (rope.short, rope.long))
        scaling = LongRope(short, long, original, attention_factor)
    return replace(
        c,
        rope_scaling=scaling,
        rotary_dim=None if rotary_dim == c.head_dim else rotary_dim,
        sliding_window=window,
    )


def _gemma3(c: ModelConfig, f: Fields, rope: RopeTensors) -> ModelConfig:
    f.refuse(("attn_logit_softcapping", "final_logit_softcapping"), "fourfold caps neither scores nor logits")
    scalar = c.dim // c.n_heads if c.n_layers == _GEMMA3_27B_LAYERS else c.head_dim
    return replace(
        _whole_heads(c, f, rope),
        sliding_window=f.size("attention.sliding_window"),
        global_every=f.size("attention.sliding_window_pattern", _GEMMA3_GLOBAL_EVERY),
        local_rope_theta=f.real("rope.freq_base_swa", _GEMMA3_LOCAL_THETA),
        attention_scale=scalar**-0.5,
        embed_scale=float(np.float32(c.dim**0.5)),
    )


_OF_ITS_OWN = {"llama": _llama, "phi3": _phi3, "gemma3": _gemma3}


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
