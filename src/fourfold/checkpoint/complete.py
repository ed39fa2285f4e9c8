"""Nothing missing, nothing of the wrong shape, nothing left unread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fourfold.checkpoint.source import Source
from fourfold.errors import CheckpointError

if TYPE_CHECKING:
    from fourfold.models.spec import WeightSpec

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def check_complete(specs: Iterable[WeightSpec], source: Source) -> None:
    """Every tensor that `specs` read is there in its shape, and no other is.

    Two kinds of tensor may stay unread: rotary frequencies that old exports stored, and a copy of the embedding as the
    head of a model whose head is the embedding. Raises CheckpointError naming the first tensor at fault.
    """
    needed = {name: shape for spec in specs for name, shape in spec.rows.source_shapes().items()}
    for name, shape in needed.items():
        if name not in source.tensors:
            raise CheckpointError(f"{source.path} lacks the tensor {name}, of shape {shape}")
        if (actual := source.tensors[name].shape) != shape:
            raise CheckpointError(f"{source.path}: tensor {name} should have shape {shape}, and has {actual}")
    for name, tensor in source.tensors.items():
        copied = source.config.tie_embeddings and name == HEAD and tensor.shape == needed.get(EMBEDDING)
        if name not in needed and not copied and not name.endswith(".rotary_emb.inv_freq"):
            raise CheckpointError(
                f"{source.path} holds the tensor {name}, which a {source.config.model_type} model does not have"
            )
