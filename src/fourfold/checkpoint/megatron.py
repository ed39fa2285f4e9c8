"""Megatron directories of Yuan 2.0: one file for each tensor rank and pipeline stage, shown as one Hugging Face model.

    ROOT/latest_checkpointed_iteration.txt              which iteration
    ROOT/iter_NNNNNNN/mp_rank_TT/model_optim_rng.pt     tensor rank TT; with a pipeline mp_rank_TT_PPP, stage PPP

The files hold the optimizer's state, the arguments and the random states too; only the model's tensors are mapped, and
of all else nothing is ever made (`pickle_data`). Stages number their own layers from 0 and may differ in how many they
have. Tensor ranks are put together again when rows are read, by the inverse of how Megatron cuts each kind of tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fourfold.checkpoint.assembled import RowRange, SideBySide, Stacked
from fourfold.checkpoint.hf_config import LATER_FAMILIES, model_config
from fourfold.checkpoint.megatron_args import model_config as config_of_arguments
from fourfold.checkpoint.pickle_data import Call
from fourfold.checkpoint.source import MappedFile, Source, fingerprint, read_json
from fourfold.checkpoint.tokenizer_files import find_tokenizer
from fourfold.checkpoint.torch_file import TorchFile
from fourfold.config import ModelConfig
from fourfold.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from fourfold.models.rows import SourceTensor

LATEST, FILE, CONFIG = "latest_checkpointed_iteration.txt", "model_optim_rng.pt", "config.json"
ITERATION = re.compile(r"iter_[0-9]{7,}|release")
RANK = re.compile(r"mp_rank_([0-9]{2})(?:_([0-9]{3}))?")
EMBEDDING, HEAD = "language_model.embedding.word_embeddings.weight", "word_embeddings_for_head.weight"
FINAL_NORM = "language_model.encoder.final_layernorm.weight"
LAYER = re.compile(r"language_model\.encoder\.layers\.(0|[1-9][0-9]{0,3})\.(.+)")
PADDING = 128  # a vocabulary is filled up to a multiple of this, or of this times the tensor ranks

Named = dict[str, "SourceTensor"]
Parts = Sequence["SourceTensor"]  # one tensor of every tensor rank, in order, all of one shape


def is_megatron(path: Path) -> bool:
    """Whether a directory has the layout above, or is one iteration of it."""
    return (path / LATEST).is_file() or _is_iteration(path) or bool(_iterations(path))


def open_megatron(path: Path) -> Source:
    """The model in a Megatron directory, by Hugging Face's names and in its row order.

    What the model is, is said by a `config.json` in `path` or beside the ranks, by the arguments that the checkpoint
    keeps, or by both, which must then agree. The tokenizer is looked for in `path`, in `path/tokenizer`, and beside the
    ranks. Raises CheckpointError or UnsupportedError, in a sentence that names what is wrong.
    """
    folder = _iteration(path)
    opened = [[TorchFile(MappedFile(file), names=None) for file in ranks] for ranks in _grid(folder)]
    files = [rank.file for ranks in opened for rank in ranks]
    _check_same_iteration([rank for ranks in opened for rank in ranks])
    stages = [_stage(ranks) for ranks in opened]
    embedding = Stacked.whole(stages[0].take(EMBEDDING))
    config_file = next((file for file in (path / CONFIG, folder / CONFIG) if file.is_file()), None)
    config = _config(config_file, opened[0][0], embedding.shape[0])
    tensors = {"model.embed_tokens.weight": _vocabulary(embedding, config, folder)} | _tensors(stages, config, folder)
    tokenizer = find_tokenizer([path, path / "tokenizer", folder])
    read = [*(file.path for file in files), *tokenizer.values(), *([config_file] if config_file else [])]
    return Source(path, config, tensors, tokenizer, fingerprint(config, read), files)


# ---- which files


def _is_iteration(path: Path) -> bool:
    return path.is_dir() and any(RANK.fullmatch(entry.name) and entry.is_dir() for entry in path.iterdir())


def _iterations(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if ITERATION.fullmatch(entry.name) and _is_iteration(entry))


def _iteration(path: Path) -> Path:
    """The folder with the ranks: the one given, what the tracker file names, or else the only one that there is."""
    if _is_iteration(path):
        return path
    if (path / LATEST).is_file():
        with (path / LATEST).open("rb") as file:
            latest = file.read(64).decode("latin-1").strip()
        folder = path / (f"iter_{int(latest):07}" if re.fullmatch("[0-9]{1,15}", latest) else "release")
        if (latest != "release" and folder.name == "release") or not _is_iteration(folder):
            raise CheckpointError(f"{path / LATEST} names the iteration {latest!r}, of which there are no ranks")
        return folder
    found = _iterations(path)
    if len(found) != 1:
        names = ", ".join(folder.name for folder in found)
        raise CheckpointError(f"{path} holds several iterations ({names}) and no {LATEST}; give one of them")
    return found[0]


def _grid(folder: Path) -> list[list[Path]]:
    """The file of every rank, by pipeline stage and tensor rank. Raises CheckpointError unless the grid is complete."""
    ranks: dict[tuple[int, int], Path] = {}
    for entry in sorted(folder.iterdir()):
        if match := RANK.fullmatch(entry.name):
            key = (int(match[2] or 0), int(match[1]))
            if key in ranks:
                raise CheckpointError(f"{folder} holds both {ranks[key].name} and {entry.name}; one is left over")
            ranks[key] = entry
    n_stages, n_ranks = (1 + max(key[axis] for key in ranks) for axis in (0, 1))
    named_by_stage = any("_" in entry.name.removeprefix("mp_rank_") for entry in ranks.values())
    grid = [
        [folder / (f"mp_rank_{rank:02}" + f"_{stage:03}" * named_by_stage) / FILE for rank in range(n_ranks)]
        for stage in range(n_stages)
    ]
    for file in (file for row in grid for file in row):
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, of {n_ranks} tensor ranks in each of {n_stages} pipeline stages")
    return grid


def _check_same_iteration(files: Sequence[TorchFile]) -> None:
    of: dict[int, Path] = {}
    for file in files:
        iteration = file.content.get("iteration") if isinstance(file.content, dict) else None
        if type(iteration) is int and 0 <= iteration < 2**63:
            of.setdefault(iteration, file.file.path)
    if len(of) > 1:
        (first, here), (second, there), *_ = of.items()
        raise CheckpointError(f"{here} is of iteration {first} and {there} of {second}; copy one of them again")


# ---- what is in them


@dataclass(frozen=True)
class _Stage:
    """The tensors of one pipeline stage, by Megatron's names; `take` moves them out."""

    path: Path  # of its first rank
    parts: dict[str, list[SourceTensor]]

    def take(self, name: str) -> list[SourceTensor]:
        if name not in self.parts:
            raise CheckpointError(f"{self.path} lacks {name}; is a stage of the pipeline missing?")
        return self.parts.pop(name)


