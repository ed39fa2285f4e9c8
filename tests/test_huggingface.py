"""Hugging Face directories: read by rows and numerically right; damaged or surprising ones refused in a sentence."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import tiny
from fourfold import conversion
from fourfold.checkpoint import Source, check_complete, open_source
from fourfold.checkpoint import complete as complete_module
from fourfold.errors import CheckpointError, UnsupportedError
from fourfold.models import weight_specs
from reference import forward

REFUSALS = (CheckpointError, UnsupportedError)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write_huggingface(tmp_path / "model", tiny.CONFIG, tiny.tensors(tiny.CONFIG))


def whole(source: Source) -> tiny.Tensors:
    return {name: tensor.rows(0, tensor.shape[0]) for name, tensor in source.tensors.items()}


def complete(source: Source) -> None:
    check_complete(weight_specs(source.config), source)


def rewritten(path: Path, change: Callable[[tiny.Tensors], Any]) -> Path:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")
    return path


def raw_safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


# ---- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_are_the_tensors_rows(tmp_path: Path, shards: int, dtype: Any) -> None:
    weights = {name: weight.astype(dtype) for name, weight in tiny.tensors(tiny.CONFIG).items()}
    with open_source(tiny.write_huggingface(tmp_path, tiny.CONFIG, weights, shards)) as source:
        assert source.tensors.keys() == weights.keys()
        for name, weight in weights.items():
            tensor = source.tensors[name]
            assert tensor.shape == weight.shape
            for start, stop in ((0, len(weight)), (3, 7), (5, 5)):
                rows = tensor.rows(start, stop)
                assert rows.dtype == dtype
                np.testing.assert_array_equal(rows, weight[start:stop])
        complete(source)


def test_a_closed_source_reads_no_more_but_what_was_read_stays(model: Path) -> None:
    with open_source(model) as source:
        row = source.tensors["model.norm.weight"].rows(0, 3)
    np.testing.assert_array_equal(row, tiny.tensors(tiny.CONFIG)["model.norm.weight"][:3])
    with pytest.raises(ValueError, match="closed"):
        source.tensors["model.norm.weight"].rows(0, 3)


def test_tokenizer_files_are_found(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    (model / "notes.txt").write_text("not ours")
    assert open_source(model).tokenizer_files == {"tokenizer.json": model / "tokenizer.json"}


def test_generation_config_adds_ends(model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258], "temperature": 0.7}))
    assert open_source(model).config.eos_ids == (257, 258)


def test_the_fingerprint_follows_the_files(model: Path) -> None:
    before = open_source(model).fingerprint
    assert open_source(model).fingerprint == before
    os.utime(model / "model.safetensors", (1, 1))
    assert open_source(model).fingerprint != before


@pytest.mark.parametrize("name", ["stories15M", "stories260K"])
def test_stories_logits(shared: Path, name: str) -> None:
    path = shared / name
    with open_source(path) as source:
        complete(source)
        logits = forward(source.config, whole(source), np.load(path / "ref_ids.npy").ravel())
    np.testing.assert_allclose(logits, np.load(path / "ref_logits.npy").reshape(logits.shape), atol=1e-4)


@pytest.mark.parametrize(("name", "angles"), [("yuan-d64", "f32"), ("yuan-d128-bf16angles", "bf16")])
def test_yuan_logits(shared: Path, name: str, angles: str) -> None:
    path = shared / "golden" / name
    expected = load_file(path / "logits.safetensors")
    with open_source(path) as source:
        complete(source)
        logits = forward(source.config, whole(source), expected["tokens"], angles)
    np.testing.assert_allclose(logits, expected["prefill"], atol=1e-3)
    np.testing.assert_allclose(logits, expected["decode"], atol=1e-3)


# ---- what may stay unread, and what may not ------------------------------------------------------


def test_a_copied_head_and_stored_frequencies_are_ignored(model: Path) -> None:
    def add(weights: tiny.Tensors) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    complete(open_source(rewritten(model, add)))


def test_a_head_that_is_no_copy_is_not_dropped(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(complete_module, "COMPARED_BYTES", 1)  # a row at a time

    def add(weights: tiny.Tensors) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()

    def differ(weights: tiny.Tensors) -> None:
        weights["lm_head.weight"][-1, -1] += 1

    with open_source(rewritten(model, add)) as source:
        assert source.config.tie_embeddings
        conversion.convert(source, tmp_path / "copied", "nf4")
    with open_source(rewritten(model, differ)) as source:
        complete(source)
        with pytest.raises(CheckpointError, match=r"a head of its own, lm_head\.weight, though .*tie_word_embeddings"):
            conversion.convert(source, tmp_path / "other", "nf4")
    assert not (tmp_path / "other.partial").exists()


def test_a_missing_tensor_is_named(model: Path) -> None:
    rewritten(model, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        complete(open_source(model))


def test_a_wrong_shape_is_shown_beside_the_right_one(model: Path) -> None:
    rewritten(model, lambda weights: weights.update({"model.norm.weight": np.zeros(63, np.float32)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight should have shape \(64,\), and has \(63,\)"):
        complete(open_source(model))


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "surprise", "model.layers.0.self_attn.q_proj.bias"]
)
def test_an_unexpected_tensor_is_named(model: Path, name: str) -> None:
    rewritten(model, lambda weights: weights.update({name: np.zeros(4, np.float32)}))
    with pytest.raises(CheckpointError, match=f"holds the tensor {name}"):
        complete(open_source(model))


def test_a_tied_models_head_of_another_shape_is_no_copy(model: Path) -> None:
    rewritten(model, lambda weights: weights.update({"lm_head.weight": np.zeros((4, 64), np.float32)}))
    with pytest.raises(CheckpointError, match=r"holds the tensor lm_head\.weight"):
        complete(open_source(model))


# ---- hostile directories -------------------------------------------------------------------------


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "nothing").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no such model does not exist"):
        open_source(tmp_path / "no such model")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_source(tmp_path / "empty")
    for name in ("notes.txt", "nothing"):
        with pytest.raises(CheckpointError, match=f"{name} is no GGUF file; of other models give the directory"):
            open_source(tmp_path / name)


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '"text"', "[" * 100_000, "\xff", '{"vocab_size": 1' + "0" * 9999 + "}"]
)
def test_config_that_is_no_json_object(model: Path, content: str) -> None:
    (model / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_source(model)


def test_weights_that_are_absent(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "training_args.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors and no pytorch_model\*\.bin"):
        open_source(model)


def test_several_files_need_an_index(tmp_path: Path) -> None:
    tiny.write_huggingface(tmp_path, tiny.CONFIG, tiny.tensors(tiny.CONFIG), shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"2 \*\.safetensors but no model\.safetensors\.index\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda index: index.update({"model.norm.weight": "absent.safetensors"}), r"model\.norm\.weight in 'absent"),
        (lambda index: index.update({"model.norm.weight": "../config.json"}), r"model\.norm\.weight in '\.\./config"),
        (lambda index: index.update({"phantom": "model-00001-of-00002.safetensors"}), "places the tensor phantom"),
        (lambda index: index.pop("model.norm.weight"), r"holds the tensor model\.norm\.weight, which"),
        (lambda index: index.update({"model.norm.weight": 7}), "no weight_map"),
        (lambda index: index.clear(), "no weight_map"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, change: Callable[[dict[str, Any]], Any], named: str) -> None:
    tiny.write_huggingface(tmp_path, tiny.CONFIG, tiny.tensors(tiny.CONFIG), shards=2)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=named):
        open_source(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny.write_huggingface(tmp_path, tiny.CONFIG, tiny.tensors(tiny.CONFIG), shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        open_source(tmp_path)


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2, 2), offsets: tuple[int, int] = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        pytest.param({"a": entry(offsets=(0, 1600))}, bytes(16), id="past the end"),
        pytest.param({"a": entry(), "b": entry(offsets=(8, 24))}, bytes(24), id="overlapping"),
        pytest.param({"a": entry(offsets=(16, 32))}, bytes(32), id="a hole"),
        pytest.param({"a": entry()}, bytes(32), id="data left over"),
        pytest.param({"a": entry(shape=(2, 3))}, bytes(16), id="shape against bytes"),
        pytest.param({"a": entry(shape=(2**33, 2**33))}, bytes(16), id="product overflows"),
        pytest.param({"a": entry(shape=(10**6, 10**6), offsets=(0, 4 * 10**12))}, bytes(16), id="10^12 elements"),
        pytest.param({"a": entry(shape=(-1, 2))}, bytes(16), id="negative"),
        pytest.param({"a": entry(offsets=(16, 0))}, bytes(16), id="backwards"),
        pytest.param({"a": entry(dtype="F33")}, bytes(16), id="unknown dtype"),
        pytest.param({"a": {"dtype": "F32"}}, bytes(16), id="incomplete"),
        pytest.param(b"not json", b"", id="not json"),
        pytest.param(b"\xff\xfe", b"", id="not UTF-8"),
        pytest.param(b"[" * 50_000, b"", id="deep"),
    ],
)
def test_a_header_that_lies(model: Path, header: Any, data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a sound safetensors file"):
        open_source(raw_safetensors(model, header, data))


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_that_lies(model: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_source(raw_safetensors(model, {"a": entry()}, bytes(16), length))


def test_a_dtype_that_is_not_read_is_named(model: Path) -> None:
    with pytest.raises(UnsupportedError, match="tensor weird is I64"):
        open_source(raw_safetensors(model, {"weird": entry("I64", (2,))}, bytes(16)))


def test_names_that_would_write_on_the_terminal(model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be printed, 'a\\nb'"):
        open_source(raw_safetensors(model, {"a\nb": entry()}, bytes(16)))


def test_truncated_anywhere(model: Path) -> None:
    file = model / "model.safetensors"
    content = file.read_bytes()
    for length in {*range(0, 40), *range(40, len(content), 997), len(content) - 1}:
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is (empty|not a sound)"):
            open_source(model)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_never_surprise(model: Path, data: st.DataObject) -> None:
    weights = dict(list(tiny.tensors(tiny.CONFIG).items())[:4])
    save_file(weights, model / "model.safetensors")
    content = bytearray((model / "model.safetensors").read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for at in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    (model / "model.safetensors").write_bytes(content)
    said = ""
    try:
        with open_source(model) as source:
            whole(source)
            complete(source)
    except REFUSALS as refusal:
        said = str(refusal)
    assert "\n" not in said


def test_a_directory_that_is_converted_already_is_refused(model: Path) -> None:
    (model / "config.json").write_text('{"fourfold": 1, "format": "nf4"}')
    with pytest.raises(CheckpointError, match="is converted already; give the model that it was converted from"):
        open_source(model)
