"""Megatron directories of Yuan 2.0: one file for each tensor rank and pipeline stage, shown as one Hugging Face model.

    ROOT/latest_checkpointed_iteration.txt              which iteration
    ROOT/iter_NNNNNNN/mp_rank_TT/model_optim_rng.pt     tensor rank TT; with a pipeline mp_rank_TT_PPP, stage PPP

The files hold the optimizer's state, the arguments and the random states too; only the model's tensors are read, and
of all else nothing is ever made (`pickle_data`). Stages number their own layers from 0 and may differ in how many they
have. Tensor ranks are put together again when rows are read (`megatron_join`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fourfold.checkpoint.assembled import Stacked
from fourfold.checkpoint.hf_config import model_config
from fourfold.checkpoint.megatron_args import model_config as config_of_arguments
from fourfold.checkpoint.megatron_join import EMBEDDING, joined, model_stage, vocabulary
from fourfold.checkpoint.pickle_data import Call
from fourfold.checkpoint.source import Source, SourceFile, fingerprint, read_json
from fourfold.checkpoint.tokenizer_files import find_tokenizer
from fourfold.checkpoint.torch_file import TorchFile
from fourfold.config import ModelConfig
from fourfold.errors import CheckpointError, UnsupportedError

LATEST, FILE, CONFIG = "latest_checkpointed_iteration.txt", "model_optim_rng.pt", "config.json"
ITERATION = re.compile(r"iter_[0-9]{7,}|release")
RANK = re.compile(r"mp_rank_([0-9]{2})(?:_([0-9]{3}))?")


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
    opened = [[TorchFile(SourceFile(file), names=None) for file in ranks] for ranks in _grid(folder)]
    files = [rank.file for ranks in opened for rank in ranks]
    _check_same_iteration([rank for ranks in opened for rank in ranks])
    stages = [model_stage(ranks) for ranks in opened]
    embedding = Stacked.whole(stages[0].take(EMBEDDING))
    config_file = next((file for file in (path / CONFIG, folder / CONFIG) if file.is_file()), None)
    config = _config(config_file, opened[0][0], embedding.shape[0])
    tensors = {"model.embed_tokens.weight": vocabulary(embedding, config, folder)} | joined(stages, config, folder)
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
