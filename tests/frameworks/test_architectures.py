"""Models that Transformers itself writes open in fourfold, and say the same there.

These need torch and transformers: `make frameworks`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourfold.checkpoint import check_complete, open_source
from fourfold.conversion import convert
from fourfold.engine import Engine
from fourfold.models import weight_specs
from goldens import models

torch = pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)
transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)

# What sees beside Gemma's text part, as small as it can be.
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 4,
    "patch_size": 2,
}  # fmt: skip


def told_by_both(model: Any, path: Path, ids: list[int]) -> tuple[Any, Any]:
    """Logits (T, vocabulary) of the model by Transformers, and by fourfold from what it writes."""
    model = model.eval()
    model.save_pretrained(path)
    with torch.inference_mode():
        theirs = model(torch.tensor([ids])).logits[0].float().numpy()
    with open_source(path) as source:
        check_complete(weight_specs(source.config), source)
        convert(source, path / "f32", "f32")
    engine = Engine(path / "f32", ranks=2)
    ours = engine.logits(ids)
    engine.close()
    return ours, theirs


@pytest.mark.parametrize("model", models.CONFIGS)
def test_a_model_as_transformers_writes_it(tmp_path: Path, model: str) -> None:
    fields = dict(models.CONFIGS[model])
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(1)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ours, theirs = told_by_both(made, tmp_path / "model", models.ids(model, 60))
    assert np.abs(ours - theirs).max() <= 1e-3


def test_the_text_part_of_gemma3_that_sees(tmp_path: Path) -> None:
    config = transformers.Gemma3Config(
        text_config=models.CONFIGS["gemma3"], vision_config=VISION, mm_tokens_per_image=1, image_token_index=95,
        boi_token_index=94, eoi_token_index=93,
    )  # fmt: skip
    torch.manual_seed(1)
    ours, theirs = told_by_both(
        transformers.Gemma3ForConditionalGeneration(config), tmp_path / "model", models.ids("gemma3", 40)
    )
    assert np.abs(ours - theirs).max() <= 1e-3
    with open_source(tmp_path / "model") as source:
        assert source.config.image_ids == (93, 94, 95)
        (note,) = source.notes
        assert "also sees: " in note


def test_the_scale_of_gemma3s_embedding_is_rounded_as_transformers_rounds_it(tmp_path: Path) -> None:
    """The model says that it is bfloat16, and Transformers' factor is 12.625 then where the root is 12.649."""
    fields = dict(models.CONFIGS["gemma3"], dtype="bfloat16")
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(tmp_path / "model")
    with torch.inference_mode(), open_source(tmp_path / "model") as source:
        embedded = made.model.embed_tokens(torch.tensor([[5]]))[0, 0]
        row = torch.from_numpy(source.tensors["model.embed_tokens.weight"].rows(5, 6)[0].astype(np.float32))
        assert source.config.embed_scale == 12.625
        assert torch.equal((row * source.config.embed_scale).to(torch.bfloat16), embedded)
