"""Nothing missing, nothing of the wrong shape, nothing left unread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from fourfold.checkpoint.coded import CodedTensor
from fourfold.checkpoint.source import Source
from fourfold.errors import CheckpointError

if TYPE_CHECKING:
    from fourfold.models.spec import WeightSpec

COMPARED_BYTES = 16 << 20  # at a time
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


def check_copied_head(source: Source) -> None:
    """Raises CheckpointError where a head stays unread that is no copy of the embedding. Reads both, row by row."""
    if not source.config.tie_embeddings or HEAD not in source.tensors:
        return
    embedding, head = source.tensors[EMBEDDING], source.tensors[HEAD]
    if head == embedding or isinstance(embedding, CodedTensor):  # the same bytes; codes, of which a copy has others
        return
    n, width = embedding.shape
    step = max(1, COMPARED_BYTES // (4 * width))
    for start in range(0, n, step):
        theirs, ours = (tensor.rows(start, min(start + step, n)) for tensor in (head, embedding))
        if not np.array_equal(theirs.astype(np.float32), ours.astype(np.float32), equal_nan=True):
            raise CheckpointError(
                f"{source.path} has a head of its own, {HEAD}, though its configuration ties it to the embedding: "
                "set tie_word_embeddings to false, or take that tensor out"
            )
