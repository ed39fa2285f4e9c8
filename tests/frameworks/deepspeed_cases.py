"""The models that tests/frameworks/test_deepspeed.py runs, the same weights in every process that builds one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from yuan_torch import YuanForCausalLM

PROMPTS = (40, 3)  # ids: for the kernels of many rows, and of few
PLAIN_LLAMA: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "tie_word_embeddings": False, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip
GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden" / "yuan-d64"


def llama() -> nn.Module:
    """Three KV heads for two processes, shards of 160 and 80 inputs, a bias on every linear, a tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=192, intermediate_size=320, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=40, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
        max_position_embeddings=64,
    )  # fmt: skip
    return seeded(lambda: LlamaForCausalLM(config))


def plain_llama() -> nn.Module:
    """One that fourfold itself runs, with a head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**PLAIN_LLAMA)))


def neox() -> nn.Module:
    """q, k and v in one matrix, biases, two ways in parallel, an untied head of another name."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return seeded(lambda: GPTNeoXForCausalLM(config))


def yuan() -> nn.Module:
    """A golden of ours; without the data, random numbers."""
    if GOLDEN.is_dir():
        weights = load_file(GOLDEN / "model.safetensors")
        model = YuanForCausalLM(json.loads((GOLDEN / "config.json").read_text()))
        missing = model.load_state_dict(weights, strict=False).missing_keys
        assert not set(missing) - {"lm_head.weight"}
        return model.eval()
    config = {
        "vocab_size": 300, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    return seeded(lambda: YuanForCausalLM(config))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Weights that are the same everywhere, biases large enough to be missed, logits spread out."""
    torch.manual_seed(0)
    model = make().eval()
    for name, parameter in model.named_parameters():
        scale = 0.5 if name.endswith("bias") else 0.08 if parameter.ndim > 1 else 0.1
        parameter.data.copy_(torch.randn(parameter.shape) * scale + (0 if parameter.ndim > 1 else 0.5))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "plain llama": plain_llama,
    "neox": neox,
    "yuan": yuan,
    "yuan-cut-filters": yuan,
}
SAVED = ("plain llama", "yuan", "yuan-cut-filters")  # in float32, by DeepSpeed
CASES = [  # model, its type, the shards' format
    *((name, "float32", "f32") for name in MODELS),
    *((name, "bfloat16", "bf16") for name in ("llama", "yuan")),
    *((name, "float32", "nf4") for name in ("llama", "yuan-cut-filters")),
    *((name, "bfloat16", "nf4") for name in ("llama", "neox", "yuan")),
]


def built(name: str, dtype: str) -> nn.Module:
    return MODELS[name]().to(getattr(torch, dtype))


def prompt(n: int) -> Tensor:
    return torch.arange(5, 5 + 7 * n, 7).remainder(290)[None]


@torch.inference_mode()
def logits(model: Any, n: int) -> Tensor:
    """(n, V), float32."""
    found = model(prompt(n))
    return getattr(found, "logits", found)[0].float()
