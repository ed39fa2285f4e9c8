"""Computes the logits anew: `PYTHONPATH=tests python -m goldens`, with torch and transformers installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from goldens import models

STEP_TOLERANCE = 1e-4  # by which Transformers' own logits differ token by token


@torch.inference_mode()
def logits(model: Any, ids: list[int]) -> np.ndarray:
    """Of one prefill, (T, vocabulary). Raises AssertionError where the model says something else token by token.

    Not so beyond the positions after which other rotary factors hold: it keeps the keys that the first ones turned.
    """
    whole = model(torch.tensor([ids])).logits[0].numpy()
    cache, rows = None, []
    for i in ids[: getattr(model.config, "original_max_position_embeddings", None)]:
        out = model(torch.tensor([[i]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, 0].numpy())
    short = whole if len(rows) == len(ids) else model(torch.tensor([ids[: len(rows)]])).logits[0].numpy()
    worst = np.abs(np.stack(rows) - short).max()
    assert worst < STEP_TOLERANCE, worst
    return whole


for name, length in models.texts():
    fields = dict(models.CONFIGS[name])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    weights = models.weights(name)
    state = {key: torch.from_numpy(value) for key, value in weights.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    found = logits(model, models.ids(name, length))
    np.savez_compressed(models.logits_file(name, length), logits=found, weights=np.array(models.fingerprint(weights)))
    print(f"{name}, {length} tokens: logits of standard deviation {found.std():.2f}")
