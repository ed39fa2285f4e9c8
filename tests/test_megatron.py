"""Megatron directories: which files count, what their arguments say, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from fourfold.checkpoint import check_complete, open_source
from fourfold.checkpoint.megatron_args import model_config
from fourfold.config import ModelConfig
from fourfold.errors import CheckpointError, UnsupportedError
from fourfold.models import weight_specs
from megatron_writer import arguments, write_megatron
from torch_writer import Global, Raw, Reduce

REFUSALS = (CheckpointError, UnsupportedError)
WEIGHTS = tiny.tensors(tiny.YUAN)
EMBED = "model.embed_tokens"
HUGE = Raw(b"\x8b" + (10**4).to_bytes(4, "little") + b"\x01" * 10**4)  # a number that Python does not print
SYSTEM = Reduce(Global("os", "system"), ("false",))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two tensor ranks, two stages of a layer each."""
    return write_megatron(tmp_path / "model", tiny.YUAN, WEIGHTS, 2, [1, 1])


def refusal(path: Path) -> str:
    with pytest.raises(REFUSALS) as caught:
        _read_all(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _read_all(path: Path) -> ModelConfig:
    with open_source(path) as source:
        check_complete(weight_specs(source.config), source)
        for name, tensor in source.tensors.items():
            np.testing.assert_array_equal(tensor.rows(0, tensor.shape[0]), WEIGHTS[name.replace("lm_head", EMBED)])
        return source.config


# ---- which files


def test_every_way_to_name_the_same_model(model: Path) -> None:
    config = _read_all(model)
    assert _read_all(model / "iter_0000500") == config
    (model / "latest_checkpointed_iteration.txt").unlink()
    assert _read_all(model) == config
    (model / "iter_0000500").rename(model / "release")
    assert _read_all(model) == config
    (model / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert _read_all(model) == config
    (model / "release").rename(model.parent / "any name")
    assert _read_all(model.parent / "any name") == config


def test_the_tracker_file_chooses(model: Path) -> None:
    write_megatron(model, tiny.YUAN, WEIGHTS, 1, [2], iteration=1000, changed={"max_position_embeddings": 99})
    assert open_source(model).config.max_context == 99
    (model / "latest_checkpointed_iteration.txt").write_text("500")
    assert open_source(model).config.max_context == 128
    (model / "latest_checkpointed_iteration.txt").unlink()
    assert "several iterations (iter_0000500, iter_0001000)" in refusal(model)


@pytest.mark.parametrize("latest", ["", "501", "-1", "../../etc", "1" * 300, "rel\x1b[2Jease", "²"])
def test_a_tracker_file_that_lies(model: Path, latest: str) -> None:
    (model / "latest_checkpointed_iteration.txt").write_text(latest, encoding="utf-8")
    said = refusal(model)
    assert "names the iteration" in said
    assert said.isprintable()


def ranks(model: Path) -> list[Path]:
    return sorted((model / "iter_0000500").iterdir())


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        ((0,), r"mp_rank_00_000/model_optim_rng\.pt is missing, of 2 tensor ranks in each of 2 pipeline stages"),
        ((3,), r"mp_rank_01_001/model_optim_rng\.pt is missing"),
        ((1, 3), r"lacks language_model\.encoder\.final_layernorm\.weight; is a stage of the pipeline missing\?"),
        ((0, 2), r"mp_rank_00_000/model_optim_rng\.pt is missing"),
        ((2, 3), r"embeds 150 tokens, and the model has 300; is a tensor rank missing\?"),
    ],
)
def test_missing_ranks_are_noticed(model: Path, absent: tuple[int, ...], said: str) -> None:
    for i in sorted(absent, reverse=True):
        shutil.rmtree(ranks(model)[i])
    with pytest.raises(CheckpointError, match=said):
        open_source(model)


def test_ranks_left_over_from_another_shape(model: Path) -> None:
    shutil.copytree(ranks(model)[0], model / "iter_0000500" / "mp_rank_00")
    assert "holds both mp_rank_00 and mp_rank_00_000" in refusal(model)


def test_ranks_of_another_iteration(model: Path, tmp_path: Path) -> None:
    other = write_megatron(tmp_path / "other", tiny.YUAN, WEIGHTS, 2, [1, 1], iteration=400)
    shutil.rmtree(ranks(model)[1])
    shutil.copytree(other / "iter_0000400" / "mp_rank_00_001", model / "iter_0000500" / "mp_rank_00_001")
    assert "is of iteration 500 and" in refusal(model)
    _read_all(altered(tmp_path, lambda content, *_: content.update(iteration=HUGE)))


def test_a_truncated_rank(model: Path) -> None:
    file = ranks(model)[2] / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"{file} is not a whole zip file" in refusal(model)


# ---- what they hold


def altered(path: Path, change: Callable[[dict[str, Any], int, int], None], stages: list[int] | None = None) -> Path:
    return write_megatron(path / "altered", tiny.YUAN, WEIGHTS, 2, stages or [1, 1], change=change)


