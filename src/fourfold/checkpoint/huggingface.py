"""Hugging Face directories: `config.json` and weights in one file or in shards, rows read as they are asked for.

The weights are safetensors, or files of `torch.save` (*.bin), whose pickles are read as data and never executed. Where
`config.json` has a `quantization_config`, its method's reader puts the codes and scales of each matrix together.
"""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from fourfold.checkpoint import awq, bnb, compressed_tensors, gptq, torch_file
from fourfold.checkpoint.coded import CodedTensor, Parts
from fourfold.checkpoint.complete import HEAD
from fourfold.checkpoint.fields import Fields, check, check_names
from fourfold.checkpoint.hf_config import model_config
from fourfold.checkpoint.source import FileTensor, Source, SourceFile, fingerprint, one_line, read_json
from fourfold.checkpoint.tokenizer_files import find_tokenizer
from fourfold.config import ModelConfig
from fourfold.errors import CheckpointError, UnsupportedError
from fourfold.models import weight_specs

if TYPE_CHECKING:
    from fourfold.models.rows import SourceTensor

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
CODE_DTYPES = {"U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
METHODS: dict[str, Callable[[Fields, Parts], dict[str, CodedTensor]]] = {
    "bitsandbytes": bnb.read,
    "gptq": gptq.read,
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
}


@dataclass(frozen=True)
class _Form:
    """One way to store weights: the name of a single file, of the index of several, of any, and its reader."""

    single: str
    index: str
    pattern: str
    tensors: Callable[[SourceFile], Mapping[str, SourceTensor]]


def open_huggingface(path: Path) -> Source:
    """The model in a directory. Raises CheckpointError or UnsupportedError, in a sentence that names what is wrong."""
    config_file = path / "config.json"
    if not config_file.is_file():
        raise CheckpointError(
            f"{path} has no config.json and no mp_rank_00, so it is no model of Hugging Face or Megatron"
        )
    fields = read_json(config_file)
    if "fourfold" in fields:
        raise CheckpointError(f"{path} is converted already; give the model that it was converted from")
    quantization = Fields(fields, str(config_file)).fields("quantization_config")
    fields.pop("quantization_config", None)
    config = _with_generation_eos(model_config(fields, str(config_file)), path / "generation_config.json")
    form, shards = _shards(path)
    files: list[SourceFile] = []
    tensors: dict[str, SourceTensor] = {}
    for shard, listed in shards.items():
        file = SourceFile(shard)
        files.append(file)
        found = form.tensors(file)
        for name in listed - found.keys():
            raise CheckpointError(f"{path / form.index} places the tensor {name} in {shard.name}, which lacks it")
        for name in found.keys() - listed if listed else ():
            raise CheckpointError(f"{shard} holds the tensor {name}, which {form.index} does not place there")
        tensors |= found
    notes = []
    if fields["model_type"] == "gemma3":
        n_all, tensors = len(tensors), _text_part(tensors)
        if n_unread := n_all - len(tensors):
            unread = "1 tensor" if n_unread == 1 else f"{n_unread} tensors"
            notes.append(
                f"{path} also sees: {unread} of its vision tower and projector {'is' if n_unread == 1 else 'are'} not"
                " read, and images are refused; the text part runs"
            )
    tensors = _decoded(quantization, tensors, config, path)
    tokenizer = find_tokenizer([path])
    return Source(
        path=path,
        config=config,
        tensors=tensors,
        tokenizer_files=tokenizer,
        fingerprint=fingerprint(config, [config_file, *shards, *tokenizer.values()]),
        _files=files,
        notes=tuple(notes),
    )


def _decoded(
    quantization: Fields, tensors: Mapping[str, SourceTensor], config: ModelConfig, path: Path
) -> dict[str, SourceTensor]:
    """The tensors, codes and scales put together. Raises UnsupportedError for types and methods that are not read."""
    coded: dict[str, CodedTensor] = {}
    rest = dict(tensors)
    if list(quantization):
        method = quantization.text("quant_method")
        if method not in METHODS:
            raise UnsupportedError(
                f"{quantization.where} names the quant_method {method[:80]!r}; fourfold reads {', '.join(METHODS)}, and"
                " what is not quantized"
            )
        plain = {name: tensor for name, tensor in rest.items() if isinstance(tensor, FileTensor)}
        parts = Parts(plain, str(path))
        coded = METHODS[method](quantization, parts)
        if not coded:
            raise CheckpointError(f"{quantization.where} says {method}, but {path} has none of its tensors")
        rest = {name: tensor for name, tensor in rest.items() if name in parts or name not in plain} | coded
        for name in _empty_biases(rest, coded, config):
            del rest[name]
        if config.tie_embeddings and HEAD in coded:
            raise UnsupportedError(f"{path} quantizes {HEAD}, though its config.json ties it to the embedding")
    for name, tensor in rest.items():
        if isinstance(tensor, FileTensor) and tensor.dtype in CODE_DTYPES.values():
            stored_as = next(name for name, dtype in CODE_DTYPES.items() if dtype == tensor.dtype)
            raise UnsupportedError(
                f"{path}: tensor {name} is {stored_as}; fourfold reads only {', '.join(DTYPES)} and the codes"
                " of a quantization_config"
            )
    return rest


def _empty_biases(
    tensors: Mapping[str, SourceTensor], coded: Mapping[str, CodedTensor], config: ModelConfig
) -> list[str]:
    """Biases of zeros that a quantized linear was given though the model has none, as older AutoGPTQ did."""
    needed = {name for spec in weight_specs(config) for name in spec.rows.names}
    biases = [bias for name in coded if (bias := f"{name.removesuffix('weight')}bias") in tensors.keys() - needed]
    return [bias for bias in biases if not np.any(tensors[bias].rows(0, tensors[bias].shape[0]))]


def safetensors(file: SourceFile) -> dict[str, FileTensor]:
    """The tensors of one safetensors file, whose header the `safetensors` library has found to be sound.

    Raises CheckpointError for a damaged file, UnsupportedError for a tensor of a type that no weight or code has.
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
        dtype = (DTYPES | CODE_DTYPES).get(entry["dtype"])
        if dtype is None:
            raise UnsupportedError(
                f"{file.path}: tensor {name} is {entry['dtype']}; fourfold reads only {', '.join(DTYPES)}"
            )
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = FileTensor(file, start, dtype, tuple(entry["shape"]))
    return tensors


_FORMS = (
    _Form("model.safetensors", "model.safetensors.index.json", "*.safetensors", safetensors),
    _Form("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin", torch_file.weights),
)


def _shards(path: Path) -> tuple[_Form, dict[Path, set[str]]]:
    """The first form that is there, and its files, each with the tensors that the index places in it.

    Where there is no index, no tensors are listed.
    """
    for form in _FORMS:
        if (path / form.single).is_file():
            return form, {path / form.single: set()}
        if (path / form.index).is_file():
            return form, _indexed(path, form)
        found = sorted(path.glob(form.pattern))
        if len(found) > 1:
            raise CheckpointError(f"{path} has {len(found)} {form.pattern} but no {form.index} to say what is in them")
        if found:
            return form, {found[0]: set()}
    raise CheckpointError(f"{path} has no {' and no '.join(form.pattern for form in _FORMS)}, so there are no weights")


def _indexed(path: Path, form: _Form) -> dict[Path, set[str]]:
    file = path / form.index
    index = read_json(file).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
        raise CheckpointError(f"{file} has no weight_map from tensors to files")
    check_names(index, str(file))
    shards: dict[Path, set[str]] = {}
    for name, shard in index.items():
        if shard != Path(shard).name or not (path / shard).is_file():
            raise CheckpointError(f"{file} places the tensor {name} in {shard!r}, which is not a file beside it")
        shards.setdefault(path / shard, set()).add(name)
    return shards


_SEES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def _text_part(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Of Gemma 3 that also sees: what speaks, by the names that a model has that speaks alone."""

    def name(theirs: str) -> str:
        for prefix in ("language_model.model.", "model.language_model."):
            if theirs.startswith(prefix):
                return "model." + theirs.removeprefix(prefix)
        return theirs.removeprefix("language_model.")

    return {name(theirs): tensor for theirs, tensor in tensors.items() if not _SEES.match(theirs)}


def _with_generation_eos(config: ModelConfig, file: Path) -> ModelConfig:
    """`generation_config.json` may name more tokens that end an answer, as Llama 3 and Qwen2 do."""
    if not file.is_file():
        return config
    more = Fields(read_json(file), str(file)).ids("eos_token_id")
    return check(dataclasses.replace(config, eos_ids=tuple(dict.fromkeys((*config.eos_ids, *more)))), str(file))
