"""A Llama of transformers with 4-bit linear layers: read from a GGUF file, or of random weights in a given shape."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

transformers.logging.set_verbosity_error()
VERSION = transformers.__version__

Quantizer = Callable[[torch.Tensor], torch.nn.Module]


def llama(subject: Mapping[str, Any], quantizer: Quantizer) -> Any:
    """A model in bfloat16 whose linear layers `quantizer` made: subject["shape"], else the file subject["gguf"]."""
    return _random(subject["shape"], quantizer) if "shape" in subject else _read(Path(subject["gguf"]), quantizer)


def linears(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The layers that every token reads."""
    return (module for name, module in model.named_modules() if name.endswith(("_proj", "lm_head")))


def _read(path: Path, quantizer: Quantizer) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            model.set_submodule(name, quantizer(layer.weight.detach()))
    return model.eval()


def _random(shape: Mapping[str, Any], quantizer: Quantizer) -> Any:
    """Never holds more than one matrix in floats; equal shapes have equal numbers, each in memory of its own."""
    config = LlamaConfig(**shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    made: dict[torch.Size, torch.nn.Module] = {}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            size = layer.weight.shape
            if size not in made:
                made[size] = quantizer(_gaussian(*size))
            model.set_submodule(name, copy.deepcopy(made[size]))
    model.model.embed_tokens = torch.nn.Embedding.from_pretrained(
        _gaussian(config.vocab_size, config.hidden_size).to(torch.bfloat16)
    )
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            ones = torch.ones(config.hidden_size, dtype=torch.bfloat16)
            module.weight = torch.nn.Parameter(ones, requires_grad=False)
    return model.eval()


def _gaussian(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * k**-0.5
