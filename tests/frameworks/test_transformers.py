"""fourfold.transformers: models that are quantized while they load, saved, read back, generate and train."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourfold.errors import CheckpointError, UnsupportedError, UserError

torch = pytest.importorskip("torch", reason="torch is not installed: `make frameworks`")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: `make frameworks`")
pytest.importorskip("accelerate", reason="accelerate is not installed: `make frameworks`")
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM  # noqa: E402

from fourfold.torch import Linear  # noqa: E402
from fourfold.transformers import FourfoldConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft asks Transformers for it
)

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
EXPERTS = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16, "pad_token_id": 0}
IDS = torch.arange(1, 13).view(2, 6)

# Tied heads and others; biases; experts, transposed and with biases too; Conv1D; an encoder; an encoder and a decoder.
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (AutoModelForCausalLM, {**EXPERTS, "tie_word_embeddings": True}),
    "gemma3_text": (AutoModelForCausalLM, EXPERTS),  # its embedding is scaled, so it keeps one of its own
    "qwen2": (AutoModelForCausalLM, {**EXPERTS, "tie_word_embeddings": False}),
    "mixtral": (AutoModelForCausalLM, {**EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": (
        AutoModelForCausalLM,
        {**EXPERTS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "gpt_oss": (AutoModelForCausalLM, {**EXPERTS, "num_local_experts": 4}),
    "gpt2": (AutoModelForCausalLM, {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}),
    "bert": (AutoModelForMaskedLM, {**SMALL, "intermediate_size": 128}),
    "t5": (
        AutoModelForSeq2SeqLM,
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 128,
         "decoder_start_token_id": 0},
    ),
}  # fmt: skip
HAS_EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")


def load(directory: Path, kind: str = "llama", config: FourfoldConfig | None = None, **options: Any) -> Any:
    given = options if config is None else {"quantization_config": config, **options}
    return MODELS[kind][0].from_pretrained(directory, **given)


def logits(model: Any) -> torch.Tensor:
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(IDS, **decoder).logits
    return found


def linears(model: Any) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


HEADS_OF: dict[str, dict[str, Any]] = {"int8": {}, "kept": {"head": None}, "nf4": {"modules_to_not_convert": []}}


@pytest.mark.parametrize("head", HEADS_OF)
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_quantized_while_it_loads_and_read_back_as_it_was(
    kind: str, head: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = logits(load(checkpoint(kind), kind))
    exact = logits(load(checkpoint(kind), kind, FourfoldConfig("f32", **HEADS_OF[head])))
    torch.testing.assert_close(exact, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))

    model = load(checkpoint(kind), kind, FourfoldConfig("nf4", **HEADS_OF[head]))
    left = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert left <= {"wo", "lm_head", "decoder"}  # T5 reads the dtype of wo's weight, and wants it in float32
    expected = (
        "kept" if (kind, head) == ("gemma3_text", "int8") else head
    )  # its scaled embedding would be a second matrix
    assert getattr(model.get_output_embeddings(), "format", "kept") == expected
    found = logits(model)
    assert 0.01 < float((found - plain).norm() / plain.norm()) < 0.3  # some error of four bits, and no more
    model.save_pretrained(tmp_path)
    again = load(tmp_path, kind)
    assert again.config.quantization_config.format == "nf4"
    assert again.config.quantization_config.head == ("int8" if expected == "int8" else None)
    assert torch.equal(logits(again), found)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", kind)), found)


@pytest.mark.parametrize("kind", HAS_EXPERTS)
def test_experts_are_those_that_are_multiplied_by(kind: str, checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint(kind), kind, FourfoldConfig())
    quantized = [name for name, tensor in model.named_parameters() if ".experts." in name and "bias" not in name]
    assert len(quantized) == 2 * 4  # of each layer two tensors and their scales
    assert all(model.get_parameter(name).dtype == torch.uint8 for name in quantized)
    found = logits(model)
    model.dequantize()  # float32 matrices of the same values, through Transformers' own function
    torch.testing.assert_close(logits(model), found, rtol=0, atol=0.02 * float(found.abs().max()))


def test_a_model_is_dequantized_and_saved_without_a_trace(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(checkpoint("mixtral"), "mixtral", FourfoldConfig("f32", []))
    expected = logits(model)
    model.dequantize().save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    torch.testing.assert_close(logits(load(tmp_path, "mixtral")), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_generates_in_any_dtype_from_several_files(
    dtype: torch.dtype, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    load(checkpoint("llama"), config=FourfoldConfig(), dtype=dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model = load(tmp_path, device_map="auto")
    assert model.dtype == dtype
    text = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
    assert text.shape == (2, 11)
    with torch.inference_mode():
        assert int(model(text[:, :-1]).logits[0, -1].argmax()) == int(text[0, -1])


def test_a_tied_head_stays_tied(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    kept = load(checkpoint("llama"), config=FourfoldConfig(head=None))
    assert kept.lm_head.weight is kept.model.embed_tokens.weight
    embedding = kept.model.embed_tokens.weight.detach()
    plain = load(checkpoint("llama"), config=FourfoldConfig("f32", ["lm_head"]))
    model = load(checkpoint("llama"), config=FourfoldConfig("f32", head="int8"), dtype=torch.bfloat16)
    assert model.lm_head.format == "int8"
    rows = model.model.embed_tokens(IDS)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, model.lm_head.dequantize()[IDS].bfloat16())
    assert 0 < float((rows - embedding[IDS]).abs().max()) < 0.02 * float(embedding.abs().max())
    torch.testing.assert_close(
        logits(model).float(), logits(plain), rtol=0, atol=0.05 * float(logits(plain).abs().max())
    )
    assert model.get_memory_footprint() < kept.get_memory_footprint() * 4  # one matrix of head and embedding
    with pytest.raises(UserError, match=r"ids must be in 0\.\.127; they reach from 0 to 128"):
        model.model.embed_tokens(torch.tensor([0, 128]))
    model.tie_weights()  # what resizing an embedding does, among others
    assert isinstance(model.lm_head, Linear)
    model.save_pretrained(tmp_path)
    assert not any("embed_tokens" in name for name in load_file(tmp_path / "model.safetensors"))
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.to(torch.float16).model.embed_tokens(IDS).dtype == torch.float16
    again = load(tmp_path)
    again.dequantize(torch.bfloat16)
    assert again.model.embed_tokens.weight.shape == embedding.shape
    assert again.lm_head.weight is again.model.embed_tokens.weight
    again.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain")), logits(again))
    assert again.resize_token_embeddings(130) is again.model.embed_tokens
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_head_with_a_format_of_its_own_must_be_there_and_wanted(checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint("qwen2"), "qwen2", FourfoldConfig("nf4", head="bf16"))
    assert {name: linear.format for name, linear in linears(model).items() if linear.format != "nf4"} == {
        "lm_head": "bf16"
    }
    with pytest.raises(UserError, match="lm_head is to be left by modules_to_not_convert, and quantized by head"):
        load(checkpoint("llama"), config=FourfoldConfig("nf4", ["lm_head"], head="int8"))
    with pytest.raises(UserError, match="LlamaModel has no output head to be quantized"):
        transformers.AutoModel.from_pretrained(checkpoint("llama"), quantization_config=FourfoldConfig(head="int8"))


def test_named_modules_stay_as_they_are(checkpoint: Callable[[str], Path]) -> None:
    config = FourfoldConfig(modules_to_not_convert=["q_proj", r"model.layers.\d+.mlp", "lm_head"])
    model = load(checkpoint("llama"), config=config)
    assert sorted({name.rpartition(".")[2] for name in linears(model)}) == ["k_proj", "o_proj", "v_proj"]
    assert config.modules_to_not_convert == ["q_proj", r"model.layers.\d+.mlp", "lm_head"]


def test_large_matrices_that_are_left_are_named(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fourfold.transformers.quantizer.WORTH_SAYING", 1)
    with caplog.at_level(logging.WARNING, "fourfold.transformers"):
        load(checkpoint("mixtral"), "mixtral", FourfoldConfig())
    assert "model.layers.*.mlp.gate.weight (MixtralTopKRouter)" in caplog.text
    assert "proj" not in caplog.text


@pytest.mark.parametrize(("kind", "head"), [("llama", "int8"), ("mixtral", None)])
def test_it_compiles_whole(kind: str, head: str | None, checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint(kind), kind, FourfoldConfig(head=head))
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected)


@pytest.mark.filterwarnings(
    "ignore:Input and output embeddings are no longer tied:UserWarning"
)  # peft's, of two matrices
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_adapters_train_on_fixed_weights(kind: str, checkpoint: Callable[[str], Path]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: `make frameworks`")
    model = load(checkpoint(kind), kind, FourfoldConfig())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().item())
    assert losses[-1] < losses[0] - 0.1
    with pytest.raises(RuntimeError, match="must match the size"):  # DoRA needs the norm of the weights
        peft.get_peft_model(
            load(checkpoint(kind), kind, FourfoldConfig()), peft.LoraConfig(target_modules=["q_proj"], use_dora=True)
        )
    with pytest.raises(RuntimeError, match="must match the size"):
        adapted.merge_adapter()  # floats are not added to codes
    after = {name.replace("base_layer.", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    found = logits(adapted)
    model.dequantize()
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), found, rtol=0, atol=0.02 * float(found.abs().max()))


def test_without_the_plug_in_reading_fails_loudly(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    load(checkpoint("llama"), config=FourfoldConfig()).save_pretrained(tmp_path)
    script = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "Unknown quantization type, got fourfold" in run.stderr
    assert "RuntimeError" in run.stderr
    assert "MISMATCH" in run.stderr


def test_wrong_requests_get_a_sentence(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="no format 'q4'; choose one of nf4"):
        FourfoldConfig("q4")
    with pytest.raises(UserError, match="a FourfoldConfig has no bits, group; it has format"):
        FourfoldConfig(group=64, bits=4)
    with pytest.raises(UserError, match="must be a list of names, or None; it is 'lm_head'"):
        FourfoldConfig(modules_to_not_convert="lm_head")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"'\(' in modules_to_not_convert is neither a name nor a regular expression"):
        FourfoldConfig(modules_to_not_convert=["("])
    with pytest.raises(UserError, match="'lm_heda' in modules_to_not_convert is no module of LlamaForCausalLM"):
        load(checkpoint("llama"), config=FourfoldConfig(modules_to_not_convert=["lm_heda"]))
    with pytest.raises(UserError, match="LlamaForCausalLM has no matrix to quantize beside lm_head, model"):
        load(checkpoint("llama"), config=FourfoldConfig(modules_to_not_convert=["lm_head", "model"]))
    with pytest.raises(UnsupportedError, match="computes on the CPU, from memory; device_map says cuda:0"):
        load(checkpoint("llama"), config=FourfoldConfig(), device_map="cuda")
    with pytest.raises(UnsupportedError, match="device_map says disk"):
        load(checkpoint("llama"), config=FourfoldConfig(), device_map={"": "cpu", "model.layers.1": "disk"})
    with pytest.raises(UnsupportedError, match=r"not torch\.float64"):
        load(checkpoint("llama"), config=FourfoldConfig(), dtype=torch.float64)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    for kind, name in (
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("mixtral", "model.layers.0.mlp.experts.down_proj"),
    ):
        model = load(checkpoint(kind), kind)
        model.get_parameter(name).data.view(-1)[5] = float("nan")
        model.save_pretrained(tmp_path / kind)
        with pytest.raises(CheckpointError, match=f"{name}: weights must be finite numbers"):
            load(tmp_path / kind, kind, FourfoldConfig())


def test_a_config_that_disagrees_with_the_files_is_refused(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    load(checkpoint("llama"), config=FourfoldConfig(head=None)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())

    def pretend(**changes: Any) -> None:
        changed = {**config, "quantization_config": {**config["quantization_config"], **changes}}
        path.write_text(json.dumps(changed))

    for other in ("int4", "int8", "bf16"):  # int4 has the same shapes
        pretend(format=other)
        with pytest.raises(CheckpointError, match=f"weights are {other}, and model.layers.* is nf4"):
            load(tmp_path)
    pretend(format="nf5")
    with pytest.raises(UserError, match="no format 'nf5'"):
        load(tmp_path)
    pretend(group_size=128)
    with pytest.raises(UserError, match="has no group_size"):
        load(tmp_path)


@pytest.mark.parametrize("lost", ["weight", "weight_scale", "weight_format", "bias"])
def test_a_quantized_module_is_read_whole_or_not_at_all(
    lost: str, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    load(checkpoint("qwen2"), "qwen2", FourfoldConfig()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.0.self_attn.q_proj.{lost}"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"q_proj.{lost} is not in the checkpoint"):
        load(tmp_path, "qwen2")


def test_other_methods_checkpoints_are_theirs(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    load(checkpoint("llama")).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}})
    )
    with pytest.raises(ValueError, match="quantized with GPTQConfig but you are passing a FourfoldConfig"):
        load(tmp_path, config=FourfoldConfig())


@pytest.mark.parametrize("missing", ["torch", "transformers", "accelerate"])
def test_a_missing_package_names_the_extra(missing: str) -> None:
    script = f"""
import sys
sys.modules[{missing!r}] = None
from fourfold.errors import MissingExtra
try:
    import fourfold.transformers
except MissingExtra as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert f"needs {missing}" in run.stdout
    assert "pip install 'fourfold[transformers]'" in run.stdout


@pytest.mark.parametrize(("old", "needed"), [("torch", "2.13"), ("transformers", "5.23")])
def test_an_old_package_is_named_with_the_version_that_is_needed(old: str, needed: str) -> None:
    script = f"""
import {old}
{old}.__version__ = "2.9.1+cpu"
from fourfold.errors import MissingExtra
try:
    import fourfold.transformers
except MissingExtra as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert f"needs {old} {needed} or newer, and 2.9.1+cpu is installed" in run.stdout
    assert "pip install -U 'fourfold[transformers]'" in run.stdout
