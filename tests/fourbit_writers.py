"""Quantized checkpoints as other libraries lay them out, written from their formats' definitions: numpy alone.

Each writer takes the codes and scales of a matrix apart into the tensors of a file, and says what they stand for.
Shape letters: N outputs, K inputs, G inputs that share a scale.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

import tiny

Tensors = dict[str, NDArray[Any]]
Written = tuple[Tensors, NDArray[np.float32]]  # of one matrix, and the values that they stand for

CONFIG = tiny.CONFIG | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
FP4 = [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]  # twelfths


def words(codes: NDArray[Any], order: tuple[int, ...] = tuple(range(8))) -> NDArray[np.int32]:
    """(..., 8 n) codes below 16 as (..., n) words; nibble i of a word, from the lowest, is its code `order[i]`."""
    eight = codes.astype(np.int64).reshape(*codes.shape[:-1], -1, 8)
    return sum(eight[..., at] << (4 * i) for i, at in enumerate(order)).astype(np.uint32).view(np.int32)  # type: ignore


def bnb(
    module: str, shape: tuple[int, int], seed: int, *, kind: str = "nf4", nested: bool = True, run: int = 64
) -> Written:
    name, rng = f"{module}.weight", np.random.default_rng(seed)
    n = shape[0] * shape[1]
    codes = rng.integers(0, 16, n).astype(np.uint8)
    count = -(-n // run)
    values = np.array(NF4, np.float32) if kind == "nf4" else np.array(FP4, np.float32) / np.float32(12)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": run, "dtype": "bfloat16", "shape": list(shape)}
    tensors: Tensors = {f"{name}.quant_map": values}
    if nested:
        inner = rng.integers(0, 256, count).astype(np.uint8)
        outer = rng.uniform(0.001, 0.01, -(-count // 256)).astype(np.float32)
        table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        offset = 0.0523
        scales = table[inner] * np.repeat(outer, 256)[:count] + np.float32(offset)
        tensors |= {f"{name}.absmax": inner, f"{name}.nested_absmax": outer, f"{name}.nested_quant_map": table}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        tensors[f"{name}.absmax"] = scales = rng.uniform(0.01, 0.1, count).astype(np.float32)
    padded = np.append(codes, np.zeros(n % 2, np.uint8))
    tensors[name] = (padded[::2] << 4 | padded[1::2])[:, None]
    tensors[f"{name}.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors, (values[codes] * np.repeat(scales, run)[:n]).reshape(shape)


def integers(
    shape: tuple[int, int], group: int, seed: int, zero: int | None = 8, *, shuffled: bool = False
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[np.int32]]:
    """Codes (N, K); zero points (N, K/G), all of them `zero` or, where it is None, any; float16 scales (N, K/G).

    And the group of each input, (K,): K/G is rounded up, and inputs lie in order unless they are shuffled.
    """
    rng = np.random.default_rng(seed)
    n, k = shape
    codes = rng.integers(0, 16, shape)
    n_groups = -(-k // group)
    zeros = rng.integers(0, 16, (n, n_groups)) if zero is None else np.full((n, n_groups), zero)
    scales = rng.uniform(0.002, 0.02, (n, n_groups)).astype(np.float16)
    of_input = (np.arange(k) // group).astype(np.int32)
    return codes, zeros, scales, rng.permutation(of_input) if shuffled else of_input


def meant(codes: NDArray[Any], zeros: NDArray[Any], scales: NDArray[Any], of_input: NDArray[Any]) -> NDArray[Any]:
    """The values (N, K)."""
    return (codes - zeros[:, of_input]).astype(np.float32) * scales[:, of_input].astype(np.float32)


def gptq(
    module: str,
    shape: tuple[int, int],
    seed: int,
    *,
    group: int = 128,
    zero: int | None = 8,
    version: int = 1,
    shuffled: bool = False,
) -> Written:
    codes, zeros, scales, of_input = integers(shape, min(group, shape[1]), seed, zero, shuffled=shuffled)
    tensors: Tensors = {
        f"{module}.qweight": np.ascontiguousarray(words(codes).T),
        f"{module}.qzeros": words(np.ascontiguousarray(zeros.T) - (version == 1)),
        f"{module}.scales": np.ascontiguousarray(scales.T),
        f"{module}.g_idx": of_input,
    }
    return tensors, meant(codes, zeros, scales, of_input)


def awq(module: str, shape: tuple[int, int], seed: int, *, group: int = 128, zero: int | None = None) -> Written:
    codes, zeros, scales, of_input = integers(shape, min(group, shape[1]), seed, zero)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors: Tensors = {
        f"{module}.qweight": words(np.ascontiguousarray(codes.T), order),
        f"{module}.qzeros": words(np.ascontiguousarray(zeros.T), order),
        f"{module}.scales": np.ascontiguousarray(scales.T),
    }
    return tensors, meant(codes, zeros, scales, of_input)


def compressed(
    module: str, shape: tuple[int, int], seed: int, *, group: int = 128, zero: int | None = 8, shuffled: bool = False
) -> Written:
    codes, zeros, scales, of_input = integers(shape, min(group, shape[1]), seed, zero, shuffled=shuffled)
    scales = scales.astype(ml_dtypes.bfloat16)
    tensors: Tensors = {
        f"{module}.weight_packed": words(codes),
        f"{module}.weight_scale": scales,
        f"{module}.weight_shape": np.array(shape, np.int64),
    }
    if zero is None:
        filled = np.concatenate([zeros, np.zeros((-shape[0] % 8, zeros.shape[1]), zeros.dtype)])
        tensors[f"{module}.weight_zero_point"] = np.ascontiguousarray(words(np.ascontiguousarray(filled.T)).T)
    if shuffled:
        tensors[f"{module}.weight_g_idx"] = of_input
    return tensors, meant(codes, zeros, scales, of_input)


def bnb_config(kind: str = "nf4", nested: bool = True) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": None,
    }


def gptq_config(group: int = 128, sym: bool = True, version: int = 1) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "desc_act": False,
        "sym": sym,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": False,
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }


def awq_config(group: int = 128) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}


def compressed_config(group: int = 128, symmetric: bool = True) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "group_size": group,
        "strategy": "group",
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "version": "0.20.0",
    }


def checkpoint(
    path: Path, quantization: dict[str, Any], write: Callable[[str, tuple[int, int], int], Written | None]
) -> tuple[Path, tiny.Tensors]:
    """A tiny Llama whose projections are written by `write` (module, shape, seed; None leaves one as it is).

    Returns the directory and the weights that it stands for, by Hugging Face's names.
    """
    path.mkdir()
    stored: Tensors = {}
    meant: tiny.Tensors = {}
    for seed, (name, weight) in enumerate(tiny.tensors(CONFIG).items()):
        written = write(name.removesuffix(".weight"), weight.shape, seed) if "_proj." in name else None
        if written is None:
            stored[name] = (weight * 0.05).astype(ml_dtypes.bfloat16)
            meant[name] = stored[name].astype(np.float32)
        else:
            stored |= written[0]
            meant[name] = written[1]
    (path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    save_file(stored, path / "model.safetensors")
    return path, meant