def encoder(content: dict[str, Any]) -> dict[str, Any]:
    items: dict[str, Any] = content["model"]["language_model"]["encoder"].items
    return items


Change = Callable[[dict[str, Any], int, int], Any]
NORM, DENSE = "layers.0.input_layernorm.weight", "layers.0.self_attention.dense.weight"


def put(name: str, value: Any = None) -> Change:
    """A tensor more, or in place of another: by default a copy of a norm's vector."""
    return lambda content, *_: encoder(content).update({name: encoder(content)[NORM] if value is None else value})


def renumber(content: dict[str, Any], rank: int, stage: int) -> None:
    items = encoder(content)
    for name in [name for name in items if name.startswith("layers.0.")]:
        items[name.replace("layers.0.", "layers.7.")] = items.pop(name)


def drop_layer(content: dict[str, Any], rank: int, stage: int) -> None:
    for name in [name for name in encoder(content) if name.startswith("layers.")]:
        del encoder(content)[name]


def drop_on_one_rank(content: dict[str, Any], rank: int, stage: int) -> None:
    if (rank, stage) == (1, 0):
        del encoder(content)[DENSE]


def another_shape_on_one_rank(content: dict[str, Any], rank: int, stage: int) -> None:
    if rank:
        put("layers.0.self_attention.get_value.weight", encoder(content)[DENSE])(content, rank, stage)


def untie(content: dict[str, Any], rank: int, stage: int) -> None:
    content["model"]["language_model"]["output_layer"] = {"weight": encoder(content)[NORM]}