def _stage(ranks: Sequence[TorchFile]) -> _Stage:
    parts: dict[str, list[SourceTensor]] = {}
    for rank in ranks:
        content, path = rank.content, rank.file.path
        if isinstance(content, dict) and "model0" in content:
            raise UnsupportedError(
                f"{path} deals its layers out in turns (model0, model1), which fourfold does not sort"
            )
        if not isinstance(content, dict) or "model" not in content:
            raise CheckpointError(f"{path} is not a Megatron checkpoint: it holds no model")
        named = rank.tensors(content["model"])
        if later := next((name for name in named if re.search(r"\.(experts|router)\.", name)), None):
            raise UnsupportedError(f"{path} holds {later}: {LATER_FAMILIES}")
        if parts and named.keys() != parts.keys():
            odd = min(named.keys() ^ parts.keys())
            raise CheckpointError(f"{path} and {ranks[0].file.path} differ: only one of them holds {odd}")
        for name, tensor in named.items():
            if name in parts and tensor.shape != parts[name][0].shape:
                raise CheckpointError(f"{path} and {ranks[0].file.path} differ in the shape of {name}")
            parts.setdefault(name, []).append(tensor)
    return _Stage(ranks[0].file.path, parts)


def _config(file: Path | None, first: TorchFile, vocab_rows: int) -> ModelConfig:
    kept = first.content.get("args") if isinstance(first.content, dict) else None
    arguments = kept.state if isinstance(kept, Call) else None
    of_arguments = None
    if isinstance(arguments, dict):
        of_arguments = config_of_arguments(arguments, f"{first.file.path}, args,", vocab_rows)
    if file is None:
        if of_arguments is None:
            raise CheckpointError(
                f"{first.file.path} keeps no args to say what the model is; put its {CONFIG} beside the ranks"
            )
        return of_arguments
    config = model_config(read_json(file), str(file))
    if config.model_type != "yuan":
        raise UnsupportedError(f"{file} describes {config.model_type}; of Megatron's fourfold reads Yuan 2.0 alone")
    for field in ("dim", "n_layers", "n_heads", "hidden_dim") if of_arguments else ():
        theirs, ours = getattr(of_arguments, field), getattr(config, field)
        if theirs != ours:
            raise CheckpointError(f"{file} says {field} {ours}, and the args in {first.file.path} {theirs}")
    return config


