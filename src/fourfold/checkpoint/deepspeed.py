"""What DeepSpeed saves of a model, for inference or amid training, by Hugging Face's names or by Megatron's.

    DIR/ds_inference_config.json, tp_RR_MM.pt, non-tp.pt       `save_mp_checkpoint_path`: tensor ranks
    DIR/checkpoints.json                                       a list of files that stand beside it
    DIR/[TAG/]mp_rank_RR_model_states.pt                       an engine's `module`, by either's names
    DIR/[TAG/]layer_LL-model_RR-model_states.pt                Megatron-DeepSpeed's pipeline, a file a layer and rank

DIR/latest names the TAG. A `config.json` in DIR, or beside the files, says what the model is; where the files keep
Megatron's arguments of a Yuan, they do. The optimizer's files are not read; where ZeRO has cut the weights themselves
into pieces, they are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold.checkpoint.assembled import Stacked
from fourfold.checkpoint.autotp import whole
from fourfold.checkpoint.hf_config import model_config
from fourfold.checkpoint.huggingface import DTYPES, safetensors
from fourfold.checkpoint.megatron_args import model_config as config_of_arguments
from fourfold.checkpoint.megatron_join import EMBEDDING, FINAL_NORM, LAYERS, OUTPUT, Stage, joined, stage, vocabulary
from fourfold.checkpoint.pickle_data import Call
from fourfold.checkpoint.source import Source, SourceFile, fingerprint, read_json
from fourfold.checkpoint.tokenizer_files import find_tokenizer
from fourfold.checkpoint.torch_file import TorchFile
from fourfold.config import ModelConfig
from fourfold.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from fourfold.models.rows import SourceTensor

SHARDED, LISTED, LATEST, CONFIG = "ds_inference_config.json", "checkpoints.json", "latest", "config.json"
HUGGING_FACE = ("model.safetensors", "pytorch_model.bin")  # and their indexes
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
RANK = re.compile(r"mp_rank_([0-9]{2,4})_model_states\.pt")
LAYER = re.compile(r"layer_([0-9]{2,4})(?:-model_([0-9]{2,4}))?-model_states\.pt")
PIECE = re.compile(r"tp_([0-9]{2,4})_([0-9]{2,4})\.pt")
ZERO_WEIGHTS = re.compile(r"zero_pp_rank_[0-9]+_mp_rank_[0-9]+_model_states\.pt")
OPTIMIZER = re.compile(r".*_optim_states\.pt")
CONSOLIDATE = "put them together first, with the zero_to_fp32.py that DeepSpeed leaves beside them"

Tensors = dict[str, "SourceTensor"]


def is_deepspeed(path: Path) -> bool:
    """Whether a directory has the layout above, and no whole model in Hugging Face's."""
    if any((path / f"{name}{index}").is_file() for name in HUGGING_FACE for index in ("", ".index.json")):
        return False
    return any((path / name).is_file() for name in (SHARDED, LISTED, LATEST)) or bool(_folders(path))


def open_deepspeed(path: Path) -> Source:
    """The model in such a directory. Raises CheckpointError or UnsupportedError, in a sentence that names the fault."""
    files = _Files()
    if (path / SHARDED).is_file() or (path / LISTED).is_file():
        folder = path
        listing = path / (SHARDED if (path / SHARDED).is_file() else LISTED)
        config, tensors = _of_listing(listing, files)
    else:
        folder = _states(path)
        config, tensors = _of_states(path, folder, files)
    tokenizer = find_tokenizer([path, path / "tokenizer", folder])
    read = [*(file.path for file in files.opened), *tokenizer.values(), *files.texts]
    return Source(path, config, tensors, tokenizer, fingerprint(config, read), files.opened)


class _Files:
    """What has been opened."""

    def __init__(self) -> None:
        self.opened: list[SourceFile] = []
        self.texts: list[Path] = []  # read whole

    def torch(self, path: Path, *, weights_only: bool) -> TorchFile:
        """A file of torch.save, which may name what is no weight unless it holds nothing else."""
        self.opened.append(SourceFile(path))
        return TorchFile(self.opened[-1]) if weights_only else TorchFile(self.opened[-1], names=None)

    def weights(self, path: Path) -> Tensors:
        """The tensors of a file that holds nothing else."""
        if path.suffix == ".safetensors":
            self.opened.append(SourceFile(path))
            tensors = safetensors(self.opened[-1])
            for name, tensor in tensors.items():
                if tensor.dtype not in DTYPES.values():
                    raise UnsupportedError(f"{path}: tensor {name} is {tensor.dtype}, which no weight here may be")
            return dict(tensors)
        opened = self.torch(path, weights_only=True)
        return opened.tensors(opened.content)

    def config(self, folders: Sequence[Path]) -> ModelConfig | None:
        """That of the first folder with a config.json."""
        file = next((folder / CONFIG for folder in folders if (folder / CONFIG).is_file()), None)
        if file is None:
            return None
        self.texts.append(file)
        return model_config(read_json(file), str(file))

    def needed_config(self, folders: Sequence[Path]) -> ModelConfig:
        config = self.config(folders)
        if config is None:
            raise CheckpointError(
                f"{folders[0]} has no {CONFIG}, and DeepSpeed's files do not say what the model is; put the one of the"
                " model there"
            )
        return config


