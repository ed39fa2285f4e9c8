"""A Megatron directory of a Yuan model, cut as Megatron cuts it into tensor ranks and pipeline stages, with the rest of
what its files hold: arguments, optimizer, random states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_writer import Global, Reduce, Storages, namespace, ordered

Tensors = Mapping[str, NDArray[Any]]
NORMS = ("input_layernorm", "post_attention_layernorm")
FILTER = ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "output_layernorm.weight")


def arguments(config: Mapping[str, Any], **changed: Any) -> dict[str, Any]:
    """Those that shape the model, and a few of the hundreds about training."""
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "kv_channels": config["hidden_size"] // config["num_attention_heads"],
        "max_position_embeddings": config["max_position_embeddings"],
        "padded_vocab_size": config["vocab_size"],
        "use_lf_gate": True, "lf_conv2d_group": 1, "lf_conv2d_num_pad": 1, "swiglu": True,
        "position_embedding_type": "rope", "rotary_percent": 1.0, "norm_dtype": "RMSNorm", "layernorm_epsilon": 1e-5,
        "add_bias_linear": False, "untie_embeddings_and_output_weights": False, "num_experts": None,
        "virtual_pipeline_model_parallel_size": None, "apply_residual_connection_post_layernorm": False,
        "params_dtype": Global("torch", "bfloat16"), "lr": 3e-5, "data_path": ["/data/one"], "rampup_batch_size": None,
    } | changed  # fmt: skip


def cut_layer(layer: Callable[[str], NDArray[Any]], rank: int, ranks: int) -> dict[str, NDArray[Any]]:
    """What one tensor rank holds of a layer whose tensors go by Hugging Face's names."""

    def rows(matrix: NDArray[Any]) -> NDArray[Any]:
        return np.split(matrix, ranks)[rank]

    def columns(matrix: NDArray[Any]) -> NDArray[Any]:
        return np.split(matrix, ranks, axis=1)[rank]

    query_key = np.concatenate([layer("self_attn.q_proj.weight"), layer("self_attn.k_proj.weight")])
    up, gate = rows(layer("mlp.up_proj.weight")), rows(layer("mlp.gate_proj.weight"))
    return {
        **{f"{norm}.weight": layer(f"{norm}.weight") for norm in NORMS},
        "self_attention.get_value.weight": rows(layer("self_attn.v_proj.weight")),
        "self_attention.get_query_key.weight": rows(query_key),
        **{f"self_attention.lf_gate.{name}": layer(f"self_attn.lf_gate.{name}") for name in FILTER},
        "self_attention.dense.weight": columns(layer("self_attn.o_proj.weight")),
        "mlp.dense_h_to_4h.weight": np.concatenate([up, gate]),
        "mlp.dense_4h_to_h.weight": columns(layer("mlp.down_proj.weight")),
    }


def rank_content(
    weights: Tensors, storages: Storages, rank: int, ranks: int, layers: Sequence[int], *, first: bool, last: bool
) -> dict[str, Any]:
    """The `model` of one file. `layers` are those of its stage, by their number in the whole model."""
    embedding = np.split(weights["model.embed_tokens.weight"], ranks)[rank]
    encoder: dict[str, NDArray[Any]] = {}
    for local, i in enumerate(layers):
        cut = cut_layer(lambda name, i=i: weights[f"model.layers.{i}.{name}"], rank, ranks)
        encoder |= {f"layers.{local}.{name}": tensor for name, tensor in cut.items()}
    if last:
        encoder["final_layernorm.weight"] = weights["model.norm.weight"]
    words = {"weight": storages.tensor(embedding)} if first or last else {}
    language_model: dict[str, Any] = {"encoder": ordered({n: storages.tensor(t) for n, t in encoder.items()})}
    if first:
        language_model["embedding"] = {"word_embeddings": ordered(words)}
    model = {"language_model": language_model}
    return model | ({"word_embeddings_for_head": ordered(words)} if last and not first else {})


def write_megatron(
    path: Path,
    config: Mapping[str, Any],
    weights: Tensors,
    ranks: int,
    stages: Sequence[int],
    *,
    changed: Mapping[str, Any] | None = None,
    change: Callable[[dict[str, Any], int, int], None] | None = None,
    iteration: int = 500,
) -> Path:
    """`ranks` tensor ranks times pipeline stages of so many layers; `change(content, rank, stage)` may alter a file.

    `changed` replaces arguments of training.
    """
    folder = path / f"iter_{iteration:07}"
    for stage, n_layers in enumerate(stages):
        layers = range(sum(stages[:stage]), sum(stages[:stage]) + n_layers)
        for rank in range(ranks):
            storages = Storages()
            first, last = stage == 0, stage == len(stages) - 1
            model = rank_content(weights, storages, rank, ranks, layers, first=first, last=last)
            content = {
                "args": namespace(**arguments(config, **(changed or {}))),
                "checkpoint_version": 3.0,
                "iteration": iteration,
                "model": model,
                "optimizer": optimizer(storages),
                "opt_param_scheduler": {"max_lr": 3e-5, "num_steps": 100},
                "rng_state": [random_states(storages)],
            }
            if change:
                change(content, rank, stage)
            place = folder / (f"mp_rank_{rank:02}" + (f"_{stage:03}" if len(stages) > 1 else ""))
            place.mkdir(parents=True)
            storages.write(place / "model_optim_rng.pt", content, root="model_optim_rng")
    (path / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return path


def optimizer(storages: Storages) -> dict[str, Any]:
    """Its keys are numbers, its tensors of other types, and there are objects of classes that are not installed."""
    moments = {"step": 7, "exp_avg": storages.tensor(np.zeros((4, 4), np.float64))}
    scaler = Reduce(Global("apex.optimizers", "NoSuchScaler"), (65536.0,), state={"growth": 2.0})
    groups = [{"lr": 3e-5, "betas": (0.9, 0.95), "params": [0, 1]}]
    return {"optimizer": {"state": {0: moments}, "param_groups": groups}, "grad_scaler": scaler}


def random_states(storages: Storages) -> dict[str, Any]:
    """Python's, numpy's (an array as numpy pickles it) and torch's."""
    blank = Reduce(Global("numpy.core.multiarray", "_reconstruct"), (Global("numpy", "ndarray"), (0,), b"b"))
    dtype = Reduce(Global("numpy", "dtype"), ("u4", False, True), state=(3, "<", None, None, None, -1, -1, 0))
    array = Reduce(blank.function, blank.arguments, state=(1, (4,), dtype, False, bytes(range(16))))
    return {
        "random_rng_state": (3, tuple(range(625)), None),
        "np_rng_state": ("MT19937", array, 624, 0, 0.0),
        "torch_rng_state": storages.tensor(np.zeros(4, np.int64)),
        "rng_tracker_states": {"model-parallel-rng": storages.tensor(np.zeros(4, np.int64))},
    }
