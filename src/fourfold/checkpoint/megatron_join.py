"""Megatron's tensors by Hugging Face's names: tensor ranks and pipeline stages put together as their rows are read.

Each kind of tensor is joined by the inverse of how Megatron cuts it. Yuan 2.0 and Llama are known: what they share, and
each one's attention and feed-forward matrices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fourfold.checkpoint.assembled import RowRange, SideBySide, Stacked
from fourfold.checkpoint.hf_config import LATER_FAMILIES
from fourfold.checkpoint.torch_file import TorchFile
from fourfold.config import ModelConfig
from fourfold.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from fourfold.models.rows import SourceTensor

EMBEDDING, HEAD = "language_model.embedding.word_embeddings.weight", "word_embeddings_for_head.weight"
OUTPUT = "language_model.output_layer.weight"
FINAL_NORM = "language_model.encoder.final_layernorm.weight"
LAYERS = "language_model.encoder.layers"
LAYER = re.compile(r"language_model\.encoder\.layers\.(0|[1-9][0-9]{0,3})\.(.+)")
PADDING = 128  # a vocabulary is filled up to a multiple of this, or of this times the tensor ranks

Named = dict[str, "SourceTensor"]
Parts = Sequence["SourceTensor"]  # one tensor of every tensor rank, in order, all of one shape
Join = Callable[[Parts, str], Named]


@dataclass(frozen=True)
class Stage:
    """The tensors of one pipeline stage, by Megatron's names; `take` moves them out."""

    path: Path  # of its first rank
    parts: dict[str, list[SourceTensor]]

    def take(self, name: str) -> list[SourceTensor]:
        if name not in self.parts:
            raise CheckpointError(f"{self.path} lacks {name}; is a stage of the pipeline missing?")
        return self.parts.pop(name)


def model_stage(ranks: Sequence[TorchFile]) -> Stage:
    """What the files of one stage's tensor ranks hold as their `model`. Raises as `stage` does."""
    named = []
    for rank in ranks:
        content, path = rank.content, rank.file.path
        if isinstance(content, dict) and "model0" in content:
            raise UnsupportedError(
                f"{path} deals its layers out in turns (model0, model1), which fourfold does not sort"
            )
        if not isinstance(content, dict) or "model" not in content:
            raise CheckpointError(f"{path} is not a Megatron checkpoint: it holds no model")
        named.append((path, rank.tensors(content["model"])))
    return stage(named)


def stage(ranks: Sequence[tuple[Path, Mapping[str, SourceTensor]]]) -> Stage:
    """One stage of its tensor ranks' files and tensors. Raises CheckpointError where these differ."""
    first, parts = ranks[0][0], dict[str, list["SourceTensor"]]()
    for path, named in ranks:
        if later := next((name for name in named if re.search(r"\.(experts|router)\.", name)), None):
            raise UnsupportedError(f"{path} holds {later}: {LATER_FAMILIES}")
        if parts and named.keys() != parts.keys():
            odd = min(named.keys() ^ parts.keys())
            raise CheckpointError(f"{path} and {first} differ: only one of them holds {odd}")
        for name, tensor in named.items():
            if name in parts and tensor.shape != parts[name][0].shape:
                raise CheckpointError(f"{path} and {first} differ in the shape of {name}")
            parts.setdefault(name, []).append(tensor)
    return Stage(first, parts)


def joined(stages: Sequence[Stage], config: ModelConfig, folder: Path) -> Named:
    """All but the embedding. What is not known keeps its name, for `check_complete` to refuse."""
    norm = stages[-1].take(FINAL_NORM)
    tensors: Named = {"model.norm.weight": norm[0]}
    if HEAD in stages[-1].parts:  # the copy that the last stage has of the embedding
        tensors["lm_head.weight"] = vocabulary(Stacked.whole(stages[-1].take(HEAD)), config, folder)
    if OUTPUT in stages[-1].parts and not config.tie_embeddings:
        tensors["lm_head.weight"] = vocabulary(Stacked.whole(stages[-1].take(OUTPUT)), config, folder)
    joins, n_layers = _joins(config), 0
    for stage in stages:
        layers = set()
        for name, parts in stage.parts.items():
            match = LAYER.fullmatch(name)
            join = joins.get(match[2]) if match else None
            if not match or not join:
                tensors[f"{stage.path.parent.name}/{name}"] = parts[0]
                continue
            layers.add(layer := int(match[1]))
            for ours, tensor in join(parts, f"{stage.path}: {name}").items():
                tensors[f"model.layers.{n_layers + layer}.{ours}"] = tensor
        if layers != set(range(len(layers))):
            absent = min(set(range(max(layers))) - layers)
            raise CheckpointError(f"{stage.path} lacks layer {absent} of its stage")
        n_layers += len(layers)
    if n_layers != config.n_layers:
        raise CheckpointError(f"{folder} has {n_layers} layers in all its stages, and the model has {config.n_layers}")
    return tensors


