"""Checkpoints small enough to write in a test: the same random model as a Hugging Face directory and as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, TokenType
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Tensors = dict[str, NDArray[Any]]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "torch_dtype": "float32",
}
QWEN2 = CONFIG | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False}
YUAN = {
    "architectures": ["YuanForCausalLM"],
    "model_type": "yuan",
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 257,
}

GGUF_NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "self_attn.q_proj.": "attn_q.",
    "self_attn.k_proj.": "attn_k.",
    "self_attn.v_proj.": "attn_v.",
    "self_attn.o_proj.": "attn_output.",
    "mlp.gate_proj.": "ffn_gate.",
    "mlp.up_proj.": "ffn_up.",
    "mlp.down_proj.": "ffn_down.",
    "self_attn.q_norm.": "attn_q_norm.",
    "self_attn.k_norm.": "attn_k_norm.",
    "self_attn.qkv_proj.": "attn_qkv.",
    "mlp.gate_up_proj.": "ffn_up.",
}
GGUF_GEMMA3_NAMES = {
    "post_attention_layernorm.": "post_attention_norm.",
    "pre_feedforward_layernorm.": "ffn_norm.",
    "post_feedforward_layernorm.": "post_ffw_norm.",
}
GGUF_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}  # of model types that GGUF names otherwise


def tensors(config: dict[str, Any]) -> Tensors:
    """Every tensor of a model, float32, by Hugging Face's names."""
    c, rng = config, np.random.default_rng(1)
    dim, hidden, n_heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    head_dim = c.get("head_dim", dim // n_heads)
    q_dim, kv_dim = head_dim * n_heads, head_dim * c.get("num_key_value_heads", n_heads)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], dim)}
    for i in range(c["num_hidden_layers"]):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (dim,),
            "self_attn.q_proj.weight": (q_dim, dim),
            "self_attn.k_proj.weight": (kv_dim, dim),
            "self_attn.v_proj.weight": (kv_dim, dim),
            "self_attn.o_proj.weight": (dim, q_dim),
            "post_attention_layernorm.weight": (dim,),
            "mlp.gate_proj.weight": (hidden, dim),
            "mlp.up_proj.weight": (hidden, dim),
            "mlp.down_proj.weight": (dim, hidden),
        }
        if c["model_type"] == "phi3":
            for part in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"):
                del layer[f"{part}_proj.weight"]
            layer["self_attn.qkv_proj.weight"] = (q_dim + 2 * kv_dim, dim)
            layer["mlp.gate_up_proj.weight"] = (2 * hidden, dim)
        if c["model_type"] in ("qwen3", "gemma3_text"):
            layer |= {f"self_attn.{p}_norm.weight": (head_dim,) for p in "qk"}
        if c["model_type"] == "gemma3_text":
            layer |= {f"{p}_feedforward_layernorm.weight": (dim,) for p in ("pre", "post")}
        if c["model_type"] == "qwen2":
            layer |= {f"self_attn.{p}_proj.bias": (n,) for p, n in (("q", dim), ("k", kv_dim), ("v", kv_dim))}
        if c["model_type"] == "yuan":
            layer |= {
                "self_attn.lf_gate.conv1.weight": (dim // 2, dim, 2, 1),
                "self_attn.lf_gate.conv1.bias": (dim // 2,),
                "self_attn.lf_gate.conv2.weight": (dim, dim // 2, 2, 1),
                "self_attn.lf_gate.conv2.bias": (dim,),
                "self_attn.lf_gate.output_layernorm.weight": (dim,),
            }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (dim,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], dim)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def balanced(config: dict[str, Any]) -> Tensors:
    """The same, such that every one of them matters and nothing grows.

    Matrices and filters keep the size of what goes through them, norms are about 1 (Gemma's as differences from it).
    """
    out, middle = {}, 0 if config["model_type"] == "gemma3_text" else 1
    for name, values in tensors(config).items():
        if values.ndim > 1:
            values = values / np.sqrt(values[0].size)
        elif "norm" in name:
            values = middle + values / 10
        out[name] = values.astype(np.float32)
    return out


def golden(shared: Path, name: str) -> tuple[dict[str, Any], Tensors]:
    """The config and the weights of a golden, without the copy of its embedding and its rotary frequencies."""
    path = shared / "golden" / name
    weights = load_file(path / "model.safetensors")
    needed = {n: weight for n, weight in weights.items() if n != "lm_head.weight" and not n.endswith("inv_freq")}
    return json.loads((path / "config.json").read_text()), needed


def write_huggingface(path: Path, config: dict[str, Any], weights: Tensors, shards: int = 1) -> Path:
    """A directory with its weights in one file, or in shards with an index."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, path / "model.safetensors")
        return path
    index = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(weights.items())[i::shards])
        save_file(part, path / name)
        index |= dict.fromkeys(part, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def write_gguf(
    path: Path,
    config: dict[str, Any],
    weights: Tensors,
    *,
    metadata: dict[str, Any] | None = None,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:
    """A GGUF file with a byte-level BPE tokenizer; `metadata` replaces or adds keys, and None takes one away.

    Matrices are stored as `kind` where their rows are whole blocks of it, else as float32 as vectors are.
    """
    c = config
    arch = GGUF_ARCHITECTURES.get(c["model_type"], c["model_type"])
    vocab, types, merges = byte_level_vocabulary()
    values: dict[str, Any] = {
        f"{arch}.block_count": c["num_hidden_layers"],
        f"{arch}.context_length": c["max_position_embeddings"],
        f"{arch}.embedding_length": c["hidden_size"],
        f"{arch}.feed_forward_length": c["intermediate_size"],
        f"{arch}.attention.head_count": c["num_attention_heads"],
        f"{arch}.attention.head_count_kv": c["num_key_value_heads"],
        f"{arch}.attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        f"{arch}.rope.freq_base": c.get("rope_theta", 10000.0),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    } | (metadata or {})
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", arch))
    for key, value in values.items():
        _add(writer, key, value)
    for name, weight in weights.items():
        ours = name
        for theirs, short in (GGUF_NAMES | (GGUF_GEMMA3_NAMES if arch == "gemma3" else {})).items():
            ours = ours.replace(theirs, short)
        if arch == "gemma3" and ours.endswith("norm.weight"):
            weight = weight + 1
        if arch == "llama" and ".attn_q." in ours:
            weight = permuted(weight, c["num_attention_heads"])
        if arch == "llama" and ".attn_k." in ours:
            weight = permuted(weight, c["num_key_value_heads"])
        if weight.ndim == 2 and kind != GGMLQuantizationType.F32 and weight.shape[1] % GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(ours, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(ours, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            pass
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def permuted(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of q or k as GGUF has them for Llama: within a head, row j of each half in turn."""
    rows = np.arange(len(weight)).reshape(heads, 2, -1)
    return np.ascontiguousarray(weight[rows.transpose(0, 2, 1).ravel()])


def byte_level_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """256 bytes in GPT-2's alphabet, two control tokens, a user-defined one, three merges, and padding up to 264."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    space = alphabet[ord(" ")]
    tokens = [alphabet[byte] for byte in range(256)]
    tokens += ["<|start|>", "<|end|>", "<|tool|>", "he", "ll", space + "he", "[PAD262]", "[PAD263]"]
    normal, control, user, unused = TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED
    types = [*[normal] * 256, control, control, user, *[normal] * 3, unused, unused]
    return tokens, [int(kind) for kind in types], ["h e", "l l", f"{space} he"]
