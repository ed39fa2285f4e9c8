"""The rotary embedding that a `config.json` of Hugging Face describes, in the older words and in the newer ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fourfold.checkpoint.fields import Fields
from fourfold.config import LinearScaling, LongRope, RopeScaling, Scaling
from fourfold.errors import CheckpointError

THETA = 10000.0  # where the file is silent


@dataclass(frozen=True)
class Rope:
    """The base of the frequencies, what scales them, and the share of a head's dimensions that turn."""

    theta: float
    scaling: Scaling | None
    partial: float


def rope(f: Fields, *, long_context: int | None = None) -> Rope:
    """`rope_theta` with `rope_scaling`, or `rope_parameters`, which is the newer name of both.

    `long_context`: the positions after which LongRope's second factors hold, for a model that may have it. Raises
    UnsupportedError for a kind of scaling that fourfold does not honour.
    """
    if "rope_scaling" in f and "rope_parameters" in f:
        raise CheckpointError(f"{f.where} sets both rope_scaling and rope_parameters; only one of them can hold")
    r = f.fields("rope_parameters" if "rope_parameters" in f else "rope_scaling")
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in f and key in r and f.real(key) != r.real(key):
            raise CheckpointError(f"{f.where} sets {key} twice, to different values")
    theta = r.real("rope_theta", f.real("rope_theta", THETA))
    partial = r.real("partial_rotary_factor", f.real("partial_rotary_factor", 1.0))
    return Rope(theta, scaling(f, r, long_context), partial)


def scaling(f: Fields, r: Fields, long_context: int | None = None) -> Scaling | None:
    """What the keys of `r` say, all of which are then read; `f` are those around it."""
    kinds = ("default", "linear", "llama3", *(("longrope", "su") if long_context else ()))
    for key in ("rope_type", "type"):
        r.only(key, *kinds)
    named = {r.text("rope_type", "default"), r.text("type", "default")} - {"default"}
    named = {"longrope" if name == "su" else name for name in named}  # the older name of the same
    if len(named) > 1:
        raise CheckpointError(f"{r.where} names two kinds of scaling, {' and '.join(sorted(named))}")
    found: Scaling | None = None
    if named == {"linear"}:
        found = LinearScaling(r.real("factor"))
    elif named == {"llama3"}:
        found = RopeScaling(
            factor=r.real("factor"),
            low_freq_factor=r.real("low_freq_factor"),
            high_freq_factor=r.real("high_freq_factor"),
            original_context=r.size("original_max_position_embeddings"),
        )
    elif named:
        found = _long(f, r, long_context or 0)
    elif long_context:
        r.ignore("original_max_position_embeddings")  # without effect unless something is scaled
    r.finish()
    return found


def _long(f: Fields, r: Fields, long_context: int) -> LongRope:
    """The attention's factor is that of arXiv 2402.13753, section 3.3, unless the file has one."""
    r.only("original_max_position_embeddings", long_context)
    growth = r.real("factor", f.size("max_position_embeddings") / long_context)
    attention = math.sqrt(1 + math.log(growth) / math.log(long_context)) if growth > 1 else 1.0
    return LongRope(
        short=r.reals("short_factor"),
        long=r.reals("long_factor"),
        original_context=long_context,
        attention_factor=r.real("attention_factor", attention),
    )
