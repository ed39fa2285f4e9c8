"""Hugging Face directories: `config.json` and safetensors, in one file or sharded, read through a memory mapping."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from fourfold.checkpoint.fields import Fields, check, check_names
from fourfold.checkpoint.hf_config import model_config
from fourfold.checkpoint.source import MappedFile, MappedTensor, Source, fingerprint, one_line, read_json
from fourfold.config import ModelConfig
from fourfold.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from fourfold.models.rows import SourceTensor

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_huggingface(path: Path) -> Source:
    """The model in a directory. Raises CheckpointError or UnsupportedError, in a sentence that names what is wrong."""
    config_file = path / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{path} has no config.json, so it is not a Hugging Face model")
    fields = read_json(config_file)
    if "fourfold" in fields:
        raise CheckpointError(f"{path} is converted already; give the model that it was converted from")
    config = _with_generation_eos(model_config(fields, str(config_file)), path / "generation_config.json")
    shards = _shards(path)
    files: list[MappedFile] = []
    tensors: dict[str, SourceTensor] = {}
    for shard, listed in shards.items():
        file = MappedFile(shard)
        files.append(file)
        found = safetensors(file)
        for name in listed - found.keys():
            raise CheckpointError(f"{path / INDEX} places the tensor {name} in {shard.name}, which lacks it")
        for name in found.keys() - listed if listed else ():
            raise CheckpointError(f"{shard} holds the tensor {name}, which {INDEX} does not place there")
        tensors |= found
    tokenizer = {name: path / name for name in TOKENIZER_FILES if (path / name).is_file()}
    return Source(
        path=path,
        config=config,
        tensors=tensors,
        tokenizer_files=tokenizer,
        fingerprint=fingerprint(config, [config_file, *shards, *tokenizer.values()]),
        _files=files,
    )


def safetensors(file: MappedFile) -> dict[str, MappedTensor]:
    """The tensors of one safetensors file, whose header the `safetensors` library has found to be sound.

    Raises CheckpointError for a damaged file, UnsupportedError for a tensor not in float32, float16 or bfloat16.
    """
    try:
        with safe_open(file.path, framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file.path} is not a sound safetensors file: {one_line(error)}") from error
    (length,) = struct.unpack("<Q", file.read(0, 8).tobytes())
    header = json.loads(file.read(8, 8 + length).tobytes())
    header.pop("__metadata__", None)
    check_names(header, str(file.path))
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UnsupportedError(
                f"{file.path}: tensor {name} is {entry['dtype']}; fourfold reads only {', '.join(DTYPES)}"
            )
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = MappedTensor(file, start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return tensors


def _shards(path: Path) -> dict[Path, set[str]]:
    """The files with the weights, each with the tensors that the index places in it (none where there is no index)."""
    if (path / SINGLE).is_file():
        return {path / SINGLE: set()}
    if not (path / INDEX).is_file():
        return {_lone_file(path): set()}
    index = read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
        raise CheckpointError(f"{path / INDEX} has no weight_map from tensors to files")
    check_names(index, str(path / INDEX))
    shards: dict[Path, set[str]] = {}
    for name, shard in index.items():
        if shard != Path(shard).name or not (path / shard).is_file():
            raise CheckpointError(
                f"{path / INDEX} places the tensor {name} in {shard!r}, which is not a file beside it"
            )
        shards.setdefault(path / shard, set()).add(name)
    return shards


def _lone_file(path: Path) -> Path:
    match sorted(path.glob("*.safetensors")):
        case [only]:
            return only
        case []:
            if pickles := sorted(path.glob("*.bin")):
                raise UnsupportedError(
                    f"{path} has its weights in pickles ({pickles[0].name}), which fourfold never opens, since they can"
                    " run code; convert them to safetensors first"
                )
            raise CheckpointError(f"{path} has no *.safetensors, so there are no weights")
        case several:
            raise CheckpointError(f"{path} has {len(several)} *.safetensors but no {INDEX} to say what is in them")


def _with_generation_eos(config: ModelConfig, file: Path) -> ModelConfig:
    """`generation_config.json` may name more tokens that end an answer, as Llama 3 and Qwen2 do."""
    if not file.is_file():
        return config
    more = Fields(read_json(file), str(file)).ids("eos_token_id")
    return check(dataclasses.replace(config, eos_ids=tuple(dict.fromkeys((*config.eos_ids, *more)))), str(file))
