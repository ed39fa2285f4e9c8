"""Random models: of the right size, in the right format, the same for the same seed, and alive through every layer."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_source import contents
from fourfold import cli, synth
from fourfold.checkpoint.fields import check
from fourfold.checkpoint.fourfold_dir import inspect, lay_out, open_directory, verify
from fourfold.config import FORMATS, ModelConfig
from fourfold.engine import Engine
from fourfold.errors import CheckpointError, UserError
from fourfold.format import TILE_N, n_panels, unpack
from fourfold.locate import known_config
from fourfold.models import weight_specs
from fourfold.models.shapes import SHAPES
from tiny import CONFIG as TINY

# A ragged vocabulary, groups that are not full (K = 576 and 320), inputs that are no whole tiles (hidden 200).
CONFIG = ModelConfig(
    model_type="qwen2", vocab_size=300, dim=576, n_layers=2, n_heads=9, n_kv_heads=3, head_dim=64, hidden_dim=320,
    norm_eps=1e-5, rope_theta=1e4, max_context=64, tie_embeddings=True, qkv_bias=True, eos_ids=(2,),
)  # fmt: skip
YUAN = ModelConfig(
    model_type="yuan", vocab_size=320, dim=256, n_layers=84, n_heads=4, n_kv_heads=4, head_dim=64, hidden_dim=1024,
    norm_eps=1e-6, rope_theta=1e4, max_context=64, tie_embeddings=True,
)  # fmt: skip


def matrix(path: Path, name: str) -> Any:
    """A stored matrix as float32 (N, K), its padding included."""
    stored = open_directory(path)
    weight = stored.weights[name]
    p = n_panels(weight.shape[0])
    panels = np.fromfile(stored.weights_path, np.uint8, weight.data_bytes, offset=weight.data_offset).reshape(p, -1)
    scales = None
    if weight.scale_offset is not None:
        scales = np.fromfile(stored.weights_path, np.float32, p, offset=weight.scale_offset)
    return unpack(panels, scales, weight.format, (p * TILE_N, -(-weight.shape[1] // 64) * 64))


# ---- shapes ----


def test_yuan_102b_has_every_parameter_and_53_gb() -> None:
    specs = weight_specs(SHAPES["yuan2-102b"])
    assert sum(math.prod(spec.shape) for spec in specs) == 102_577_954_816
    tensors = lay_out(specs, {spec.name: "nf4" for spec in specs if spec.is_matrix})
    assert len(specs) == 1178
    assert len(tensors) == 1178 + 9 * 84 + 1  # a matrix has panel scales beside it
    assert sum(tensor.n_bytes for tensor in tensors) == 52_905_104_352


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("yuan2-51b", 51_842_105_344, 51_842_105_344),
        ("yuan2-2b", 2_088_724_480, 2_088_724_480),
        ("llama-3b", 2_800_000_000, 3_000_000_000),
        ("llama-70b", 70_553_706_496, 70_553_706_496),
        ("llama-7b", 6_738_415_616, 6_738_415_616),
        ("llama-1b", 1_235_814_400, 1_235_814_400),
        ("qwen2-0.5b", 494_032_768, 494_032_768),
        ("smollm2-135m", 134_515_008, 134_515_008),
    ],
)
def test_a_shape_has_the_parameters_of_its_name(name: str, least: int, most: int) -> None:
    assert least <= sum(math.prod(spec.shape) for spec in weight_specs(SHAPES[name])) <= most


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_makes_a_model(name: str) -> None:
    assert known_config(name) == check(SHAPES[name], name)


def test_a_configuration_is_found_by_name_or_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert known_config(tmp_path) == known_config(tmp_path / "config.json")
    assert known_config(tmp_path).dim == TINY["hidden_size"]
    with pytest.raises(UserError, match=r"yuan2-3b is no shape and no config\.json; the shapes are yuan2-102b, "):
        known_config("yuan2-3b")
    (tmp_path / "config.json").write_text('{"fourfold": 1}')
    with pytest.raises(UserError, match="that of a converted model"):
        known_config(tmp_path)


# ---- weights ----


@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_are_gaussian_and_padding_is_zero(tmp_path: Path, fmt: str) -> None:
    for config in (CONFIG, dataclasses.replace(CONFIG, hidden_dim=200, n_layers=1)):
        path = tmp_path / f"model-{config.hidden_dim}"
        synth.synthesize(config, path, fmt)
        verify(path)
        assert inspect(path)["quality"] is None
        for spec in weight_specs(config):
            if not spec.is_matrix:
                vector = open_directory(path).vectors[spec.name]
                assert (vector == 1).all() if "norm" in spec.name else 0.01 < vector.std() < 0.03
                continue
            (n, k), values = spec.shape, matrix(path, spec.name)
            padding = values.copy()
            padding[:n, :k] = 0
            assert not padding.any(), spec.name
            scaled = values[:n, :k] * math.sqrt(k)
            assert abs(scaled.mean()) < 0.03, spec.name
            assert scaled.std() == pytest.approx(1, abs=0.03), spec.name
            assert (scaled**4).mean() == pytest.approx(3, abs=0.4), spec.name  # as a Gaussian's
            assert abs(np.corrcoef(scaled[:64]) - np.eye(min(n, 64))).max() < 0.5, spec.name  # no row twice


def test_a_seed_gives_the_same_bytes_on_any_number_of_threads(tmp_path: Path) -> None:
    synth.synthesize(CONFIG, tmp_path / "one", "nf4", seed=3, threads=1)
    synth.synthesize(CONFIG, tmp_path / "two", "nf4", seed=3, threads=2)
    synth.synthesize(CONFIG, tmp_path / "other", "nf4", seed=4, threads=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert not np.array_equal(matrix(tmp_path / "one", "embed"), matrix(tmp_path / "other", "embed"))


def test_small_pieces_make_the_same_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "PIECE_BYTES", 1)
    synth.synthesize(CONFIG, tmp_path / "model", "nf4")
    assert matrix(tmp_path / "model", "embed")[:300].std() == pytest.approx(1 / 24, rel=0.02)


@pytest.mark.parametrize("config", [YUAN, dataclasses.replace(CONFIG, n_layers=60)], ids=["yuan", "qwen2"])
def test_a_deep_model_stays_finite_and_hears_its_prompt(tmp_path: Path, config: ModelConfig) -> None:
    synth.synthesize(config, tmp_path / "model", "nf4")
    engine = Engine(tmp_path / "model")
    try:
        one, other = engine.logits([1, 2, 3, 4]), engine.logits([5, 2, 3, 4])
    finally:
        engine.close()
    assert np.isfinite(one).all()
    assert ((one.std(axis=1) > 0.5) & (one.std(axis=1) < 2)).all()
    assert np.corrcoef(one[-1], other[-1])[0, 1] < 0.99  # the first of four ids still counts
    assert len(set(one.argmax(axis=1).tolist())) > 1


# ---- failures ----


def test_goes_on_after_kill_9(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_synth import YUAN
from fourfold.synth import synthesize
def progress(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
synthesize(YUAN, sys.argv[1], "nf4", progress=progress)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "killed")], env=os.environ, timeout=60)
    assert done.returncode == -signal.SIGKILL
    n_finished = len((tmp_path / "killed.partial/journal.jsonl").read_text().splitlines()) - 1
    assert n_finished > 100
    seen: list[int] = []
    synth.synthesize(YUAN, tmp_path / "killed", "nf4", progress=lambda done, total: seen.append(done))
    assert seen[0] > seen[-1] / 3  # what was there was kept
    synth.synthesize(YUAN, tmp_path / "whole", "nf4")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fmt": "nf5"}, "no format 'nf5'"),
        ({"threads": 0}, "threads must be"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        synth.synthesize(CONFIG, tmp_path / "model", **{"fmt": "nf4"} | options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_could_not_be_opened_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="token 300 lies outside the vocabulary"):
        synth.synthesize(dataclasses.replace(CONFIG, eos_ids=(300,)), tmp_path / "model", "nf4")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_one_thread_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "_vector", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        synth.synthesize(CONFIG, tmp_path / "model", "nf4")
    assert not (tmp_path / "model").exists()


# ---- the command line ----


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


def test_a_synthetic_model_runs_on_ids(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    model = str(tmp_path / "model")
    status, out, err = run("synth", str(tmp_path), model, "--layers", "3", "--format", "int8", "--json")
    assert status == 0, err
    facts = json.loads(out)
    assert (facts["layers"], facts["format"], facts["bytes"]) == (3, "int8", verify(model))
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
    assert facts["parameters"] == 300 * 64 + 3 * layer + 64

    status, out, err = run("run", model, "--ids", "1,2,3", "--max-tokens", "4", "--ignore-eos", "--json")
    answer = json.loads(out.splitlines()[-1])
    assert status == 0, err
    assert answer["text"] == "".join(f"{i} " for i in answer["token_ids"])
    assert (len(answer["token_ids"]), answer["prompt_tokens"]) == (4, 3)

    for arguments, message in (
        (("run", model, "-p", "hi"), "has no tokenizer"),
        (("chat", model, "-p", "hi"), "has no tokenizer"),
        (("run", model, "--ids", "1,x"), "ids must be whole numbers"),
        (("run", model, "--ids", "1", "-p", "hi"), "--prompt cannot be used"),
        (("run", model, "--ids", "300"), "are not all the model's"),
        (("synth", str(tmp_path), model), "exists already"),
        (("synth", str(tmp_path), f"{model}2", "--layers", "0"), "n_layers is 0"),
        (("synth", "gpt5", f"{model}2"), "the shapes are"),
    ):
        status, _, err = run(*arguments)
        assert (status, err.count("\n")) == (2, 1), err
        assert message in err
    with pytest.raises(CheckpointError):
        verify(f"{model}2")