# ---- ds_inference_config.json and checkpoints.json


def _of_listing(file: Path, files: _Files) -> tuple[ModelConfig, Tensors]:
    fields, folder = read_json(file), file.parent
    files.texts.append(file)
    listed = fields.get("checkpoints")
    if isinstance(listed, dict):
        shared, ranks = _beside(listed.get("non_tp", []), file), _ranks(_beside(listed.get("tp"), file), fields, file)
        config = files.needed_config([folder])
        tensors = whole([_united(rank, files) for rank in ranks], config, file)
        return config, tensors | _new(_united(shared, files), tensors, file)
    paths = _beside(listed, file)
    if str(fields.get("type")).lower() == "megatron":
        return _of_ranks(folder, folder, paths, files)
    if fields.get("parallelization", "pp") != "pp":
        raise UnsupportedError(f"{file} lists files of several tensor ranks without saying whose each is")
    return files.needed_config([folder]), _united(paths, files)


def _beside(listed: object, file: Path) -> list[Path]:
    """The files of a list, which are looked for beside it: whoever wrote it may have put down where they were then."""
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed) or len(listed) > 100_000:
        raise CheckpointError(f"{file} has no list of files under checkpoints")
    paths = [file.parent / Path(name).name for name in listed]
    for name, path in zip(listed, paths, strict=True):
        if not name.isprintable() or not path.is_file():
            raise CheckpointError(f"{file} lists {name!r}, which is not a file beside it")
    return paths


def _ranks(paths: Sequence[Path], fields: Mapping[str, Any], file: Path) -> list[list[Path]]:
    """The files of each tensor rank. Raises CheckpointError unless all have as many as the first."""
    found: dict[int, dict[int, Path]] = {}
    for path in paths:
        if not (match := PIECE.fullmatch(path.name)):
            raise CheckpointError(f"{file} lists {path.name}, which does not say whose part of the model it is")
        found.setdefault(int(match[1]), {})[int(match[2])] = path
    size = fields.get("tp_size", len(found))
    if not found or found.keys() != set(range(len(found))) or size != len(found):
        raise CheckpointError(
            f"{file} lists files of the ranks {sorted(found)}, and there should be {size!r} from 0 on"
        )
    if any(pieces.keys() != set(range(len(found[0]))) for pieces in found.values()):
        raise CheckpointError(f"{file} does not list as many files of every rank, numbered from 0")
    return [[found[rank][piece] for piece in sorted(found[rank])] for rank in sorted(found)]


def _united(paths: Sequence[Path], files: _Files) -> Tensors:
    tensors: Tensors = {}
    for path in paths:
        tensors |= _new(files.weights(path), tensors, path)
    if paths and not tensors and len(paths) > 1:
        raise CheckpointError(f"{paths[0].parent} holds no tensors in {len(paths)} files")
    return tensors


def _new(tensors: Tensors, known: Mapping[str, SourceTensor], path: Path) -> Tensors:
    """The same tensors, none of which was known."""
    if twice := tensors.keys() & known.keys():
        raise CheckpointError(f"{path} holds {min(twice)}, which another of the files holds, too")
    return tensors


# ---- an engine's states


def _states(path: Path) -> Path:
    """The folder with an engine's files: the one given, what `latest` names, or the only one in it."""
    found = _folders(path)
    if path not in found and (path / LATEST).is_file():
        with (path / LATEST).open("rb") as file:
            tag = file.read(256).decode("latin-1").strip()
        if not TAG.fullmatch(tag) or path / tag not in found:
            raise CheckpointError(f"{path / LATEST} names {tag!r}, which is no folder there with DeepSpeed's files")
        return path / tag
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise CheckpointError(f"{path} holds several of DeepSpeed's checkpoints ({names}) and no {LATEST}; give one")
    return found[0]


def _folders(path: Path) -> list[Path]:
    """The folder itself where an engine's files are in it, or else those in it that have some."""
    if _has_states(path):
        return [path]
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and _has_states(entry))


def _has_states(path: Path) -> bool:
    kinds = (RANK, LAYER, ZERO_WEIGHTS, OPTIMIZER)
    return path.is_dir() and any(kind.fullmatch(entry.name) for entry in path.iterdir() for kind in kinds)