def _tensors(stages: Sequence[_Stage], config: ModelConfig, folder: Path) -> Named:
    """All but the embedding. What is not known keeps its name, for `check_complete` to refuse."""
    norm = stages[-1].take(FINAL_NORM)
    tensors: Named = {"model.norm.weight": norm[0]}
    if HEAD in stages[-1].parts:  # the copy that the last stage has of the embedding
        tensors["lm_head.weight"] = _vocabulary(Stacked.whole(stages[-1].take(HEAD)), config, folder)
    n_layers = 0
    for stage in stages:
        layers = set()
        for name, parts in stage.parts.items():
            match = LAYER.fullmatch(name)
            join = _IN_LAYER.get(match[2]) if match else None
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


def _vocabulary(rows: Stacked, config: ModelConfig, folder: Path) -> Stacked:
    """Without the rows that only fill it up to a multiple."""
    n, size = rows.shape[0], config.vocab_size
    if n < size:
        raise CheckpointError(f"{folder} embeds {n} tokens, and the model has {size}; is a tensor rank missing?")
    if n - size >= PADDING * len(rows.ranges):
        raise CheckpointError(f"{folder} embeds {n} tokens, too many to be the model's {size} and their padding")
    return rows.cut(0, size)


# ---- how tensor ranks are put together: parts, and what to call them in a message, to tensors by Hugging Face's names


def _same(ours: str) -> Callable[[Parts, str], Named]:
    """Every rank has all of it."""
    return lambda parts, _: {ours: parts[0]}


def _rows(ours: str) -> Callable[[Parts, str], Named]:
    """Each rank has some rows."""
    return lambda parts, _: {ours: Stacked.whole(parts)}


def _columns(ours: str) -> Callable[[Parts, str], Named]:
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


_IN_LAYER: dict[str, Callable[[Parts, str], Named]] = {
    "input_layernorm.weight": _same("input_layernorm.weight"),
    "self_attention.get_value.weight": _rows("self_attn.v_proj.weight"),
    "self_attention.get_query_key.weight": _query_key,
    "self_attention.dense.weight": _columns("self_attn.o_proj.weight"),
    "self_attention.lf_gate.conv1.weight": _same("self_attn.lf_gate.conv1.weight"),
    "self_attention.lf_gate.conv1.bias": _same("self_attn.lf_gate.conv1.bias"),
    "self_attention.lf_gate.conv2.weight": _same("self_attn.lf_gate.conv2.weight"),
    "self_attention.lf_gate.conv2.bias": _same("self_attn.lf_gate.conv2.bias"),
    "self_attention.lf_gate.output_layernorm.weight": _same("self_attn.lf_gate.output_layernorm.weight"),
    "post_attention_layernorm.weight": _same("post_attention_layernorm.weight"),
    "mlp.dense_h_to_4h.weight": _up_gate,
    "mlp.dense_4h_to_h.weight": _columns("mlp.down_proj.weight"),
}
