"""What DeepSpeed's automatic tensor parallelism cuts, put together again as its rows are read.

It cuts tensors that go by Hugging Face's names, and by their names: some by rows, some by columns, where attention
heads or 64 units of a feed-forward layer end, so ranks may differ in how much they have. The rest every rank has whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fourfold.checkpoint.assembled import Columns, RowRange, SideBySide, Stacked, Summed
from fourfold.config import ModelConfig
from fourfold.errors import CheckpointError

if TYPE_CHECKING:
    from fourfold.models.rows import SourceTensor

Parts = Sequence["SourceTensor"]  # one tensor of every rank, in order

BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_COLUMNS = ("o_proj", "down_proj", "lm_head")
CUT_FILTERS = (".conv1.conv.", ".conv2.conv.")  # of Yuan: the first by rows, the second by columns


def whole(ranks: Sequence[Mapping[str, SourceTensor]], config: ModelConfig, where: Path) -> dict[str, SourceTensor]:
    """All ranks' tensors as one model's. Raises CheckpointError where they cannot be parts of the same."""
    names = ranks[0].keys()
    for i, rank in enumerate(ranks):
        if odd := sorted(rank.keys() ^ names):
            raise CheckpointError(f"{where}: only one of the ranks 0 and {i} has {odd[0]}")
    found = {}
    for name in names:
        parts = [rank[name] for rank in ranks]
        _check(parts, f"{where}: {name}", axis=_axis(name))
        found[name.replace(".conv.", ".")] = _joined(name, parts, config)
    return found


def _axis(name: str) -> int | None:
    """The axis along which a tensor is cut; None where every rank has all of it."""
    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    if last in BY_ROWS or CUT_FILTERS[0] in name:
        return 0
    if kind == "weight" and (last in BY_COLUMNS or CUT_FILTERS[1] in name):
        return 1
    return None


def _check(parts: Parts, where: str, axis: int | None) -> None:
    for i, part in enumerate(parts):
        ours, theirs = list(part.shape), list(parts[0].shape)
        if axis is not None and axis < min(len(ours), len(theirs)):
            ours[axis] = theirs[axis] = 0
        if ours != theirs or len(ours) <= (axis or 0):
            raise CheckpointError(
                f"{where} has shape {part.shape} on rank {i} and {parts[0].shape} on rank 0, which are not parts of one"
            )


def _joined(name: str, parts: Parts, config: ModelConfig) -> SourceTensor:
    if len(parts) == 1:
        return parts[0]
    heads_in_turns = config.model_type == "yuan" and name.endswith((".v_proj.weight", ".o_proj.weight"))
    match _axis(name):
        case 0 if heads_in_turns:
            return Stacked(tuple(RowRange(part, *half) for part, half in _halves(parts, 0)))
        case 0:
            return Stacked.whole(parts)
        case 1 if heads_in_turns:
            return SideBySide(tuple(Columns(part, *half) for part, half in _halves(parts, 1)))
        case 1:
            return SideBySide(tuple(parts))
    if CUT_FILTERS[1] in name:  # a bias, of which each rank has a share
        return Summed(tuple(parts))
    return parts[0]


def _halves(parts: Parts, axis: int) -> list[tuple[SourceTensor, tuple[int, int]]]:
    """All first halves, then all second halves.

    A rank's rows of Yuan's q_proj hold some heads, and its rows of k_proj as many others, half the heads further on;
    its values, which DeepSpeed picks to match, follow in that order.
    """
    sizes = [part.shape[axis] for part in parts]
    first = [(part, (0, n // 2)) for part, n in zip(parts, sizes, strict=True)]
    return first + [(part, (n // 2, n)) for part, n in zip(parts, sizes, strict=True)]