def _of_states(path: Path, folder: Path, files: _Files) -> tuple[ModelConfig, Tensors]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    if pieces := next((name for name in names if ZERO_WEIGHTS.fullmatch(name)), None):
        raise UnsupportedError(f"{folder / pieces} holds pieces of weights, as ZeRO stage 3 cuts them; {CONSOLIDATE}")
    if any(LAYER.fullmatch(name) for name in names):
        return _of_layers(path, folder, names, files)
    ranks = [folder / name for name in names if RANK.fullmatch(name)]
    if not ranks:
        raise UnsupportedError(f"{folder} holds an optimizer's pieces of the weights, as ZeRO cuts them; {CONSOLIDATE}")
    wanted = [f"mp_rank_{i:02}_model_states.pt" for i in range(len(ranks))]
    if absent := next((name for name in wanted if not (folder / name).is_file()), None):
        raise CheckpointError(f"{folder / absent} is missing, and {ranks[-1].name} is there")
    return _of_ranks(path, folder, ranks, files)


def _of_ranks(path: Path, folder: Path, paths: Sequence[Path], files: _Files) -> tuple[ModelConfig, Tensors]:
    """Files that hold a `module`, one of each tensor rank, in order."""
    opened = [files.torch(file, weights_only=False) for file in paths]
    ranks = [(file.file.path, file.tensors(_module(file))) for file in opened]
    if any(name.startswith("language_model.") for name in ranks[0][1]):
        return _of_megatron(path, folder, stage(ranks), opened[0], files)
    config = files.needed_config([path, folder])
    return config, whole([named for _, named in ranks], config, folder)


def _module(file: TorchFile) -> object:
    content = file.content if isinstance(file.content, dict) else {}
    module = content.get("module", content.get("model"))
    if not isinstance(module, dict) or not module:
        raise CheckpointError(f"{file.file.path} holds no module, so there are no weights in it")
    return module


def _of_layers(path: Path, folder: Path, names: Sequence[str], files: _Files) -> tuple[ModelConfig, Tensors]:
    """Files of a layer each; what it is, is seen by what it holds."""
    layers: dict[int, dict[int, Path]] = {}
    for name in names:
        if match := LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), {})[int(match[2] or 0)] = folder / name
    n_ranks = 1 + max(rank for ranks in layers.values() for rank in ranks)
    by_rank: list[Tensors] = [{} for _ in range(n_ranks)]
    transformer: list[int] = []
    for layer in sorted(layers):
        if layers[layer].keys() != set(range(n_ranks)):
            raise CheckpointError(f"{folder} has files of layer {layer} of some of its {n_ranks} tensor ranks only")
        for rank, file in sorted(layers[layer].items()):
            named = files.weights(file)
            if rank == 0 and "input_layernorm.weight" in named:
                transformer.append(layer)
            renamed = {_megatron_name(name, named, len(transformer) - 1, file): t for name, t in named.items()}
            by_rank[rank] |= _new(renamed, by_rank[rank], file)
    if transformer and transformer[-1] - transformer[0] + 1 != len(transformer):
        absent = min(set(range(transformer[0], transformer[-1])) - set(transformer))
        raise CheckpointError(f"{folder} lacks the files of layer {absent}")
    paths = [min(ranks[rank] for ranks in layers.values()) for rank in range(n_ranks)]
    first = folder / "mp_rank_00_model_states.pt"
    keeper = files.torch(first, weights_only=False) if first.is_file() else None
    return _of_megatron(path, folder, stage(list(zip(paths, by_rank, strict=True))), keeper, files)


def _megatron_name(name: str, layer: Mapping[str, object], number: int, file: Path) -> str:
    """The name that a tensor of a layer's file has in Megatron's whole model."""
    if "input_layernorm.weight" in layer:
        return f"{LAYERS}.{number}.{name}"
    if "word_embeddings.weight" in layer:
        return EMBEDDING if name == "word_embeddings.weight" else f"{file.name}/{name}"
    if layer.keys() == {"weight"}:
        return FINAL_NORM
    if layer.keys() == {"lm_head.weight"}:
        return OUTPUT
    raise CheckpointError(f"{file} holds {name}, and is neither an embedding, a layer, a norm nor a head")


def _of_megatron(
    path: Path, folder: Path, only: Stage, keeper: TorchFile | None, files: _Files
) -> tuple[ModelConfig, Tensors]:
    embedding = Stacked.whole(only.take(EMBEDDING))
    config = files.config([path, folder]) or _config_of_arguments(keeper, embedding.shape[0], folder)
    if config.model_type not in ("llama", "yuan"):
        raise UnsupportedError(
            f"{folder} is of Megatron-DeepSpeed, of which fourfold reads Llama and Yuan 2.0, not {config.model_type}"
        )
    embedded = {"model.embed_tokens.weight": vocabulary(embedding, config, folder)}
    return config, embedded | joined([only], config, folder)


def _config_of_arguments(keeper: TorchFile | None, vocab_rows: int, folder: Path) -> ModelConfig:
    kept = keeper.content.get("args") if keeper and isinstance(keeper.content, dict) else None
    arguments = kept.state if isinstance(kept, Call) else None
    if keeper is None or not isinstance(arguments, dict) or "use_lf_gate" not in arguments:
        raise CheckpointError(
            f"{folder} keeps no arguments of a Yuan's training to say what the model is; put its {CONFIG} there"
        )
    return config_of_arguments(arguments, f"{keeper.file.path}, args,", vocab_rows)