IN_ENCODER = "language_model.encoder"
ALTERED: dict[str, tuple[Change, str]] = {
    "no model": (lambda c, *_: c.pop("model"), "is not a Megatron checkpoint: it holds no model"),
    "interleaved": (lambda c, *_: c.update(model0=c.pop("model")), "deals its layers out in turns"),
    "no embedding": (
        lambda c, *_: c["model"]["language_model"].pop("embedding", None),
        "lacks language_model.embedding.word_embeddings.weight",
    ),
    "a tensor missing on a rank": (drop_on_one_rank, f"differ: only one of them holds {IN_ENCODER}.{DENSE}"),
    "a tensor missing on all": (lambda c, *_: encoder(c).pop(NORM), "lacks the tensor model.layers.0.input_layernorm"),
    "a layer missing": (drop_layer, "has 0 layers in all its stages, and the model has 2"),
    "a layer out of order": (renumber, "lacks layer 0 of its stage"),
    "ranks of different shapes": (another_shape_on_one_rank, f"differ in the shape of {IN_ENCODER}.layers.0.self_att"),
    "an unknown tensor": (
        put("layers.0.mlp.dense_h_to_4h.bias"),
        f"holds the tensor mp_rank_00_000/{IN_ENCODER}.layers.0.mlp.dense_h_to_4h.bias, which a yuan model does not",
    ),
    "two ways to write a layer": (put("layers.00.mlp.x"), f"mp_rank_00_000/{IN_ENCODER}.layers.00.mlp.x, which a yuan"),
    "an untied head": (untie, "holds the tensor mp_rank_00_000/language_model.output_layer.weight"),
    "a dense matrix with one axis": (put(DENSE), "should be a matrix, and has shape (256,)"),
    "experts": (put("layers.0.mlp.experts.weight1"), "mlp.experts.weight1: it belongs to Yuan2-M32 and Yuan 3.0"),
    "a router": (put("layers.0.mlp.router.weight"), "mlp.router.weight: it belongs to Yuan2-M32 and Yuan 3.0"),
    "a call in place of a tensor": (put(NORM, SYSTEM), f"{IN_ENCODER}.{NORM} is no tensor but <os.system>"),
    "a call in place of the model": (lambda c, *_: c.update(model=SYSTEM), "holds no dictionary of tensors"),
    "a call in place of the arguments": (lambda c, *_: c.update(args=SYSTEM), "keeps no args to say what the model is"),
    "no arguments": (lambda c, *_: c.pop("args"), "keeps no args to say what the model is; put its config.json beside"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_what_does_not_hold_together_is_named(tmp_path: Path, name: str) -> None:
    change, said = ALTERED[name]
    assert said in refusal(altered(tmp_path, change))


def test_objects_beside_the_model_are_passed_over(tmp_path: Path) -> None:
    """Whatever they are: nothing of them is made."""
    trap = Reduce(Global("os", "system"), (f"touch {tmp_path / 'executed'}",))
    path = altered(tmp_path, lambda content, *_: content.update(rng_state=[trap], callback=trap, optimizer={1: trap}))
    _read_all(path)
    assert not (tmp_path / "executed").exists()


# ---- what the model is


def test_arguments_say_what_the_model_is(model: Path) -> None:
    assert open_source(model).config == ModelConfig(
        model_type="yuan",
        vocab_size=300,
        dim=256,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        head_dim=64,
        hidden_dim=200,
        norm_eps=1e-6,
        rope_theta=1e4,
        max_context=128,
        tie_embeddings=True,
    )


def test_the_published_models_arguments() -> None:
    """Those of the published pretraining scripts."""
    for layers, dim, heads, context in ((24, 2048, 32, 8192), (42, 8192, 64, 4096), (84, 8192, 64, 4096)):
        args = {"num_layers": layers, "hidden_size": dim, "num_attention_heads": heads, "ffn_hidden_size": None}
        args |= {"max_position_embeddings": context, "use_lf_gate": True, "swiglu": True, "norm_dtype": "RMSNorm"}
        config = model_config(args, "args", vocab_rows=135040)
        assert (config.n_layers, config.dim, config.hidden_dim) == (layers, dim, 4 * dim)
        assert (config.head_dim, config.vocab_size, config.max_context) == (dim // heads, 135040, context)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_experts": 32}, "num_experts: it belongs to Yuan2-M32 and Yuan 3.0"),
        ({"attention_projection_size": 4096}, "attention_projection_size: it belongs to Yuan2-M32"),
        ({"virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size: its layers are dealt out"),
        ({"use_lf_gate": False}, "use_lf_gate to false"),
        ({"lf_conv2d_group": 4}, "lf_conv2d_group to 4"),
        ({"swiglu": False}, "swiglu to false"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type to 'learned_absolute'"),
        ({"position_embedding_type": SYSTEM}, "position_embedding_type to <os.system>"),
        ({"rotary_percent": 0.5}, "rotary_percent to 0.5"),
        ({"norm_dtype": "LayerNorm"}, "norm_dtype to 'LayerNorm'"),
        ({"add_bias_linear": True}, "add_bias_linear to true"),
        ({"untie_embeddings_and_output_weights": True}, "untie_embeddings_and_output_weights to true"),
        ({"kv_channels": 128}, "kv_channels to 128"),
        ({"num_attention_heads": None}, "does not say num_attention_heads"),
        ({"num_layers": "2"}, "num_layers to '2'; it must be an integer"),
        ({"num_layers": 2**70}, "num_layers to"),
        ({"num_layers": HUGE}, "num_layers to a number of thousands of digits"),
        ({"num_layers": 3}, "has 2 layers in all its stages, and the model has 3"),
        ({"hidden_size": 255}, "hidden_size to 255, which must be even and a multiple of 4 heads"),
        ({"ffn_hidden_size": 300}, "mlp.up_proj.weight should have shape (300, 256), and has (200, 256)"),
        ({"padded_vocab_size": 301}, "embeds 300 tokens, and the model has 301"),
        ({"padded_vocab_size": 44}, "embeds 300 tokens, too many to be the model's 44 and their padding"),
    ],
)  # fmt: skip
def test_arguments_that_are_not_honoured_or_not_true(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    path = write_megatron(tmp_path / "model", tiny.YUAN, WEIGHTS, 2, [1, 1], changed=changed)
    assert said in refusal(path)


def test_a_config_beside_must_agree_with_the_arguments(model: Path) -> None:
    for place in (model, model / "iter_0000500"):
        (place / "config.json").write_text(json.dumps(tiny.YUAN | {"eod_token": 299}))
        assert _read_all(model).eos_ids == (299,)
        (place / "config.json").write_text(json.dumps(tiny.YUAN | {"num_attention_heads": 8}))
        assert "says n_heads 8, and the args in" in refusal(model)
        (place / "config.json").write_text(json.dumps(tiny.CONFIG))
        assert "describes llama; of Megatron's fourfold reads Yuan 2.0 alone" in refusal(model)
        (place / "config.json").unlink()


def test_arguments_keep_what_else_they_say(model: Path) -> None:
    assert arguments(tiny.YUAN)["layernorm_epsilon"] == 1e-5  # which the published code does not use
    assert open_source(model).config.norm_eps == 1e-6


# ---- the tokenizer


def test_the_tokenizer_is_looked_for_beside_and_where_it_is_said_to_be(model: Path, tmp_path: Path) -> None:
    assert open_source(model).tokenizer_files == {}
    for place in (model / "iter_0000500", model / "tokenizer", model, tmp_path / "elsewhere"):
        place.mkdir(exist_ok=True)
        (place / "tokenizer.model").write_bytes(b"a model")
        (place / "special_tokens_map.json").write_text("{}")
        given = place if place.name == "elsewhere" else None
        found = open_source(model, tokenizer=given)
        names = ("tokenizer.model", "special_tokens_map.json")
        assert found.tokenizer_files == {name: place / name for name in names}
    assert found.fingerprint != open_source(model).fingerprint
    with pytest.raises(CheckpointError, match=r"nowhere has neither tokenizer\.json nor tokenizer\.model"):
        open_source(model, tokenizer=tmp_path / "nowhere")
