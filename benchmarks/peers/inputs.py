"""The whole models that peers are given: a published one as it is, and one of random weights in the form each reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from fourfold.bench.model import prompt_flop
from fourfold.checkpoint.fourfold_dir import open_directory
from fourfold.config import ModelConfig
from fourfold.locate import fourfold_directory, source_path
from fourfold.models.shapes import SHAPES
from fourfold.progress import bar
from fourfold.synth import synthesize
from fourfold.tokenizer import Tokenizer
from peers.work import PROMPT, Work, model

QUESTION, ANSWER = "The capital of France is", " Paris"
CONTEXT = 2 * PROMPT
BLOCK, BLOCK_BYTES = 32, 18  # of Q4_0: an f16 scale and 32 codes
CODE_SIGMA = 4.61  # of a code drawn evenly from -8..7


def smollm2() -> Work:
    """SmolLM2-135M-Instruct: the bundled GGUF file, read by every peer in its own way."""
    gguf, directory = source_path("smollm2"), fourfold_directory("smollm2")
    tokenizer = Tokenizer.from_directory(directory)
    known = {"ids": tokenizer.encode(QUESTION), "next": tokenizer.encode(ANSWER)[0]}
    subject = {"known": known, **_subject(gguf, directory, "Q4_1")}
    return model("smollm2", "SmolLM2-135M", subject, decode=32, flop=_flop(directory), memory_bytes=2 * 10**9)


def llama_3b(cache: Path) -> Work:
    """A Llama of 2.9 billion random weights; its files are made once and kept in the cache."""
    config = SHAPES["llama-3b"]
    directory, gguf = cache / "models" / "llama-3b-nf4", cache / "models" / "llama-3b-q4_0.gguf"
    directory.parent.mkdir(parents=True, exist_ok=True)
    if not directory.exists():
        with bar("writing llama-3b") as report:
            synthesize(config, directory, "nf4", progress=report)
    if not gguf.exists():
        _write_gguf(config, gguf)
    subject = {"shape": _transformers_shape(config), **_subject(gguf, directory, "Q4_0")}
    return model("llama-3b", "Llama of 2.9 B", subject, decode=8, flop=_flop(directory), memory_bytes=6 * 10**9)


def _flop(directory: Path) -> tuple[float, float]:
    stored = open_directory(directory)
    return prompt_flop(stored, 1), prompt_flop(stored, PROMPT)


def _subject(gguf: Path, directory: Path, gguf_type: str) -> dict[str, Any]:
    """What the workers of a model are told. The embedding is the head of both models, so every tensor is read."""
    n_bytes = sum(int(tensor.n_bytes) for tensor in GGUFReader(gguf).tensors)
    return {
        "fourfold": str(directory),
        "gguf": str(gguf),
        "gguf_type": gguf_type,
        "gguf_bytes": n_bytes,
        "vocab_size": open_directory(directory).config.vocab_size,
        "context": CONTEXT,
    }


def _transformers_shape(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": CONTEXT,
    }


def _write_gguf(config: ModelConfig, path: Path) -> None:
    """A Llama of random Q4_0 blocks, the head and embedding too; its tokenizer is the beginning of SmolLM2's."""
    temporary = path.with_suffix(".part")
    writer = GGUFWriter(temporary, "llama")
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size)
    tensors = dict(_shapes(config))
    for name, shape in tensors.items():
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            row_bytes = shape[1] // BLOCK * BLOCK_BYTES
            writer.add_tensor_info(
                name, (shape[0], row_bytes), np.dtype(np.uint8), shape[0] * row_bytes, GGMLQuantizationType.Q4_0
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    with bar("writing llama-3b for llama.cpp", unit="tensors") as report:
        for done, shape in enumerate(tensors.values(), 1):
            writer.write_tensor_data(np.ones(shape, np.float32) if len(shape) == 1 else _blocks(random, *shape))
            report(done, len(tensors))
    writer.close()
    os.replace(temporary, path)


def _shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, h, kv = config.dim, config.hidden_dim, config.n_kv_heads * config.head_dim
    q = config.n_heads * config.head_dim
    yield "token_embd.weight", (config.vocab_size, d)
    for i in range(config.n_layers):
        yield f"blk.{i}.attn_norm.weight", (d,)
        yield f"blk.{i}.attn_q.weight", (q, d)
        yield f"blk.{i}.attn_k.weight", (kv, d)
        yield f"blk.{i}.attn_v.weight", (kv, d)
        yield f"blk.{i}.attn_output.weight", (d, q)
        yield f"blk.{i}.ffn_norm.weight", (d,)
        yield f"blk.{i}.ffn_gate.weight", (h, d)
        yield f"blk.{i}.ffn_up.weight", (h, d)
        yield f"blk.{i}.ffn_down.weight", (d, h)
    yield "output_norm.weight", (d,)


def _blocks(random: np.random.Generator, n: int, k: int) -> NDArray[np.uint8]:
    """Q4_0 of random codes, of standard deviation k^-1/2: (N, bytes of a row)."""
    blocks = random.integers(0, 256, (n, k // BLOCK, BLOCK_BYTES), np.uint8)
    blocks[..., :2] = np.frombuffer(np.float16(k**-0.5 / CODE_SIGMA).tobytes(), np.uint8)
    return blocks.reshape(n, -1)


def _add_tokenizer(writer: GGUFWriter, n_tokens: int) -> None:
    fields = {name: field.contents() for name, field in GGUFReader(source_path("smollm2")).fields.items()}
    tokens = fields["tokenizer.ggml.tokens"][:n_tokens]
    known = set(tokens)
    merges = [m for m in fields["tokenizer.ggml.merges"] if known.issuperset([*m.split(" "), m.replace(" ", "", 1)])]
    writer.add_tokenizer_model(fields["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(fields["tokenizer.ggml.token_type"][:n_tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(fields["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(fields["tokenizer.ggml.eos_token_id"])
