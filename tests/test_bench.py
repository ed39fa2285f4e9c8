"""Benchmarks say what they measured, and nothing where the result is wrong. How fast is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fourfold._core as _core
from fourfold import bench, cli
from fourfold.bench import conversion, limits, matrix, model, reduction, speculation
from fourfold.checkpoint import open_source
from fourfold.conversion import convert
from fourfold.errors import ResourceError, RuntimeFailure, UserError
from fourfold.generation import Generation
from fourfold.machine import read_machine
from fourfold.models.shapes import SHAPES
from fourfold.request import Request
from fourfold.steploop import StepLoop
from fourfold.synth import synthesize
from tiny import CONFIG, QWEN2, tensors, write_huggingface

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`fourfold bench ... --json`, its result; what it prints for people is tried as well."""
    monkeypatch.setattr(limits, "READ_BYTES", 0)

    def run(*arguments: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(["bench", *arguments, "--json"])
        out, err = capsys.readouterr()
        assert not exit_.value.code, err
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        from rich.console import Console

        console = Console(width=80, record=True)
        bench.render(result, console)
        assert "…" not in console.export_text()
        return result

    return run


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that cost no time: 1 byte/s and 1 FLOP/s."""

    def measure(self: limits.Limits) -> None:
        self._read.append(1.0)
        self._copy.append(1.0)
        self._peak.append(1.0)

    monkeypatch.setattr(limits.Limits, "_measure", measure)


@pytest.fixture(scope="module", params=[CONFIG, QWEN2], ids=["llama", "qwen2"])
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    source = write_huggingface(folder / "source", request.param, tensors(request.param))
    with open_source(source) as opened:
        convert(opened, folder / "nf4", "nf4")
    return folder / "nf4"


def is_spread(values: dict[str, float]) -> bool:
    return 0 < values["min"] <= values["median"] <= values["max"]


def test_linear_gives_each_figure_with_its_limit(run: Run) -> None:
    result = run("linear", "--k", "256", "--n", "256", "--gigabytes", "0.01", "--repeats", "2", "--tokens", "1,3,40")
    assert (result["bench"], result["format"], result["k"], result["n"]) == ("linear", "nf4", 256, 256)
    assert result["rotating_bytes"] >= 10_000_000
    assert result["limits"]["peak"].startswith(_core.peak_kinds()[0])
    assert is_spread(result["limits"]["read_gb_s"])
    assert is_spread(result["limits"]["peak_gflop_s"])
    assert [row["tokens"] for row in result["rows"]] == [1, 3, 40]
    for row in result["rows"]:
        assert "_nf4_" in row["kernel"]
        for figure in ("ms", "gb_s", "of_read", "gflop_s", "of_peak", "time_over_1_token"):
            assert is_spread(row[figure]), figure
        n_bytes = result["rotating_bytes"] / result["copies"]
        assert row["gb_s"]["max"] * row["ms"]["min"] == pytest.approx(n_bytes / 1e6)
        assert row["gflop_s"]["max"] * row["ms"]["min"] == pytest.approx(2 * row["tokens"] * 256 * 256 / 1e6)
    assert any("not one to memory" in note for note in result["notes"])


def test_linear_takes_every_copy_at_any_number_of_tokens(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[int, set[int]] = {1: set(), 512: set()}
    program = matrix.Copies.program

    def record(copies: matrix.Copies, m: int, first: int, count: int) -> Any:
        taken[m] |= {i % len(copies.weights) for i in range(first, first + count)}
        return program(copies, m, first, count)

    monkeypatch.setattr(matrix.Copies, "program", record)
    result = run("linear", "--k", "256", "--n", "256", "--gigabytes", "0.003", "--repeats", "1", "--tokens", "1,512")
    everything = set(range(result["copies"]))
    assert taken == {1: everything, 512: everything}
    amount = f"{result['rotating_bytes'] / 1e6:.0f} MB are read again"
    assert any(note.startswith(amount) for note in result["notes"])


@pytest.mark.usefixtures("instant")
def test_every_kernel_of_this_machine_passes_the_check_before_its_figures() -> None:
    isas = read_machine().isas
    for row in _core.linear_kernels():
        if row["isa"] in isas:
            options = {"kernel": row["name"], "isa": row["isa"], "gigabytes": 1e-9, "repeats": 1}
            result = bench.linear(k=200, n=70, tokens=[1, 2, 20, 33], ranks=2, **options)
            assert {figures["kernel"] for figures in result["rows"]} == {row["name"]}
            assert (result["format"], result["amx"]) == (row["format"], row["isa"] == "amx")


@pytest.mark.usefixtures("instant")
@pytest.mark.parametrize("wrong", [np.nan, 1.5, 0.0])
def test_a_wrong_product_has_no_figures(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    check = matrix._Truth.check
    monkeypatch.setattr(matrix._Truth, "check", lambda self, y, kernel: check(self, y * np.float32(wrong), kernel))
    with pytest.raises(RuntimeFailure, match=r"linear_nf4.* gave .* no figures of a wrong result"):
        bench.linear(k=128, n=64, gigabytes=1e-9, tokens=1, repeats=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "1,many"}, "such as 1,4,16"),
        ({"tokens": "0"}, "tokens must be at least 1"),
        ({"k": 0}, "k must be at least 1"),
        ({"gigabytes": 0.0}, "more than 0"),
        ({"gigabytes": 1e9}, "are free"),
        ({"format": "q4"}, "no format 'q4'"),
        ({"kernel": "linear_fast"}, "no kernel 'linear_fast'"),
        ({"kernel": "linear_nf4_f32_scalar", "format": "int4"}, "reads nf4, not int4"),
        ({"isa": "sse9", "tokens": 1}, "sse9"),
        ({"kernel": "linear_nf4_f32_avx2", "isa": "scalar", "gigabytes": 1e-9, "k": 64, "n": 16}, "needs avx2"),
    ],
)
def test_linear_refuses_what_it_cannot_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, ResourceError), match=message):
        bench.linear(**options)


def test_decode_counts_the_bytes_of_every_position(run: Run, tiny_model: Path) -> None:
    result = run("decode", str(tiny_model), "--tokens", "5", "--context", "70", "--repeats", "2", "--isa", "avx2")
    assert (result["bench"], result["context"], result["tokens"]) == ("decode", 70, 5)
    assert result["kernels"] == {"1": {"nf4": "linear_nf4_i16_avx2", "attention": "attend_bf16_avx2"}}
    assert result["amx"] is False
    for figure in ("ms_per_step", "tokens_per_s", "gb_s", "of_read"):
        assert is_spread(result[figure]), figure
    kv_bytes = 2 * CONFIG["num_hidden_layers"] * CONFIG["num_key_value_heads"] * 16 * 2
    start = run("decode", str(tiny_model), "--tokens", "1", "--repeats", "1")
    assert result["bytes_per_step"] - start["bytes_per_step"] == kv_bytes * 72
    many = run("decode", str(tiny_model), "--tokens", "5", "--context", "70", "--repeats", "2", "--batch", "3")
    assert many["bytes_per_step"] - start["bytes_per_step"] == 3 * kv_bytes * 72
    assert many["tokens_per_s"]["max"] * many["ms_per_step"]["min"] == pytest.approx(3e3)
    assert list(many["kernels"]) == ["3"]


def test_prefill_counts_the_products(run: Run, tiny_model: Path) -> None:
    result = run("prefill", str(tiny_model), "--tokens", "40", "--context", "7", "--repeats", "2", "--threads", "1")
    assert (result["bench"], result["context"], result["tokens"], result["threads"]) == ("prefill", 7, 40, 1)
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
    assert result["matrix_gflop"] == pytest.approx(2e-9 * (40 * 2 * layer + 300 * 64))
    assert result["attention_gflop"] == pytest.approx(4e-9 * 2 * 4 * 16 * sum(range(8, 48)))
    assert {rows: sorted(kernels) for rows, kernels in result["kernels"].items()} == {
        "40": ["attention", "nf4"],
        "1": ["nf4"],  # the head
    }
    for figure in ("seconds", "tokens_per_s", "gflop_s", "of_peak"):
        assert is_spread(result[figure]), figure


@pytest.mark.usefixtures("instant")
def test_logits_that_change_have_no_figures(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, rng = model.Engine.step, np.random.default_rng(1)
    monkeypatch.setattr(model.Engine, "step", lambda *fed: step(*fed) + rng.random(dtype=np.float32))
    with pytest.raises(RuntimeFailure, match="different logits"):
        bench.decode(model=str(tiny_model), tokens=2, repeats=2)


@pytest.mark.usefixtures("instant")
def test_a_rank_without_outputs_leaves_the_others_theirs() -> None:
    for _ in range(20):  # a step checks what came out
        bench.linear(k=64, n=16, tokens=1, ranks=2, gigabytes=1e-9, repeats=1)


needs_two_cpus = pytest.mark.skipif(len(read_machine().nodes[0].usable_cpus) < 2, reason="needs a CPU for each rank")


@needs_two_cpus
@pytest.mark.parametrize("n_ranks", [2, 3])
def test_reduce_gives_the_latency_beside_the_hand_over(run: Run, monkeypatch: pytest.MonkeyPatch, n_ranks: int) -> None:
    monkeypatch.setattr(reduction, "STEPS", 2)
    monkeypatch.setattr(reduction, "HANDOVERS", 20)
    if n_ranks > len(read_machine().nodes[0].usable_cpus):
        with pytest.raises(ResourceError, match=f"{n_ranks} ranks need as many CPUs to be measured, and 2 are usable"):
            bench.reduce(ranks=n_ranks)
        return
    result = run("reduce", "--ranks", str(n_ranks), "--kb", "3", "--repeats", "2")
    assert (result["bench"], result["ranks"], result["threads"], result["kb"]) == ("reduce", n_ranks, n_ranks, 3)
    assert result["reductions"] == 2 * 2 * reduction.REDUCTIONS
    for figure in (result["us"], result["p99_us"], result["of_limit"], *result["limits"].values()):
        assert is_spread(figure)
    assert result["us"]["median"] <= result["p99_us"]["median"]
    assert result["limits"]["round_trip_us"]["min"] < 2 * result["limits"]["handover_us"]["max"]


@needs_two_cpus
def test_a_wrong_sum_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(reduction._Reductions):
        def __init__(self, plan: Any, width: int) -> None:
            super().__init__(plan, width)
            self._truth = self._truth + 1

    monkeypatch.setattr(reduction, "HANDOVERS", 20)
    monkeypatch.setattr(reduction, "_Reductions", Wrong)
    with pytest.raises(RuntimeFailure, match="sums are wrong"):
        bench.reduce(kb=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 1}, "at least 2 ranks"),
        ({"ranks": 0}, "ranks must be at least 1"),
        ({"kb": 0}, "kb must be at least 1"),
        ({"kb": 1 << 40}, "kb must be at most 4096"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"ranks": 60}, "60 ranks need as many CPUs"),
        ({"ranks": 2, "threads": 1}, "1 threads do not fit 2 ranks"),
    ],
)
def test_reduce_refuses_what_it_cannot_measure(options: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, ResourceError), match=message):
        bench.reduce(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": -1}, "context must be at least 0"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"tokens": 200}, "a context of 200 is not possible"),
        ({"kv": "f16"}, "kv must be one of"),
        ({"isa": "sse9", "tokens": 1}, "sse9"),
    ],
)
def test_a_model_is_not_measured_at_what_it_cannot_do(options: dict[str, Any], message: str, tiny_model: Path) -> None:
    for measure in (bench.decode, bench.prefill):
        with pytest.raises(UserError, match=message):
            measure(model=str(tiny_model), **options)


def test_speculate_compares_the_same_texts(run: Run, smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "PLAIN", {"story": speculation.PLAIN["story"]})
    result = run("speculate", "--tokens", "24", "--repeats", "2")
    assert [row["text"] for row in result["rows"]] == ["code editing", "extraction", "story"]
    assert [row["prescribed"] for row in result["rows"]] == [True, True, False]
    for row in result["rows"]:
        assert is_spread(row["ratio"])
        assert is_spread(row["tokens_per_s"])
        assert 0 <= row["accepted"] <= row["drafted"]
    assert result["rows"][0]["accepted"] > 0


def test_drafts_that_change_a_text_have_no_figures(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = speculation._run

    def altered(loop: StepLoop, request: Request) -> Generation:
        g = run(loop, request)
        g.ids[-1] += loop._speculation is not None
        return g

    monkeypatch.setattr(speculation, "_run", altered)
    with pytest.raises(RuntimeFailure, match="drafts changed the text of 'code editing'"):
        speculation.speculate(tokens=4, repeats=1)


def test_speculate_refuses_a_model_that_cannot_be_asked(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        speculation.speculate(model=str(tiny_model), tokens=4, repeats=1)


def test_load_counts_time_and_memory(run: Run, tiny_model: Path) -> None:
    result = run("load", str(tiny_model), "--repeats", "2", "--threads", "1")
    assert (result["bench"], result["threads"], result["repeats"]) == ("load", 1, 2)
    assert result["weight_bytes"] > 40_000
    for figure in ("seconds", "gb_s", "of_copy"):
        assert is_spread(result[figure]), figure
    assert is_spread(result["limits"]["copy_gb_s"])
    assert result["peak_over_weights"]["min"] >= 0  # so small a model may fit what the process had already


def test_a_load_takes_little_more_memory_than_the_weights(tmp_path: Path) -> None:
    """In a process of its own, whose heap is small."""
    synthesize(
        replace(SHAPES["llama-1b"], n_layers=4, vocab_size=8192, bos_id=None, eos_ids=()), tmp_path / "model", "nf4"
    )
    code = f"""
from fourfold.bench import limits, loading
limits.READ_BYTES = 0
print(loading.load(model={str(tmp_path / "model")!r}, repeats=2)["peak_over_weights"]["median"])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    assert 0.95 < float(done.stdout) < 1.15  # of 136 MB: Python itself grows by some MB


@pytest.mark.usefixtures("instant")
def test_a_load_that_differs_has_no_figures(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, rng = model.Engine.logits, np.random.default_rng(1)
    monkeypatch.setattr(model.Engine, "logits", lambda *fed: logits(*fed) + rng.random(dtype=np.float32))
    with pytest.raises(RuntimeFailure, match="different logits"):
        bench.load(model=str(tiny_model), repeats=2)


def test_quantize_gives_its_rate_beside_the_packers_and_the_disks(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(conversion.MADE, "hidden_size", 256)
    monkeypatch.setitem(conversion.MADE, "intermediate_size", 512)
    result = run("quantize", "--gigabytes", "0.005", "--repeats", "2", "--format", "int4", "--directory", str(tmp_path))
    assert (result["bench"], result["format"]) == ("quantize", "int4")
    layer = 4 * 256 * 256 + 3 * 256 * 512 + 2 * 256
    n_layers, rest = divmod(result["source_bytes"] // 2 - 2048 * 256 - 256, layer)
    assert (rest, result["source_bytes"] >= 5e6 > result["source_bytes"] - 2 * layer) == (0, True)
    assert n_layers > 1
    assert result["stored_bytes"] == pytest.approx(result["source_bytes"] * 4.13 / 16, rel=0.02)
    for figure in ("seconds", "gb_s", "of_pack", "of_write"):
        assert is_spread(result[figure]), figure
    assert result["gb_s"]["max"] * result["seconds"]["min"] == pytest.approx(result["source_bytes"] / 1e9)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gigabytes": 0.0}, "more than 0"), ({"format": "q4"}, "no format 'q4'"), ({"threads": 0}, "threads must be")],
)
def test_quantize_refuses_what_it_cannot_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.quantize(**options)
