"""Every form in which Yuan 2.0 is published: one model written out in each gives the same logits through the house."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import tiny
import torch_writer
from fourfold import cli
from fourfold.checkpoint import Source, check_complete, open_source
from fourfold.conversion import convert
from fourfold.engine import Engine
from fourfold.models import weight_specs
from megatron_writer import write_megatron

Tensors = dict[str, NDArray[Any]]
Write = Callable[[Path, dict[str, Any], Tensors], None]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def bin_file(path: Path, config: dict[str, Any], weights: Tensors) -> None:
    (path / "config.json").write_text(json.dumps(config))
    torch_writer.write(path / "pytorch_model.bin", weights, {HEAD: EMBEDDING})


def bin_head_twice(path: Path, config: dict[str, Any], weights: Tensors) -> None:
    bin_file(path, config, weights)
    torch_writer.write(path / "pytorch_model.bin", weights | {HEAD: weights[EMBEDDING]})


def bin_shards(path: Path, config: dict[str, Any], weights: Tensors) -> None:
    (path / "config.json").write_text(json.dumps(config))
    index = {}
    for i in range(3):
        part = dict(list(weights.items())[i::3])
        shared = {HEAD: EMBEDDING} if EMBEDDING in part else {}
        name = f"pytorch_model-{i + 1:05}-of-00003.bin"
        torch_writer.write(path / name, part, shared)
        index |= dict.fromkeys([*part, *shared], name)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def bin_odd_views(path: Path, config: dict[str, Any], weights: Tensors) -> None:
    """Parameters; all of one storage; transposed and with gaps."""
    (path / "config.json").write_text(json.dumps(config))
    storages, content = torch_writer.Storages(), {}
    vectors = {name: weight for name, weight in weights.items() if weight.ndim == 1}
    together, offset = storages.add(np.concatenate(list(vectors.values()))), 0
    for name, vector in vectors.items():
        content[name] = storages.parameter(storages.view(together, offset, vector.shape, [1]))
        offset += vector.size
    for name, weight in weights.items():
        if name.endswith("o_proj.weight"):
            content[name] = storages.view(storages.add(weight.T), 0, weight.shape, [1, weight.shape[0]])
        elif name.endswith("v_proj.weight"):
            wider = np.concatenate([np.full_like(weight, np.nan), weight], axis=1)
            content[name] = storages.view(storages.add(wider), weight.shape[1], weight.shape, [wider.shape[1], 1])
        elif weight.ndim > 1:
            content[name] = storages.parameter(storages.tensor(weight))
    storages.write(path / "pytorch_model.bin", torch_writer.ordered(content))


def megatron(ranks: int, stages: Callable[[int], list[int]]) -> Write:
    def write(path: Path, config: dict[str, Any], weights: Tensors) -> None:
        write_megatron(path, config, weights, ranks, stages(config["num_hidden_layers"]))

    return write


def megatron_with_config(path: Path, config: dict[str, Any], weights: Tensors) -> None:
    """No arguments in the files; two tensor ranks whose vocabulary is filled up."""
    filled = np.concatenate([weights[EMBEDDING], np.full_like(weights[EMBEDDING][:64], np.nan)])
    write_megatron(
        path, config, weights | {EMBEDDING: filled}, 2, [1, config["num_hidden_layers"] - 1],
        change=lambda content, rank, stage: content.pop("args"),
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))


def safetensors(shards: int) -> Write:
    def write(path: Path, config: dict[str, Any], weights: Tensors) -> None:
        tiny.write_huggingface(path, config, weights, shards)

    return write


FORMS: dict[str, Write] = {
    "safetensors": safetensors(1),
    "safetensors shards": safetensors(4),
    "bin": bin_file,
    "bin, head twice": bin_head_twice,
    "bin shards": bin_shards,
    "bin, odd views": bin_odd_views,
    "megatron 1 x 1": megatron(1, lambda n: [n]),
    "megatron 2 x 1": megatron(2, lambda n: [n]),
    "megatron 4 x 1": megatron(4, lambda n: [n]),
    "megatron 1 x n": megatron(1, lambda n: [1] * n),
    "megatron 1 x 3, first stage without layers": megatron(1, lambda n: [0, 1, n - 1]),
    "megatron 2 x 2, uneven": megatron(2, lambda n: [n - 1, 1]),
    "megatron 2 x 2, config.json, filled up": megatron_with_config,
}
GOLDENS = {"yuan-d64": "f32", "yuan-d128-bf16angles": "bf16"}  # and the precision of their rotary angles


@pytest.fixture(params=[(name, form) for name in GOLDENS for form in FORMS], ids=lambda pair: f"{pair[0]}: {pair[1]}")
def golden_form(request: pytest.FixtureRequest, shared: Path, tmp_path: Path) -> Iterator[tuple[str, Path, Tensors]]:
    """A golden's name, its model in one of the forms, and its weights."""
    name, form = request.param
    config, weights = tiny.golden(shared, name)
    (path := tmp_path / "model").mkdir()
    FORMS[form](path, config, weights)
    yield name, path, weights
    for file in path.rglob("*.*"):
        if file.is_file():
            file.unlink()


