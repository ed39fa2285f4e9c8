"""The arguments that a Megatron checkpoint keeps of its training, as a `ModelConfig`: the only reader of them.

There are some three hundred, most about the training. Read are those that shape the model; those that would make it
another function are refused by name. What else could change the model shows in its tensors, every one of which is
checked by name and shape.
"""

from __future__ import annotations

from collections.abc import Mapping

from fourfold.checkpoint.fields import Fields, check
from fourfold.checkpoint.hf_config import LATER_FAMILIES
from fourfold.config import ModelConfig
from fourfold.errors import CheckpointError

_READ = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")
_SIZES = ("padded_vocab_size", "kv_channels")
_LATER = ("num_experts", "attention_projection_size")
_INTERLEAVED = ("virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage")
_ONLY = {
    "use_lf_gate": (True,),
    "lf_conv2d_group": (1,),
    "lf_conv2d_num_pad": (0, 1),  # the same function: of training, and of inference
    "swiglu": (True,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1,),
    "rotary_base": (10000,),
    "norm_dtype": ("RMSNorm",),  # whose epsilon is fixed in the code: layernorm_epsilon is not used
    "add_bias_linear": (False,),
    "untie_embeddings_and_output_weights": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "apply_layernorm_1p": (False,),
    "group_query_attention": (False,),
}
NORM_EPS, ROPE_THETA = 1e-6, 10000.0


def model_config(arguments: Mapping[str, object], where: str, vocab_rows: int) -> ModelConfig:
    """The Yuan 2.0 model that was trained with these arguments, with `vocab_rows` tokens where they say no number.

    Raises UnsupportedError, naming the argument, for another model, and CheckpointError for an absent argument, a value
    of the wrong type, or numbers that make no model.
    """
    known = (*_READ, *_SIZES, *_LATER, *_INTERLEAVED, *_ONLY)
    f = Fields({key: arguments.get(key) for key in known}, where)
    f.refuse(_LATER, LATER_FAMILIES)
    f.refuse(_INTERLEAVED, "its layers are dealt out to the pipeline in turns, which fourfold does not put in order")
    for key, allowed in _ONLY.items():
        f.only(key, *allowed)
    n_heads, dim = f.size("num_attention_heads"), f.size("hidden_size")
    if dim % 2 or dim % n_heads:
        raise CheckpointError(
            f"{where} sets hidden_size to {dim}, which must be even and a multiple of {n_heads} heads"
        )
    f.only("kv_channels", dim // n_heads)
    config = ModelConfig(
        model_type="yuan",
        vocab_size=f.size("padded_vocab_size", vocab_rows),
        dim=dim,
        n_layers=f.size("num_layers"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=dim // n_heads,
        hidden_dim=f.size("ffn_hidden_size", 4 * dim),
        norm_eps=NORM_EPS,
        rope_theta=ROPE_THETA,
        max_context=f.size("max_position_embeddings"),
        tie_embeddings=True,
    )
    return check(config, where)
