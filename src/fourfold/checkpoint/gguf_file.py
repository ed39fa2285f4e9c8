"""GGUF files, under Hugging Face's names and in its row order; rows are dequantized when read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from fourfold.checkpoint.gguf_config import RopeTensors, model_config, notes
from fourfold.checkpoint.gguf_header import TensorInfo, read_header
from fourfold.checkpoint.gguf_tokenizer import tokenizer_files
from fourfold.checkpoint.source import FileTensor, Source, SourceFile, fingerprint
from fourfold.config import ModelConfig
from fourfold.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from fourfold.models.rows import SourceTensor

_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_NAMES = {EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", HEAD: "lm_head.weight"}
_IN_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_qkv.weight": "self_attn.qkv_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_IN_LAYER_OF = {  # where an architecture means another tensor
    "phi3": {"ffn_up.weight": "mlp.gate_up_proj.weight"},
    "gemma3": {
        "post_attention_norm.weight": "post_attention_layernorm.weight",
        "ffn_norm.weight": "pre_feedforward_layernorm.weight",
        "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    },
}


def open_gguf(path: Path) -> Source:
    """The model in a GGUF file. Raises CheckpointError or UnsupportedError, in a sentence that names what is wrong."""
    file = SourceFile(path)
    header = read_header(file)
    raw = {name: _tensor(file, name, info) for name, info in header.tensors.items()}
    if EMBEDDING not in raw:
        raise CheckpointError(f"{path} lacks the tensor {EMBEDDING}")
    config = model_config(
        header.metadata,
        str(path),
        vocab_size=raw[EMBEDDING].shape[0],
        tie_embeddings=HEAD not in raw,
        rope=RopeTensors.taken(raw),
    )
    return Source(
        path=path,
        config=config,
        tensors=_renamed(raw, config),
        tokenizer_files=tokenizer_files(header.metadata, config, str(path)),
        fingerprint=fingerprint(config, [path]),
        _files=[file],
        notes=notes(config, str(path)),
    )


def _tensor(file: SourceFile, name: str, info: TensorInfo) -> SourceTensor:
    if info.kind in _PLAIN:
        return FileTensor(file, info.offset, _PLAIN[info.kind], info.shape)
    if not _can_dequantize(info.kind):
        raise UnsupportedError(f"{file.path}: tensor {name} is {info.kind.name}, which fourfold cannot dequantize")
    return QuantizedTensor(file, info.offset, info.kind, info.shape)


@cache
def _can_dequantize(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _renamed(raw: Mapping[str, SourceTensor], config: ModelConfig) -> dict[str, SourceTensor]:
    """By Hugging Face's names; what has none keeps its own, for `check_complete` to refuse."""
    tensors: dict[str, SourceTensor] = {}
    in_layer = _IN_LAYER | _IN_LAYER_OF.get(config.model_type, {})
    for name, tensor in raw.items():
        layer = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        part = layer[2] if layer else ""
        if config.model_type in ("llama", "mistral") and part in ("attn_q.weight", "attn_k.weight"):
            tensor = Unpermuted(tensor, config.head_dim)
        if config.model_type == "gemma3" and name.endswith("norm.weight"):
            tensor = LessOne(tensor)
        ours = f"model.layers.{layer[1]}.{in_layer[part]}" if layer and part in in_layer else _NAMES.get(name, name)
        tensors[ours] = tensor
    return tensors


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor whose rows are runs of quantized blocks; they are read as float32."""

    file: SourceFile
    offset: int
    kind: GGMLQuantizationType
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        assert 0 <= start <= stop <= self.shape[0]
        if len(self.shape) == 1:  # one run of blocks, so that elements cannot be read alone
            return self._runs(0, 1, self.shape[0])[0, start:stop]
        return self._runs(start, stop, math.prod(self.shape[1:])).reshape(stop - start, *self.shape[1:])

    def _runs(self, start: int, stop: int, width: int) -> NDArray[np.float32]:
        """Runs [start, stop) of `width` elements each, (stop - start, width)."""
        if start == stop:  # which `dequantize` cannot do
            return np.empty((0, width), np.float32)
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        run_bytes = width // block * block_bytes
        packed = self.file.read(self.offset + start * run_bytes, self.offset + stop * run_bytes)
        with np.errstate(all="ignore"):  # a damaged scale may be infinite
            values: NDArray[np.float32] = dequantize(packed.reshape(stop - start, run_bytes), self.kind)
        return values


@dataclass(frozen=True)
class LessOne:
    """Gemma's norm weights, to which GGUF has added the 1 that Hugging Face leaves to the model."""

    tensor: SourceTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def rows(self, start: int, stop: int) -> NDArray[np.generic]:
        return self.tensor.rows(start, stop).astype(np.float32) - np.float32(1)


@dataclass(frozen=True)
class Unpermuted:
    """Llama's q or k, whose rows GGUF reorders in each head, so that dimensions rotated together are neighbours.

    Row 2j+i of a head in the file is row i·D/2 + j of that head in Hugging Face's order, D = head_dim.
    """

    tensor: SourceTensor
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def rows(self, start: int, stop: int) -> NDArray[np.generic]:
        d = self.head_dim
        first, last = start // d, -(-stop // d)
        heads = self.tensor.rows(first * d, last * d)
        halves = heads.reshape(last - first, d // 2, 2, -1).swapaxes(1, 2).reshape(heads.shape)
        return halves[start - first * d : stop - first * d]
