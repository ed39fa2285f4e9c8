"""What DeepSpeed saves of a model, written without it: shards of its automatic tensor parallelism, files of an engine,
files of Megatron-DeepSpeed's pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import megatron_writer
import torch_writer
from torch_writer import Storages, namespace, ordered

Config = Mapping[str, Any]
Tensors = dict[str, NDArray[Any]]


def bounds(sizes: list[int], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def shard(config: Config, name: str, tensor: NDArray[Any], rank: int, ranks: int) -> tuple[str, NDArray[Any]]:
    """A rank's part and its name: by KV heads, or 64 units of a feed-forward layer or of the head's inputs."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)

    def by_heads(n: int) -> slice:
        return bounds([n // kv_heads * (kv_heads // ranks + (i < kv_heads % ranks)) for i in range(ranks)], rank)

    def by_units(n: int) -> slice:
        sizes = [64 * (n // 64 // ranks + (i < n // 64 % ranks)) for i in range(ranks)]
        return bounds([*sizes[:-1], sizes[-1] + n % 64], rank)

    def of_values(n: int) -> list[int]:
        """Yuan's: the heads whose queries and keys a rank has, q_proj's first and then k_proj's."""
        each, mine = n // heads, heads // ranks // 2
        found = [rank * mine + i for i in range(mine)]
        return [head * each + i for head in (*found, *(h + heads // 2 for h in found)) for i in range(each)]

    module, _, kind = name.rpartition(".")
    last, is_yuan = module.rpartition(".")[2], config["model_type"] == "yuan"
    match last:
        case "v_proj" if is_yuan:
            return name, tensor[of_values(len(tensor))]
        case "o_proj" if is_yuan:
            return name, tensor[:, of_values(tensor.shape[1])]
        case "q_proj" | "k_proj" | "v_proj":
            return name, tensor[by_heads(len(tensor))]
        case "gate_proj" | "up_proj":
            return name, tensor[by_units(len(tensor))]
        case "o_proj" if kind == "weight":
            return name, tensor[:, by_heads(tensor.shape[1])]
        case "down_proj" | "lm_head" if kind == "weight":
            return name, tensor[:, by_units(tensor.shape[1])]
    return name, tensor


def cut_filter(name: str, tensor: NDArray[Any], rank: int, ranks: int) -> tuple[str, NDArray[Any]]:
    """As DeepSpeed cuts Yuan's convolutions where it is given checkpoint files."""
    if ".conv1." in name:
        tensor = np.split(tensor, ranks)[rank]
    elif name.endswith(".conv2.weight"):
        tensor = np.split(tensor, ranks, axis=1)[rank]
    else:
        tensor = (tensor / ranks).astype(tensor.dtype)
    return name.replace("conv1.", "conv1.conv.").replace("conv2.", "conv2.conv."), tensor


def write_sharded(
    path: Path,
    config: Config,
    weights: Tensors,
    ranks: int,
    *,
    pieces: int = 3,
    filters: bool = False,
    outside: bool = False,
) -> Path:
    """`save_mp_checkpoint_path`. `filters` are cut; `outside`: what is in no layer stands in a file of its own."""
    path.mkdir()
    inside = {n: t for n, t in weights.items() if not outside or ".layers." in n}
    for rank in range(ranks):
        mine = {}
        for name, tensor in inside.items():
            cut = cut_filter if filters and ".conv" in name else None
            ours, part = cut(name, tensor, rank, ranks) if cut else shard(config, name, tensor, rank, ranks)
            mine[ours] = part
        for piece in range(pieces):
            torch_writer.write(path / f"tp_{rank:02}_{piece:02}.pt", dict(list(mine.items())[piece::pieces]))
    torch_writer.write(path / "non-tp.pt", {n: t for n, t in weights.items() if n not in inside})
    files = [f"tp_{rank:02}_{piece:02}.pt" for piece in range(pieces) for rank in range(ranks)]
    listing = {
        "type": "ds_model", "base_dir": "/where/it/was", "checkpoints": {"non_tp": ["non-tp.pt"], "tp": files},
        "version": 1.0, "parallelization": "tp", "tp_size": ranks, "dtype": "float32",
    }  # fmt: skip
    (path / "ds_inference_config.json").write_text(json.dumps(listing))
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_engine(path: Path, config: Config, modules: list[Any], *, tag: str = "global_step7") -> Path:
    """An engine's checkpoint: of each tensor rank what `modules` makes of its storages, and an optimizer's file."""
    (path / tag).mkdir(parents=True)
    for rank, module in enumerate(modules):
        storages = Storages()
        content = {
            "module": module(storages), "args": namespace(**megatron_writer.arguments(config)), "dp_world_size": 2,
            "optimizer": None, "ds_version": "0.19.8", "param_shapes": None, "global_steps": 7,
        }  # fmt: skip
        storages.write(path / tag / f"mp_rank_{rank:02}_model_states.pt", content)
        other = {"optimizer_state_dict": megatron_writer.optimizer(other_storages := Storages())}
        other_storages.write(path / tag / f"bf16_zero_pp_rank_0_mp_rank_{rank:02}_optim_states.pt", other)
    (path / "latest").write_text(tag)
    (path / "config.json").write_text(json.dumps(config))
    return path


def engine_of_huggingface(path: Path, config: Config, weights: Tensors, ranks: int) -> Path:
    def of(rank: int) -> Any:
        cut = dict(shard(config, name, tensor, rank, ranks) for name, tensor in weights.items())
        return lambda storages: ordered({name: storages.tensor(tensor) for name, tensor in cut.items()})

    return write_engine(path, config, [of(rank) for rank in range(ranks)])


def megatron_layer(config: Config, weights: Tensors, layer: int, rank: int, ranks: int) -> Tensors:
    def get(name: str) -> NDArray[Any]:
        return weights[f"model.layers.{layer}.{name}"]

    if config["model_type"] == "yuan":
        return megatron_writer.cut_layer(get, rank, ranks)
    kv_heads, dim = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
    grouped = [get(f"self_attn.{p}_proj.weight").reshape(kv_heads, -1, dim, config["hidden_size"]) for p in "qkv"]
    mine = np.split(np.concatenate(grouped, axis=1), ranks)[rank]  # of each KV head its queries, its key, its value
    gate, up = (np.split(get(f"mlp.{p}_proj.weight"), ranks)[rank] for p in ("gate", "up"))
    return {
        **{f"{norm}.weight": get(f"{norm}.weight") for norm in megatron_writer.NORMS},
        "self_attention.query_key_value.weight": mine.reshape(-1, config["hidden_size"]),
        "self_attention.dense.weight": np.split(get("self_attn.o_proj.weight"), ranks, axis=1)[rank],
        "mlp.dense_h_to_4h.weight": np.concatenate([gate, up]),
        "mlp.dense_4h_to_h.weight": np.split(get("mlp.down_proj.weight"), ranks, axis=1)[rank],
    }


def padded(tensor: NDArray[Any], multiple: int) -> NDArray[Any]:
    return np.concatenate([tensor, np.full((-len(tensor) % multiple, *tensor.shape[1:]), np.nan, tensor.dtype)])


def megatron_parts(config: Config, weights: Tensors, rank: int, ranks: int) -> list[Tensors]:
    """What a rank has of the embedding, of each layer, of the norm, and of the head where it is no embedding."""
    embedding = np.split(padded(weights["model.embed_tokens.weight"], 4 * ranks), ranks)[rank]
    layers = [megatron_layer(config, weights, i, rank, ranks) for i in range(config["num_hidden_layers"])]
    parts = [{"word_embeddings.weight": embedding}, *layers, {"weight": weights["model.norm.weight"]}]
    if "lm_head.weight" in weights:
        parts.append({"lm_head.weight": np.split(padded(weights["lm_head.weight"], 4 * ranks), ranks)[rank]})
    return parts


def write_layers(path: Path, config: Config, weights: Tensors, ranks: int, *, gap: int = 0) -> Path:
    """Megatron-DeepSpeed's pipeline; functions count as layers without files: one first, `gap` after the embedding."""
    write_engine(path, config, [lambda storages: None for _ in range(ranks)])
    for rank in range(ranks):
        for i, tensors in enumerate(megatron_parts(config, weights, rank, ranks)):
            name = f"layer_{1 + i + (gap if i else 0):02}-model_{rank:02}-model_states.pt"
            torch_writer.write(path / "global_step7" / name, tensors)
    return path


def engine_of_megatron(path: Path, config: Config, weights: Tensors, ranks: int) -> Path:
    """Megatron-DeepSpeed without a pipeline."""
    n_layers = config["num_hidden_layers"]

    def of(rank: int) -> Any:
        parts = megatron_parts(config, weights, rank, ranks)
        named = {f"layers.{i}.{name}": t for i, layer in enumerate(parts[1:][:n_layers]) for name, t in layer.items()}
        named["final_layernorm.weight"] = parts[1 + n_layers]["weight"]

        def module(storages: Storages) -> Any:
            words = ordered({"weight": storages.tensor(parts[0]["word_embeddings.weight"])})
            model = {
                "embedding": {"word_embeddings": words},
                "encoder": ordered({name: storages.tensor(tensor) for name, tensor in named.items()}),
            }
            if "lm_head.weight" in parts[-1]:
                model["output_layer"] = ordered({"weight": storages.tensor(parts[-1]["lm_head.weight"])})
            return {"language_model": model}

        return module

    return write_engine(path, config, [of(rank) for rank in range(ranks)])


def write_listed(path: Path, config: Config, weights: Tensors, files: int) -> Path:
    """`checkpoints.json`, as those write it who load large models with DeepSpeed."""
    path.mkdir()
    names = [f"part_{i}.bin" for i in range(files)]
    for i, name in enumerate(names):
        torch_writer.write(path / name, dict(list(weights.items())[i::files]))
    listing = {"type": "ds_model", "checkpoints": [f"/where/it/was/{name}" for name in names], "version": 1.0}
    (path / "checkpoints.json").write_text(json.dumps(listing))
    (path / "config.json").write_text(json.dumps(config))
    return path
