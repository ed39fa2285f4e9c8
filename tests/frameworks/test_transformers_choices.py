"""fourfold.transformers: what a user may ask for beside a format, and the sentence where it is not to be had."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourfold.errors import UnsupportedError, UserError

torch = pytest.importorskip("torch", reason="torch is not installed: `make frameworks`")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: `make frameworks`")
pytest.importorskip("accelerate", reason="accelerate is not installed: `make frameworks`")
from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402

from fourfold.torch import Linear  # noqa: E402
from fourfold.transformers import FourfoldConfig  # noqa: E402
from fourfold.transformers.choosing import PLAIN  # noqa: E402

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128}
HEADS = {**SMALL, "num_attention_heads": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {**HEADS, "num_key_value_heads": 2, "intermediate_size": 96, "tie_word_embeddings": False},
    "mixtral": {**HEADS, "num_key_value_heads": 2, "intermediate_size": 96, "num_local_experts": 4},
    "falcon": HEADS,
    "mamba": {**SMALL, "state_size": 8},
    "mamba2": {**SMALL, "state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
}
MODELS = {kind: (AutoModelForCausalLM, options) for kind, options in OPTIONS.items()}
MODELS["bert"] = (AutoModel, {**HEADS, "intermediate_size": 96})
IDS = torch.arange(1, 13).view(2, 6)


def load(directory: Path, config: FourfoldConfig | None = None, **options: Any) -> Any:
    given = options if config is None else {"quantization_config": config, **options}
    return AutoModelForCausalLM.from_pretrained(directory, **given)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


def test_another_function_for_experts_is_refused(checkpoint: Callable[[str], Path]) -> None:
    for kept in (None, ["model.layers.0"]):
        with pytest.raises(UnsupportedError, match="experts_implementation='eager' cannot compute with experts in"):
            load(checkpoint("mixtral"), FourfoldConfig(modules_to_not_convert=kept), experts_implementation="eager")
    model = load(checkpoint("mixtral"), FourfoldConfig(), experts_implementation="fourfold")
    expected = logits(model)
    model.set_experts_implementation("eager")
    with pytest.raises(UnsupportedError, match="leave it out, or set it to 'fourfold'"):
        logits(model)
    model.set_experts_implementation("fourfold")
    assert torch.equal(logits(model), expected)


def test_dequantized_experts_are_computed_as_before(checkpoint: Callable[[str], Path]) -> None:
    plain = load(checkpoint("mixtral"))
    model = load(checkpoint("mixtral"), FourfoldConfig("f32"))
    assert model.config._experts_implementation == "fourfold"
    model.dequantize()
    assert model.config._experts_implementation == plain.config._experts_implementation
    model.set_experts_implementation("eager")
    torch.testing.assert_close(logits(model), logits(plain))


@pytest.mark.parametrize("default", ["grouped_mm", "eager"])
def test_experts_that_are_left_are_computed_as_before(
    default: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(load(checkpoint("mixtral")))
    if default == "eager":  # what Transformers falls back to

        def cannot(self: Any) -> None:
            raise ValueError("no grouped_mm here")

        monkeypatch.setattr(kind, "_grouped_mm_can_dispatch", cannot)
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", None)
    plain = load(checkpoint("mixtral"))
    assert plain.config._experts_implementation == default
    model = load(checkpoint("mixtral"), FourfoldConfig("f32", ["model.layers.0", "lm_head"]))
    torch.testing.assert_close(logits(model), logits(plain))
    model.dequantize()
    assert model.config._experts_implementation == default


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_a_saved_model_is_not_given_another_config(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    load(checkpoint("llama"), FourfoldConfig("nf4", ["lm_head"])).save_pretrained(tmp_path)
    for config, sentence in (
        (FourfoldConfig("int8", ["lm_head"]), "saved with format='nf4', not 'int8': load it without"),
        (FourfoldConfig("nf4"), r"saved with modules_to_not_convert=\['lm_head'\], not None"),
        (FourfoldConfig("nf4", ["lm_head"], head="bf16"), "saved with head=None, not 'bf16'"),
    ):
        with pytest.raises(UnsupportedError, match=sentence):
            load(tmp_path, config)
    model = load(tmp_path, FourfoldConfig("nf4", ["lm_head"]))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()


def quantized(model: Any) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Linear)}


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("falcon", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("mamba", {"in_proj", "x_proj", "out_proj"}),  # it multiplies by dt_proj.weight itself
        ("mamba2", {"in_proj", "out_proj"}),
    ],
)
@pytest.mark.parametrize("kept", [None, []], ids=["head kept", "head too"])
def test_linears_are_taken_where_their_model_only_calls_them(
    kind: str, taken: set[str], kept: list[str] | None, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = logits(load(checkpoint(kind)))
    exact = load(checkpoint(kind), FourfoldConfig("f32", kept))
    assert quantized(exact) == taken | ({"lm_head"} if kind == "falcon" and kept == [] else set())
    torch.testing.assert_close(logits(exact), plain, rtol=0, atol=1e-4 * float(plain.abs().max()))
    model = load(checkpoint(kind), FourfoldConfig("nf4", kept), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_a_head_whose_weight_its_model_uses_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedError, match=r"Mamba2ForCausalLM uses lm_head\.weight itself, so lm_head must stay"):
        load(checkpoint("mamba2"), FourfoldConfig(head="int8"))


def test_linears_of_classes_that_are_not_known_are_named(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(PLAIN, "FalconLinear", "another product")
    named = r"transformer\.h\.\*\.mlp\.dense_h_to_4h\.weight \(FalconLinear\)"
    with pytest.raises(UserError, match=f"FalconForCausalLM has no matrix to quantize beside lm_head, .*{named}"):
        load(checkpoint("falcon"), FourfoldConfig())
    with caplog.at_level(logging.WARNING, "fourfold.transformers"):
        assert quantized(load(checkpoint("falcon"), FourfoldConfig(head="int8"))) == {"lm_head"}
    assert re.search(named, caplog.text)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize(
    ("kind", "options", "head"),
    [
        ("llama", {}, "int8"),
        ("llama", {"format": "int8"}, "int8"),
        ("llama", {"format": "bf16"}, None),  # finer than int8
        ("llama", {"head": None}, None),
        ("llama", {"modules_to_not_convert": ["lm_head"]}, None),
        ("llama", {"modules_to_not_convert": []}, None),  # like the rest
        ("mamba2", {}, None),  # it multiplies by the head's weight itself
        ("bert", {}, None),  # no head
    ],
)
def test_the_head_is_quantized_to_int8_where_nothing_is_lost_by_it(
    kind: str, options: dict[str, Any], head: str | None, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    given = FourfoldConfig(**options)
    auto = MODELS[kind][0]
    model = auto.from_pretrained(checkpoint(kind), quantization_config=given)
    assert model.config.quantization_config.head == head
    expected = "nf4" if options.get("modules_to_not_convert") == [] else head
    assert getattr(model.get_output_embeddings(), "format", None) == expected
    assert given.head == options.get("head", "auto")  # it can be given for another model
    model.save_pretrained(tmp_path)
    assert auto.from_pretrained(tmp_path).config.quantization_config.head == head
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["head"] == head
    if head is None:  # of files that were saved without one
        del config["quantization_config"]["head"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        again = auto.from_pretrained(tmp_path)
        assert again.config.quantization_config.head is None
        auto.from_pretrained(tmp_path, quantization_config=FourfoldConfig(**{**options, "head": None}))
        with pytest.raises(UnsupportedError, match="saved with head=None, not 'bf16'"):
            auto.from_pretrained(tmp_path, quantization_config=FourfoldConfig(**{**options, "head": "bf16"}))


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_models_body_does_without_its_head(
    tied: bool, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = load(checkpoint("llama"))
    plain.config.tie_word_embeddings = tied
    plain.tie_weights()
    plain.save_pretrained(tmp_path)
    model = load(tmp_path, FourfoldConfig())
    model.save_pretrained(tmp_path / "saved")
    if tied:  # where its embedding is
        with pytest.raises(
            UnsupportedError, match="LlamaModel has no output head, and this model's embedding was saved"
        ):
            AutoModel.from_pretrained(tmp_path / "saved")
    else:
        body = AutoModel.from_pretrained(tmp_path / "saved")
        with torch.no_grad():
            assert torch.equal(body(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_head_is_not_resized(tied: bool, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    plain = load(checkpoint("llama"))
    plain.config.tie_word_embeddings = tied
    plain.tie_weights()
    plain.save_pretrained(tmp_path)
    kept = load(tmp_path, FourfoldConfig(head=None))
    assert kept.resize_token_embeddings(130).weight.shape == (130, 64)
    model = load(tmp_path, FourfoldConfig(head="int8"))
    model.save_pretrained(tmp_path / "saved")
    for quantized in (model, load(tmp_path / "saved"), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(UnsupportedError, match=r"cannot be resized; .*FourfoldConfig\(head=None\)"):
            quantized.resize_token_embeddings(130)
    if tied:
        with pytest.raises(UnsupportedError, match="cannot be resized"):
            model.model.resize_token_embeddings(130)
    model.dequantize()
    assert model.resize_token_embeddings(130).weight.shape == (130, 64)
    assert logits(model).shape == (2, 6, 130)
