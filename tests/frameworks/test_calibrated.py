"""4-bit files that GPTQModel really makes, calibrating on texts, against its own weights and Transformers' logits.

benchmarks/calibrated.py does the same with SmolLM2, and measures what is lost.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import calibrated
from fourfold.errors import RuntimeFailure, UnsupportedError
from fourfold.llm import LLM
from test_fourbit_models import off_by_half_a_step, rms

torch = pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)
transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)
if importlib.util.find_spec("gptqmodel") is None:
    pytest.skip("gptqmodel is not installed", allow_module_level=True)

import in_gptqmodel  # noqa: E402

PROBE = [5, 77, 123, 299, 0, 41, 7, 7, 260, 18]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama, whose feed-forward is no multiple of 128, with a tokenizer, which GPTQModel asks for."""
    from tokenizers import Tokenizer, models

    path = tmp_path_factory.mktemp("plain") / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.08, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(300)}, unk_token="<0>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", eos_token="<2>").save_pretrained(path)
    return path


@pytest.mark.parametrize("name", calibrated.RECIPES)
def test_a_calibrated_file_is_read_as_its_maker_reads_it(
    name: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    texts = np.random.default_rng(0).integers(0, 300, (16, 64)).tolist()
    recipe, target = calibrated.RECIPES[name], tmp_path / name
    calibrated.make(plain, target, recipe, texts, PROBE)
    found = calibrated.compare(target, PROBE)
    assert found["matrices"] == 14
    assert found["kept_as"] == {"gptq-128": ["int4"], "gptq-64": ["int4"], "gptq-64-act-order": []}.get(name, ["uint4"])
    if recipe.format:
        with pytest.raises(UnsupportedError, match="inputs in another order"):
            LLM(target)
    exact, order = np.load(f"{target}.logits.npy"), json.loads(Path(f"{target}.order.json").read_text())
    limit = 0.0
    for weights in off_by_half_a_step(load_file(f"{target}.weights.safetensors")):
        moved = in_gptqmodel.logits(order, {name: torch.from_numpy(w).float() for name, w in weights.items()})
        limit = max(limit, rms(moved - exact))
    with LLM(target, format=recipe.format) as llm:
        assert 0 < rms(llm.logits(PROBE, step=True) - exact) <= limit


def test_a_library_that_fails_is_told_of(plain: Path, tmp_path: Path) -> None:
    recipe = calibrated.Recipe({"group_size": 7})
    with pytest.raises(RuntimeFailure, match=r"GPTQModel could not write x: .*group_size"):
        calibrated.make(plain, tmp_path / "x", recipe, [[1] * 64], PROBE)
    assert json.loads((tmp_path / "x.order.json").read_text())["probe"] == PROBE
