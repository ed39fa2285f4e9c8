"""What DeepSpeed and Megatron-DeepSpeed save: every form gives the same bits; what is wrong is said in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tiny
import torch_writer
from deepspeed_writer import (
    engine_of_huggingface,
    engine_of_megatron,
    write_engine,
    write_layers,
    write_listed,
    write_sharded,
)
from fourfold.checkpoint import check_complete, open_source
from fourfold.config import ModelConfig
from fourfold.conversion import convert
from fourfold.engine import Engine
from fourfold.errors import CheckpointError, UnsupportedError
from fourfold.models import weight_specs
from megatron_writer import write_megatron
from torch_writer import Global, Reduce, ordered

REFUSALS = (CheckpointError, UnsupportedError)
UNTIED = tiny.CONFIG | {"tie_word_embeddings": False}
MODELS = {"llama": tiny.CONFIG, "llama, own head": UNTIED, "qwen2": tiny.QWEN2, "yuan": tiny.YUAN}
Write = Callable[[Path, dict[str, Any], tiny.Tensors], Path]
FORMS: dict[str, Write] = {
    "sharded, 1": lambda path, c, w: write_sharded(path, c, w, 1),
    "sharded, 2": lambda path, c, w: write_sharded(path, c, w, 2),
    "sharded, 2, outside": lambda path, c, w: write_sharded(path, c, w, 1, outside=True),
    "engine, 1": lambda path, c, w: engine_of_huggingface(path, c, w, 1),
    "engine, 2": lambda path, c, w: engine_of_huggingface(path, c, w, 2),
    "listed": lambda path, c, w: write_listed(path, c, w, 3),
}
MEGATRON: dict[str, Write] = {
    "layers, 1": lambda path, c, w: write_layers(path, c, w, 1),
    "layers, 2": lambda path, c, w: write_layers(path, c, w, 2),
    "layers, 2, older numbers": lambda path, c, w: write_layers(path, c, w, 2, gap=1),
    "megatron engine, 1": lambda path, c, w: engine_of_megatron(path, c, w, 1),
    "megatron engine, 2": lambda path, c, w: engine_of_megatron(path, c, w, 2),
}
CASES = [
    *((model, form) for model in MODELS for form in FORMS),
    *((model, form) for model in MODELS if model != "qwen2" for form in MEGATRON),
]
WEIGHTS = {model: tiny.tensors(config) for model, config in MODELS.items()}


def read_all(path: Path, weights: tiny.Tensors) -> ModelConfig:
    """Opens a model and compares every tensor, whole and in pieces."""
    with open_source(path) as source:
        check_complete(weight_specs(source.config), source)
        assert source.tensors.keys() - {"lm_head.weight"} == weights.keys() - {"lm_head.weight"}
        for name, weight in weights.items():
            tensor, n = source.tensors[name], len(weight)
            assert tensor.shape == weight.shape
            for start, stop in ((0, n), (n // 3, n // 2), (n - 1, n), (5, 5)):
                rows = tensor.rows(start, stop)
                assert rows.dtype == weight.dtype
                np.testing.assert_array_equal(rows, weight[start:stop], err_msg=name)
        return source.config


def refusal(path: Path) -> str:
    with pytest.raises(REFUSALS) as caught:
        read_all(path, {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("model", "form"), CASES)
def test_every_form_is_the_same_bits(model: str, form: str, tmp_path: Path) -> None:
    path = (FORMS | MEGATRON)[form](tmp_path / "model", MODELS[model], WEIGHTS[model])
    assert read_all(path, WEIGHTS[model]).model_type == MODELS[model]["model_type"]


def test_more_ranks_than_heads_to_cut(tmp_path: Path) -> None:
    """A rank may have nothing of k and v."""
    read_all(write_sharded(tmp_path / "model", UNTIED, WEIGHTS["llama, own head"], 3), WEIGHTS["llama, own head"])


def test_cut_filters(tmp_path: Path) -> None:
    halves = {name: w.astype(ml_dtypes.bfloat16) for name, w in WEIGHTS["yuan"].items()}
    read_all(write_sharded(tmp_path / "model", tiny.YUAN, halves, 2, filters=True), halves)


def test_the_golden_logits_come_back(shared: Path, tmp_path: Path) -> None:
    config, weights = tiny.golden(shared, "yuan-d64")
    expected = load_file(shared / "golden" / "yuan-d64" / "logits.safetensors")
    with open_source(write_sharded(tmp_path / "model", config, weights, 2, filters=True)) as source:
        convert(source, tmp_path / "converted", "f32")
    engine = Engine(tmp_path / "converted")
    try:
        assert np.abs(engine.logits(expected["tokens"].tolist()) - expected["prefill"]).max() <= 1e-3
    finally:
        engine.close()


def test_a_listed_file_may_be_safetensors_or_of_megatron_ranks(tmp_path: Path) -> None:
    path = write_listed(tmp_path / "model", tiny.CONFIG, WEIGHTS["llama"], 2)
    save_file(dict(list(WEIGHTS["llama"].items())[1::2]), path / "part_1.safetensors")
    listing = json.loads((path / "checkpoints.json").read_text())
    listing["checkpoints"][1] = "part_1.safetensors"
    (path / "checkpoints.json").write_text(json.dumps(listing))
    read_all(path, WEIGHTS["llama"])
    engine = engine_of_megatron(tmp_path / "engine", tiny.CONFIG, WEIGHTS["llama"], 2) / "global_step7"
    names = [f"mp_rank_{rank:02}_model_states.pt" for rank in range(2)]
    shutil.copy(path / "config.json", engine)
    (engine / "checkpoints.json").write_text(json.dumps({"type": "Megatron", "checkpoints": names, "version": 1.0}))
    read_all(engine, WEIGHTS["llama"])


# ---- which files count


def test_ways_to_name_an_engines_checkpoint(tmp_path: Path) -> None:
    path = engine_of_huggingface(tmp_path / "model", tiny.CONFIG, WEIGHTS["llama"], 2)
    shutil.copy(path / "config.json", path / "global_step7")
    read_all(path / "global_step7", WEIGHTS["llama"])
    (path / "latest").unlink()
    read_all(path, WEIGHTS["llama"])
    shutil.copytree(path / "global_step7", path / "global_step8")
    assert "(global_step7, global_step8) and no latest; give one" in refusal(path)
    for tag in ("global_step9", "../model/global_step7", "/", ".", ""):
        (path / "latest").write_text(tag)
        assert f"latest names {tag!r}, which is no folder there" in refusal(path)


def test_a_whole_model_of_hugging_face_comes_first(tmp_path: Path) -> None:
    """A trainer leaves both: the model and, beside it, where to go on."""
    path = engine_of_huggingface(tmp_path / "model", tiny.CONFIG, WEIGHTS["llama"], 1)
    ours = {name: weight + 1 for name, weight in WEIGHTS["llama"].items()}
    tiny.write_huggingface(path, tiny.CONFIG, ours)
    read_all(path, ours)
    assert write_megatron(tmp_path / "yuan", tiny.YUAN, WEIGHTS["yuan"], 1, [2])
    (tmp_path / "yuan" / "latest").write_text("nothing")
    read_all(tmp_path / "yuan", WEIGHTS["yuan"])


def test_yuans_arguments_say_what_it_is_and_a_llamas_do_not(tmp_path: Path) -> None:
    yuan = write_layers(tmp_path / "yuan", tiny.YUAN, WEIGHTS["yuan"], 1)
    (yuan / "config.json").unlink()
    read_all(yuan, WEIGHTS["yuan"])
    (yuan / "global_step7" / "mp_rank_00_model_states.pt").unlink()
    assert "put its config.json there" in refusal(yuan)
    for write in (write_sharded, engine_of_huggingface):
        path = write(tmp_path / write.__name__, tiny.CONFIG, WEIGHTS["llama"], 2)
        (path / "config.json").unlink()
        assert "has no config.json, and DeepSpeed's files do not say what the model is" in refusal(path)


def test_pieces_of_zero_are_refused(tmp_path: Path) -> None:
    path = engine_of_huggingface(tmp_path / "model", tiny.CONFIG, WEIGHTS["llama"], 1)
    states = path / "global_step7" / "mp_rank_00_model_states.pt"
    states.rename(states.with_name("zero_pp_rank_0_mp_rank_00_model_states.pt"))
    assert "as ZeRO stage 3 cuts them; put them together first, with the zero_to_fp32.py" in refusal(path)
    states.with_name("zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    assert "holds an optimizer's pieces of the weights, as ZeRO cuts them" in refusal(path)


# ---- what does not add up


def change_listing(path: Path, **changed: Any) -> None:
    file = path / "ds_inference_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"checkpoints": None}, "has no list of files under checkpoints"),
        ({"checkpoints": {"tp": [3]}}, "has no list of files under checkpoints"),
        ({"checkpoints": {"tp": []}}, r"files of the ranks \[\], and there should be 2 from 0 on"),
        ({"checkpoints": {"tp": ["tp_00_00.pt", "tp_01_09.pt"]}}, "'tp_01_09.pt', which is not a file beside it"),
        ({"checkpoints": {"tp": ["../../etc/passwd"]}}, "'../../etc/passwd', which is not a file beside it"),
        ({"checkpoints": {"tp": ["non-tp.pt"]}}, "non-tp.pt, which does not say whose part of the model it is"),
        ({"checkpoints": {"tp": ["tp_01_00.pt"]}}, r"files of the ranks \[1\]"),
        ({"checkpoints": {"tp": ["tp_00_00.pt", "tp_01_00.pt", "tp_00_01.pt"]}}, "as many files of every rank"),
        ({"checkpoints": {"tp": ["tp_00_00.pt", "tp_01_00.pt"]}}, "lacks the tensor"),
        ({"tp_size": 4}, r"files of the ranks \[0, 1\], and there should be 4 from 0 on"),
        ({"tp_size": "2"}, "there should be '2' from 0 on"),
        ({"checkpoints": ["tp_00_00.pt", "tp_01_00.pt"]}, "of several tensor ranks without saying whose each is"),
        ({"checkpoints": ["tp_00_00.pt", "tp_01_00.pt"], "parallelization": "pp"}, "which another of the files holds"),
        ({"checkpoints": ["tp_00_00.pt"], "type": "Megatron"}, "tp_00_00.pt holds no module"),
    ],
)  # fmt: skip
def test_listings_that_do_not_add_up(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = write_sharded(tmp_path / "model", tiny.CONFIG, WEIGHTS["llama"], 2, pieces=2)
    change_listing(path, **change)
    with pytest.raises(REFUSALS, match=sentence):
        read_all(path, {})


def test_shards_that_do_not_add_up(tmp_path: Path) -> None:
    path = write_sharded(tmp_path / "model", UNTIED, WEIGHTS["llama, own head"], 2, pieces=1)
    shutil.copy(path / "tp_00_00.pt", path / "tp_01_00.pt")  # one rank twice
    assert "should have shape" in refusal(path)
    torch_writer.write(path / "tp_01_00.pt", {})
    assert "only one of the ranks 0 and 1 has" in refusal(path)
    odd = {name: weight[:3] for name, weight in WEIGHTS["llama, own head"].items()}
    torch_writer.write(path / "tp_01_00.pt", odd)
    assert "which are not parts of one" in refusal(path)
    path = write_sharded(tmp_path / "outside", UNTIED, WEIGHTS["llama, own head"], 2, outside=True)
    torch_writer.write(path / "non-tp.pt", {"lm_head.weight": WEIGHTS["llama, own head"]["lm_head.weight"][:, :32]})
    assert "lacks the tensor model.embed_tokens.weight" in refusal(path)


def test_vectors_where_matrices_are_cut(tmp_path: Path) -> None:
    path = write_sharded(tmp_path / "model", tiny.CONFIG, WEIGHTS["llama"], 2, pieces=1)
    for rank in range(2):
        flat = {name: weight.ravel()[:6] for name, weight in WEIGHTS["llama"].items()}
        torch_writer.write(path / f"tp_{rank:02}_00.pt", flat)
    assert "which are not parts of one" in refusal(path)


def test_missing_ranks_and_layers(tmp_path: Path) -> None:
    path = engine_of_huggingface(tmp_path / "engine", tiny.CONFIG, WEIGHTS["llama"], 2)
    (path / "global_step7" / "mp_rank_00_model_states.pt").unlink()
    assert "mp_rank_00_model_states.pt is missing, and mp_rank_01_model_states.pt is there" in refusal(path)
    path = write_layers(tmp_path / "layers", tiny.CONFIG, WEIGHTS["llama"], 2)
    (path / "global_step7" / "layer_02-model_01-model_states.pt").unlink()
    assert "has files of layer 2 of some of its 2 tensor ranks only" in refusal(path)
    (path / "global_step7" / "layer_02-model_00-model_states.pt").unlink()
    assert "has 1 layers in all its stages, and the model has 2" in refusal(path)
    config = tiny.CONFIG | {"num_hidden_layers": 3}
    path = write_layers(tmp_path / "three", config, tiny.tensors(config), 1)
    (path / "global_step7" / "layer_03-model_00-model_states.pt").unlink()
    assert "lacks the files of layer 3" in refusal(path)
    (path / "global_step7" / "layer_01-model_00-model_states.pt").unlink()
    (path / "global_step7" / "layer_02-model_00-model_states.pt").unlink()
    assert "lacks language_model.embedding.word_embeddings.weight" in refusal(path)


def test_layers_that_are_none(tmp_path: Path) -> None:
    path = write_layers(tmp_path / "model", tiny.CONFIG, WEIGHTS["llama"], 1)
    layer = path / "global_step7" / "layer_02-model_00-model_states.pt"
    torch_writer.write(layer, {"strange.weight": np.zeros((3, 4), np.float32)})
    assert "is neither an embedding, a layer, a norm nor a head" in refusal(path)
    shutil.copy(layer.with_name("layer_04-model_00-model_states.pt"), layer)  # a second norm
    assert "which another of the files holds, too" in refusal(path)
    torch_writer.write(layer, {"input_layernorm.weight": np.zeros(64, np.float32)})
    assert "lacks the tensor model.layers.0." in refusal(path)
    wrong = {"input_layernorm.weight": np.zeros(64, np.float32)}
    wrong["self_attention.query_key_value.weight"] = np.zeros((100, 64), np.float32)
    torch_writer.write(layer, wrong)
    assert "has 100 rows, no multiple of the 64 that 2 query heads, a key and a value take" in refusal(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("form", ["sharded, 2", "engine, 2", "layers, 2", "listed"])
def test_truncated_files(form: str, share: float, tmp_path: Path) -> None:
    path = (FORMS | MEGATRON)[form](tmp_path / "model", tiny.CONFIG, WEIGHTS["llama"])
    file = max(path.rglob("*.*"), key=lambda found: found.stat().st_size)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    assert file.name in refusal(path)


def test_nothing_of_a_file_is_run(tmp_path: Path) -> None:
    system = Reduce(Global("os", "system"), (f"touch {tmp_path / 'ran'}",))
    path = write_sharded(tmp_path / "model", tiny.CONFIG, WEIGHTS["llama"], 2)
    torch_writer.Storages().write(path / "tp_00_00.pt", ordered({"x": system}))
    assert "asks to import os.system, which weights do not need" in refusal(path)
    path = write_engine(tmp_path / "engine", tiny.CONFIG, [lambda storages: ordered({"model.norm.weight": system})])
    assert "model.norm.weight is no tensor but <os.system>" in refusal(path)
    for module in (lambda storages: None, lambda storages: [1], lambda storages: {}):
        shutil.rmtree(tmp_path / "engine")
        assert "holds no module" in refusal(write_engine(tmp_path / "engine", tiny.CONFIG, [module]))
    assert not (tmp_path / "ran").exists()
