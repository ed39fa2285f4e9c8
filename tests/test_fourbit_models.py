"""Quantized checkpoints through conversion and engine: the codes arrive as they were, and so does what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fourbit_writers as writers
import reference
from fourbit_writers import Written
from fourfold import cli
from fourfold import format as tiles
from fourfold.checkpoint import open_source
from fourfold.checkpoint.coded import CodedTensor
from fourfold.checkpoint.fourfold_dir import FourfoldDirectory, inspect, open_directory
from fourfold.config import WeightFormat
from fourfold.conversion import convert
from fourfold.errors import CheckpointError, UnsupportedError
from fourfold.keep import read_blocks
from fourfold.llm import LLM
from fourfold.models import weight_specs
from test_fourbit_readers import SCHEMES
from test_tiny_models import unpacked

IDS = [5, 77, 123, 299, 0, 41, 7, 7, 260, 18]
ENTIRE = ["NF4, nested", "FP4", "GPTQ", "GPTQ, one scale an output", "AWQ", "compressed-tensors, asymmetric"]


def write(tmp_path: Path, scheme: str) -> tuple[Path, writers.tiny.Tensors]:
    quantization, write, _ = SCHEMES[scheme]
    return writers.checkpoint(tmp_path / "model", quantization, write)


def converted(path: Path, fmt: str | None = None) -> tuple[FourfoldDirectory, list[str]]:
    """Its conversion, and what was said of it."""
    notes: list[str] = []
    with open_source(path) as source:
        convert(source, dst := path.parent / f"converted-{fmt}", fmt, notice=notes.append)
    return open_directory(dst), notes


def stored_codes(directory: FourfoldDirectory, name: str) -> NDArray[Any]:
    """(N, K), taken out of the tiles."""
    weight = directory.weights[name]
    count = tiles.n_panels(weight.shape[0])
    panels = np.fromfile(directory.weights_path, np.uint8, weight.data_bytes, offset=weight.data_offset)
    t = tiles.n_tiles(weight.shape[1])
    codes = tiles._take_codes(tiles._split_groups(panels.reshape(count, -1), t, weight.format)[1], weight.format)
    return codes.reshape(-1, 64 * t)[: weight.shape[0], : weight.shape[1]]


def stored_zeros(directory: FourfoldDirectory, name: str) -> NDArray[np.int8]:
    """(N, K / 64), taken out of the tiles."""
    weight = directory.weights[name]
    count, t = tiles.n_panels(weight.shape[0]), tiles.n_tiles(weight.shape[1])
    panels = np.fromfile(directory.weights_path, np.uint8, weight.data_bytes, offset=weight.data_offset)
    scales, _ = tiles._split_groups(panels.reshape(count, -1), t, weight.format)
    return scales[..., 16:].transpose(0, 2, 1).reshape(-1, t)[: weight.shape[0]].view(np.int8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_not_one_code_changes(scheme: str, tmp_path: Path) -> None:
    path, _ = write(tmp_path, scheme)
    directory, _ = converted(path)
    with open_source(path) as source:
        kept = [spec for spec in weight_specs(source.config) if directory.weights.get(spec.name, None) is not None]
        coded = [spec for spec in kept if isinstance(source.tensors[spec.rows.names[0]], CodedTensor)]
        assert len(coded) == 14
        for spec in coded:
            fmt = directory.weights[spec.name].format
            assert fmt == SCHEMES[scheme][2][0]
            theirs = read_blocks(spec, source, fmt, 0, spec.shape[0])["codes"]
            ours = stored_codes(directory, spec.name)
            if fmt == "int8":  # a block's codes may be there a whole number of times
                blocks, stored = (a.view(np.int8).astype(int).reshape(-1, 64) for a in (theirs, ours))
                times = np.abs(stored).max(axis=1) // np.maximum(1, np.abs(blocks).max(axis=1))
                np.testing.assert_array_equal(stored, blocks * times[:, None])
            else:
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("scheme", ENTIRE)
def test_the_model_is_the_reference_on_what_is_stored_and_near_what_the_codes_stand_for(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 kernels: 1e-5 of the largest logit. The rest is the scales: see `off_by_half_a_step`."""
    monkeypatch.setenv("FOURFOLD_ISA", "scalar")  # whose kernels are exact
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    path, meant = write(tmp_path, scheme)
    directory, _ = converted(path)
    config = directory.config
    exact = reference.forward(config, meant, IDS)
    stored = reference.forward(config, unpacked(directory), IDS)
    with LLM(path, ranks=2, kv="f32") as llm:
        actual = llm.logits(IDS)
    assert np.abs(actual - stored).max() <= 1e-5 * np.abs(stored).max()
    assert (
        0
        < rms(actual - exact)
        <= max(rms(reference.forward(config, w, IDS) - exact) for w in off_by_half_a_step(meant))
    )


def rms(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.square(values).mean()))