def vocabulary(rows: Stacked, config: ModelConfig, folder: Path) -> Stacked:
    """Without the rows that only fill it up to a multiple."""
    n, size = rows.shape[0], config.vocab_size
    if n < size:
        raise CheckpointError(f"{folder} embeds {n} tokens, and the model has {size}; is a tensor rank missing?")
    if n - size >= PADDING * len(rows.ranges):
        raise CheckpointError(f"{folder} embeds {n} tokens, too many to be the model's {size} and their padding")
    return rows.cut(0, size)


# ---- how tensor ranks are put together: parts, and what to call them in a message, to tensors by Hugging Face's names


def _same(ours: str) -> Join:
    """Every rank has all of it."""
    return lambda parts, _: {ours: parts[0]}


def _rows(ours: str) -> Join:
    """Each rank has some rows."""
    return lambda parts, _: {ours: Stacked.whole(parts)}


def _columns(ours: str) -> Join:
    """Each rank has some columns."""

    def join(parts: Parts, where: str) -> Named:
        if len(parts[0].shape) != 2:
            raise CheckpointError(f"{where} should be a matrix, and has shape {parts[0].shape}")
        return {ours: SideBySide(tuple(parts)) if len(parts) > 1 else parts[0]}

    return join


def _query_key(parts: Parts, where: str) -> Named:
    """Each rank has some rows of one matrix, whose halves Hugging Face calls q and k, heads interleaved."""
    whole = Stacked.whole(parts)
    half = _half(whole.shape[0], where)
    return {
        "self_attn.q_proj.weight": whole.cut(0, half),
        "self_attn.k_proj.weight": whole.cut(half, 2 * half),
    }


def _up_gate(parts: Parts, where: str) -> Named:
    """Each rank has some rows of each of two matrices, the one over the other."""
    half = _half(parts[0].shape[0], where)
    return {
        "mlp.up_proj.weight": Stacked(tuple(RowRange(part, 0, half) for part in parts)),
        "mlp.gate_proj.weight": Stacked(tuple(RowRange(part, half, 2 * half) for part in parts)),
    }


def _half(n: int, where: str) -> int:
    if n % 2:
        raise CheckpointError(f"{where} has {n} rows, which are not two halves")
    return n // 2


def _gate_up(parts: Parts, where: str) -> Named:
    """As `_up_gate`, the other way round: SiLU is taken of the upper one, which is Llama's gate and Yuan's up."""
    both = _up_gate(parts, where)
    return {
        "mlp.gate_proj.weight": both["mlp.up_proj.weight"],
        "mlp.up_proj.weight": both["mlp.gate_proj.weight"],
    }


def _query_key_value(config: ModelConfig) -> Join:
    """Each rank has some KV heads, and of each the rows of its query heads, of its key and of its value in turn."""
    head, queries = config.head_dim, config.n_heads // config.n_kv_heads

    def join(parts: Parts, where: str) -> Named:
        group = (queries + 2) * head
        if parts[0].shape[0] % group:
            raise CheckpointError(
                f"{where} has {parts[0].shape[0]} rows, no multiple of the {group} that {queries} query heads, a key"
                " and a value take"
            )

        def rows(start: int, stop: int) -> Stacked:
            begins = range(0, parts[0].shape[0], group)
            return Stacked(tuple(RowRange(part, at + start, at + stop) for part in parts for at in begins))

        return {
            "self_attn.q_proj.weight": rows(0, queries * head),
            "self_attn.k_proj.weight": rows(queries * head, (queries + 1) * head),
            "self_attn.v_proj.weight": rows((queries + 1) * head, group),
        }

    return join


_SHARED: dict[str, Join] = {
    "input_layernorm.weight": _same("input_layernorm.weight"),
    "self_attention.dense.weight": _columns("self_attn.o_proj.weight"),
    "post_attention_layernorm.weight": _same("post_attention_layernorm.weight"),
    "mlp.dense_4h_to_h.weight": _columns("mlp.down_proj.weight"),
}
_FILTER = ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "output_layernorm.weight")
_YUAN: dict[str, Join] = {
    "self_attention.get_value.weight": _rows("self_attn.v_proj.weight"),
    "self_attention.get_query_key.weight": _query_key,
    **{f"self_attention.lf_gate.{name}": _same(f"self_attn.lf_gate.{name}") for name in _FILTER},
    "mlp.dense_h_to_4h.weight": _up_gate,
}


def _joins(config: ModelConfig) -> dict[str, Join]:
    """By the name of a tensor in its layer."""
    if config.model_type == "yuan":
        return _SHARED | _YUAN
    return _SHARED | {
        "self_attention.query_key_value.weight": _query_key_value(config),
        "mlp.dense_h_to_4h.weight": _gate_up,
    }
