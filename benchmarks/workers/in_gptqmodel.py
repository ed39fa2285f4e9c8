"""A model quantized by GPTQModel as its users do, on texts, and what GPTQModel then takes its weights for.

    python in_gptqmodel.py ORDER.json

The order names `source` and `target`, Hugging Face directories; `options` of GPTQModel's QuantizeConfig; `texts`, lists
of token ids to calibrate on; `probe`, ids; and `dtype`, in which the source is loaded. Beside the target come
`TARGET.weights.safetensors`, float32 (N, K) of every quantized matrix by the library's own dequantization of the file
as it reads it again, and `TARGET.logits.npy`, float32 (T, vocabulary) of `probe` by Transformers' model in float32 with
these weights and the file's others. GPTQModel writes a folder of logs where it is run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file


def quantize(order: Mapping[str, Any]) -> None:
    """Calibrates, quantizes and saves."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, **order["options"])
    dtype = getattr(torch, order["dtype"])
    model = GPTQModel.load(order["source"], config, device="cpu", dtype=dtype)
    texts = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in order["texts"]]
    model.quantize(texts, batch_size=1)
    model.save(order["target"])


def dequantized(target: str) -> dict[str, torch.Tensor]:
    """Float32 (N, K) of each quantized matrix, by its name. The library loads it in float16, as its scales are."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    is_awq = json.loads(Path(target, "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    backend = BACKEND.AWQ_TORCH if is_awq else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(target, backend=backend, device="cpu", dtype=torch.float16)
    found = {}
    for name, layer in model.model.named_modules():
        if not hasattr(layer, "qweight"):
            continue
        layer.scales = layer.scales.float()  # or products are rounded to float16
        if isinstance(layer, AwqTorchLinear):
            weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, layer.group_size)
        else:
            weight = layer.dequantize_weight()
        found[f"{name}.weight"] = weight.T[: layer.out_features, : layer.in_features].float().contiguous()
    return found


def logits(order: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Any:
    """Of `probe`: AWQ changes norms and biases, too, so that all that is not quantized is the target's."""
    config = transformers.AutoConfig.from_pretrained(order["source"])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = dict(weights)
    for file in Path(order["target"]).glob("*.safetensors"):
        state |= {name: t.float() for name, t in load_file(file).items() if name in model.state_dict()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    with torch.inference_mode():
        return model(torch.tensor([order["probe"]])).logits[0].numpy()


def main() -> None:
    """What the order says."""
    order = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.manual_seed(0)
    quantize(order)
    weights = dequantized(order["target"])
    np.save(f"{order['target']}.logits.npy", logits(order, weights))
    save_file(weights, f"{order['target']}.weights.safetensors")


if __name__ == "__main__":
    main()