def off_by_half_a_step(weights: writers.tiny.Tensors) -> list[writers.tiny.Tensors]:
    """The weights with the scale of each block off by up to half a step of E4M3, a 16th, at random: four times."""

    def off(weight: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
        factors = 1 + rng.uniform(-1 / 16, 1 / 16, (weight.shape[0], weight.shape[1] // 64))
        return weight * np.repeat(factors, 64, axis=1)

    rngs = [np.random.default_rng(seed) for seed in range(4)]
    return [{name: off(w, rng) if "_proj." in name else w for name, w in weights.items()} for rng in rngs]


def test_what_is_not_quantized_becomes_bf16_and_a_format_that_is_asked_for_is_everyones(tmp_path: Path) -> None:
    path, meant = write(tmp_path, "NF4, nested")
    directory, notes = converted(path)
    assert directory.format == "nf4"
    assert {name: w.format for name, w in directory.weights.items() if w.format != "nf4"} == {
        "embed": "bf16",
        "head": "bf16",
    }
    assert notes == ["the bitsandbytes NF4 codes of 14 matrices are kept, as nf4; 2 others are bf16"]
    assert inspect(directory.path)["recipe"]["codes"] == notes[0]
    np.testing.assert_array_equal(unpacked(directory)["lm_head.weight"], meant["lm_head.weight"])

    everything, notes = converted(path, "nf4")
    assert {w.format for w in everything.weights.values()} == {"nf4"}
    assert notes == ["the bitsandbytes NF4 codes of 14 matrices are kept, as nf4; 2 others are nf4"]
    np.testing.assert_array_equal(stored_codes(everything, "layers.1.down"), stored_codes(directory, "layers.1.down"))


@pytest.mark.parametrize("fmt", ["int8", "nf4", "f32"])
def test_codes_that_the_format_does_not_hold_are_quantized_anew_and_that_is_said(
    fmt: WeightFormat, tmp_path: Path
) -> None:
    path, meant = write(tmp_path, "FP4")
    directory, notes = converted(path, fmt)
    assert {w.format for w in directory.weights.values()} == {fmt}
    assert notes == [
        "the bitsandbytes FP4 codes of 14 matrices (layers.0.q to layers.1.down) are not kept: dequantized, and"
        f" quantized anew as {fmt}"
    ]
    assert inspect(directory.path)["recipe"]["codes"] == notes[0]
    for name, weight in unpacked(directory).items():
        difference = weight.astype(np.float64) - meant[name]
        assert rms(difference) <= {"int8": 0.01, "nf4": 0.15, "f32": 0}[fmt] * rms(meant[name]), name


def test_integers_are_kept_in_int8_where_that_is_asked_for(tmp_path: Path) -> None:
    path, meant = write(tmp_path, "GPTQ")
    directory, notes = converted(path, "int8")
    assert notes[0] == "the GPTQ int4 codes of 14 matrices are kept, as int8; 2 others are int8"
    for name, weight in unpacked(directory).items():
        if "_proj." in name:
            assert rms(weight - meant[name]) < 0.012 * rms(meant[name])


@pytest.mark.parametrize("scheme", ["AWQ", "GPTQ, asymmetric", "compressed-tensors, asymmetric"])
def test_zero_points_are_kept_beside_the_codes(scheme: str, tmp_path: Path) -> None:
    path, _ = write(tmp_path, scheme)
    directory, notes = converted(path)
    assert directory.format == "uint4"
    with open_source(path) as source:
        (spec,) = (spec for spec in weight_specs(source.config) if spec.name == "layers.1.down")
        theirs = read_blocks(spec, source, "uint4", 0, spec.shape[0])
        origin = source.tensors[spec.rows.names[0]].origin  # type: ignore[attr-defined]
    assert notes == [f"the {origin} codes of 14 matrices are kept, as uint4; 2 others are bf16"]
    assert inspect(directory.path)["recipe"]["codes"] == notes[0]
    np.testing.assert_array_equal(stored_zeros(directory, spec.name), theirs["zeros"])
    assert theirs["zeros"].min() < 4
    assert theirs["zeros"].max() > 11


def test_zero_points_are_kept_in_int8_where_that_is_asked_for(tmp_path: Path) -> None:
    path, meant = write(tmp_path, "AWQ")
    directory, notes = converted(path, "int8")
    assert notes == ["the AWQ int4 codes of 14 matrices are kept, as int8; 2 others are int8"]
    for name, weight in unpacked(directory).items():
        if "_proj." in name:
            assert rms(weight - meant[name]) < 0.012 * rms(meant[name])


def test_matrices_of_one_linear_may_have_several_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """q in int4, k as it was, v in uint4: one op in the model's description, three kernels in the engine."""
    monkeypatch.setenv("FOURFOLD_ISA", "scalar")  # whose kernels are exact

    def mixed(module: str, shape: tuple[int, int], seed: int) -> Written | None:
        if "k_proj" in module or "gate" in module:
            return None
        return writers.gptq(module, shape, seed, zero=5 if "v_proj" in module else 8)

    path, _ = writers.checkpoint(tmp_path / "model", writers.gptq_config(sym=False), mixed)
    directory, _ = converted(path)
    assert [directory.weights[f"layers.0.{part}"].format for part in "qkv"] == ["int4", "bf16", "uint4"]
    expected = reference.forward(directory.config, unpacked(directory), IDS)
    for ranks in (1, 2):
        with LLM(directory.path, ranks=ranks, kv="f32") as llm:
            assert np.abs(llm.logits(IDS) - expected).max() <= 1e-5 * np.abs(expected).max()
            assert np.abs(llm.logits(IDS, step=True) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_codes_that_no_format_holds_are_refused_by_name_and_taken_where_one_is_named(tmp_path: Path) -> None:
    path, meant = writers.checkpoint(tmp_path / "model", writers.gptq_config(32), lambda *a: writers.gptq(*a, group=32))
    with pytest.raises(
        UnsupportedError, match=r"self_attn.q_proj.weight, GPTQ int4, has one scale for 32 .*--format int8"
    ):
        converted(path)
    directory, _ = converted(path, "int4")
    q = unpacked(directory)["model.layers.0.self_attn.q_proj.weight"]
    assert rms(q - meant["model.layers.0.self_attn.q_proj.weight"]) < 0.12 * rms(q)


def test_act_order_is_refused_by_name_and_hardly_loses_as_int8(tmp_path: Path) -> None:
    config = writers.gptq_config(64) | {"desc_act": True}
    path, meant = writers.checkpoint(tmp_path / "model", config, lambda *a: writers.gptq(*a, group=64, shuffled=True))
    with pytest.raises(
        UnsupportedError, match=r"q_proj.weight, GPTQ int4, has inputs in another order .*--format int8"
    ):
        converted(path)
    directory, _ = converted(path, "int8")
    q = unpacked(directory)["model.layers.0.self_attn.q_proj.weight"]
    assert rms(q - meant["model.layers.0.self_attn.q_proj.weight"]) < 0.02 * rms(q)


def test_a_scale_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    def damaged(module: str, shape: tuple[int, int], seed: int) -> Written:
        tensors, values = writers.gptq(module, shape, seed)
        if module.endswith("layers.1.mlp.up_proj"):
            tensors[f"{module}.scales"][0, 3] = np.inf
        return tensors, values

    path, _ = writers.checkpoint(tmp_path / "model", writers.gptq_config(), damaged)
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight \(layers.1.up\) holds NaN or infinity"):
        converted(path)
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_conversion_resumes_only_what_is_the_same(tmp_path: Path) -> None:
    """The formats of single matrices belong to what a conversion is."""
    from fourfold.errors import UserError

    path, _ = write(tmp_path, "NF4, nested")
    dst = tmp_path / "dst"

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with open_source(path) as source:
        with pytest.raises(KeyboardInterrupt):
            convert(source, dst, progress=stop)
        with pytest.raises(UserError, match="unfinished conversion of another source or format"):
            convert(source, dst, "nf4")
        convert(source, dst)
    whole, _ = converted(path)
    assert (dst / "model.safetensors").read_bytes() == whole.weights_path.read_bytes()


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


def test_the_commands_take_such_a_directory(run: Run, tmp_path: Path) -> None:
    path, _ = write(tmp_path, "AWQ")
    status, out, err = run("inspect", str(path), "--json")
    assert status == 0
    assert "the AWQ int4 codes of 14 matrices are kept, as uint4; 2 others are bf16" in err
    assert json.loads(out.splitlines()[-1])["format"] == "uint4"
    status, _, err = run("inspect", str(path), "--json")
    assert (status, err) == (0, "")  # converted already

    np.save(ids := tmp_path / "ids.npy", np.array(IDS))
    status, out, err = run(
        "eval", str(path), "--ids", str(ids), "--against", str(path), "--against-format", "f32", "--json"
    )
    assert status == 0
    assert "quantized anew as f32" in err
    assert 0 < json.loads(out.splitlines()[-1])["kl_mean"] < 0.05

    status, _, err = run("quantize", str(path), str(tmp_path / "dst"), "--format", "nf4")
    assert status == 0
    assert "are not kept: dequantized, and quantized anew as nf4" in err
    status, out, _ = run("run", str(path), "--ids", "5,77", "--max-tokens", "3", "--ignore-eos")
    assert status == 0
    assert out


def test_the_commands_refuse_in_one_sentence(run: Run, tmp_path: Path) -> None:
    path, _ = writers.checkpoint(tmp_path / "model", writers.gptq_config(32), lambda *a: writers.gptq(*a, group=32))
    status, _, err = run("inspect", str(path))
    assert status == 2
    assert err.count("\n") == 1
    assert "only whole multiples of 64 can be kept; name a format" in err