def complete(source: Source) -> Source:
    check_complete(weight_specs(source.config), source)
    return source


def test_the_golden_logits_come_back(golden_form: tuple[str, Path, Tensors], shared: Path, tmp_path: Path) -> None:
    name, path, weights = golden_form
    expected = load_file(shared / "golden" / name / "logits.safetensors")
    with open_source(path) as source:
        complete(source)
        for tensor_name, weight in weights.items():
            tensor = source.tensors[tensor_name]
            assert tensor.shape == weight.shape
            for start, stop in ((0, len(weight)), (len(weight) // 2 - 3, len(weight) // 2 + 5), (7, 7)):
                rows = tensor.rows(start, stop)
                assert rows.dtype == np.float32
                np.testing.assert_array_equal(rows, weight[start:stop])
        convert(source, tmp_path / "converted", "f32")
    engine = Engine(tmp_path / "converted", rope_angles=GOLDENS[name])
    try:
        assert np.abs(engine.logits(expected["tokens"].tolist()) - expected["prefill"]).max() <= 1e-3
    finally:
        engine.close()


def test_the_published_precision_is_bfloat16(shared: Path, tmp_path: Path) -> None:
    golden = shared / "golden" / "yuan-d64"
    config = json.loads((golden / "config.json").read_text())
    weights = {
        name: weight.astype(ml_dtypes.bfloat16) for name, weight in load_file(golden / "model.safetensors").items()
    }
    weights = {name: weight for name, weight in weights.items() if not name.endswith("inv_freq") and name != HEAD}
    written = {}
    for form in ("safetensors", "bin shards", "megatron 2 x 2, uneven"):
        (path := tmp_path / form).mkdir()
        FORMS[form](path, config, weights)
        with open_source(path) as source:
            convert(complete(source), tmp_path / f"{form}.nf4", "nf4")
        written[form] = (tmp_path / f"{form}.nf4" / "model.safetensors").read_bytes()
    assert len(set(written.values())) == 1


def test_a_megatron_model_whose_tokenizer_lies_elsewhere_answers(
    yuan_tokenizer: Path, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, with the real vocabulary: its last rows are padding."""
    config = tiny.YUAN | {"vocab_size": 135040, "hidden_size": 64, "num_attention_heads": 1, "eos_token_id": 77185}
    write_megatron(tmp_path / "model", config, tiny.tensors(config), 2, [1, 1])

    def run(*arguments: object) -> tuple[int, dict[str, Any], str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), json.loads(out.splitlines()[-1]) if out else {}, err

    source, made = tmp_path / "model", tmp_path / "made"
    status, _, err = run("quantize", source, made, "--tokenizer", shared / "stories15M")
    assert (status, err.count("\n"), made.exists()) == (2, 1, False)
    assert f"{shared / 'stories15M' / 'tokenizer.model'} is not Yuan's tokenizer" in err
    status, result, err = run("quantize", source, made, "--tokenizer", yuan_tokenizer, "--format", "int8")
    assert (status, err) == (0, "")
    assert result["tokenizer_files"] == ["special_tokens_map.json", "tokenizer.model", "tokenizer_config.json"]
    status, answer, _ = run(
        "run", made, "-p", "北京", "--max-tokens", 5, "--temperature", 9, "--chat-template", "yuan-n"
    )
    assert (status, answer["prompt_tokens"]) == (0, 3)
    assert max(answer["token_ids"]) < 134958
    status, result, _ = run("quantize", source, tmp_path / "bare", "--format", "int8")
    assert (status, result["tokenizer_files"]) == (0, [])
    status, _, err = run("run", tmp_path / "bare", "-p", "北京")
    assert status == 2
    assert "`fourfold quantize SRC DST --tokenizer DIR` takes one from elsewhere" in err
