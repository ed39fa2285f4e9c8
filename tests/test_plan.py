"""Plans: what is counted is what the engine takes; described machines are read or refused; answers hold together."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fourfold import bench, cli, plan
from fourfold.bench import prediction
from fourfold.checkpoint import open_source
from fourfold.config import FORMATS
from fourfold.conversion import convert
from fourfold.engine import Engine
from fourfold.errors import UnsupportedError, UserError
from fourfold.machine import RankPlan
from fourfold.models import weight_specs
from fourfold.models.shapes import SHAPES
from fourfold.plan import calibrate
from fourfold.plan.answer import find_subject
from fourfold.plan.machines import NodeRates, format_machine, known_machines, load_machine, parse_machine
from fourfold.plan.times import Clock
from fourfold.plan.work import Work, count_work
from tiny import CONFIG, QWEN2, YUAN, tensors, write_huggingface

SERVER = load_machine("nf8260g7")
TOML = format_machine(SERVER)
LLAMA = CONFIG | {"hidden_size": 256}  # heads that two ranks can share
QWEN2_WIDE = QWEN2 | {"hidden_size": 256}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration over so little that its figures mean nothing."""
    for name, value in {
        "CHAIN_BYTES": 1,
        "READ_BYTES": 1,
        "TIMES_CACHE": 0,
        "LARGE": ((4096, 1088), (8192, 576)),
        "SMALL": ((192, 64), (64, 128)),
        "VECTOR_OPS": 4,
        "CACHED_PART": 0.0,
        "STEPS": 1,
        "PASSES": 1,
    }.items():
        monkeypatch.setattr(calibrate, name, value)
    monkeypatch.setattr(calibrate.Calibration, "_read", lambda *_: 10.0)


def directory(folder: Path, config: dict[str, Any], fmt: str = "nf4") -> Path:
    with open_source(write_huggingface(folder / "source", config, tensors(config))) as opened:
        convert(opened, folder / fmt, fmt)
    return folder / fmt


def work_of(shape: str, ranks: int, threads: int = 32, **changes: Any) -> Work:
    config = replace(SHAPES[shape], **changes)
    formats = {spec.name: "nf4" for spec in weight_specs(config) if spec.is_matrix}
    return count_work(config, formats, kv="bf16", context=config.max_context, threads=[threads] * ranks)


def decode(machine: Any, ranks: int, position: int, shape: str = "yuan2-102b") -> Any:
    return Clock(machine, machine.place(ranks), work_of(shape, ranks)).decode(position)


# Bytes.


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("config", [LLAMA, QWEN2_WIDE, YUAN], ids=["llama", "qwen2", "yuan"])
def test_bytes_are_those_that_the_engine_counts(config: dict[str, Any], ranks: int, tmp_path: Path) -> None:
    path = directory(tmp_path, config)
    answer = plan.plan(str(path), machine="nf8260g7", ranks=ranks)
    engine = Engine(path, ranks=ranks, threads=ranks)
    try:
        assert answer["decode"]["read_weights_gb"] * 1e9 == pytest.approx(engine.bytes_per_token())
        at_end = engine.bytes_per_token(engine.context - 1) - engine.bytes_per_token()
        assert answer["decode"]["read_kv_gb"] * 1e9 == pytest.approx(at_end)
        assert answer["context"] == engine.context
        kv = sum(node["kv"] for node in answer["memory"]["nodes"])
        assert kv == engine._footprint.kv(engine.context)
        assert sum(node["weights"] for node in answer["memory"]["nodes"]) == sum(engine._footprint.room)
    finally:
        engine.close()


def test_the_102b_has_its_published_size_and_needs_53_gb_a_token() -> None:
    answer = plan.plan("yuan2-102b", machine="nf8260g7")
    assert answer["parameters"] == 102_577_954_816
    assert answer["ranks"] == 4
    assert answer["decode"]["read_weights_gb"] == pytest.approx(102.578 * 4.125 / 8, rel=0.002)
    assert answer["memory"]["fits"]
    assert answer["memory"]["longest_context"] == 4096
    floor = 1e3 * answer["decode"]["read_weights_gb"] / 995
    assert floor < answer["decode"]["at_start"]["weights"] < 2 * floor
    assert answer["decode"]["bound_by"] == "weights"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_a_plan(shape: str) -> None:
    answer = plan.plan(shape, machine="nf8260g7")
    for row in (answer["decode"]["at_start"], answer["decode"]["at_context"]):
        parts = sum(row[name] for name in ("weights", "kv", "reduction", "overhead"))
        assert row["total"] == pytest.approx(parts)
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["total"])
    json.dumps(answer, allow_nan=False)
    console = Console(width=100, record=True, file=io.StringIO())
    plan.render(answer, console)
    assert "bound by" in console.export_text()


def test_formats_and_caches_cost_what_they_should() -> None:
    gigabytes = {f: plan.plan("llama-7b", machine="nf8260g7", format=f)["decode"]["read_weights_gb"] for f in FORMATS}
    assert gigabytes["bf16"] == pytest.approx(2 * gigabytes["f32"] / 4, rel=0.01)
    assert (
        gigabytes["nf4"]
        == gigabytes["int4"]
        == gigabytes["fp4"]
        < gigabytes["uint4"]
        < gigabytes["int8"]
        < gigabytes["bf16"]
    )
    kv = {k: plan.plan("llama-7b", machine="nf8260g7", kv=k)["decode"]["read_kv_gb"] for k in ("bf16", "int8", "f32")}
    assert kv["f32"] == pytest.approx(2 * kv["bf16"])
    assert kv["bf16"] / 2 < kv["int8"] < kv["bf16"]


# Times: the sentences of docs/planning.md.


def test_a_machine_twice_as_fast_reads_in_half_the_time() -> None:
    nodes = tuple(replace(node, read_gb_s=2 * node.read_gb_s) for node in SERVER.nodes)
    fast = replace(SERVER, nodes=nodes, core_read_gb_s=2 * SERVER.core_read_gb_s)
    slow_time, fast_time = decode(SERVER, 4, 1000), decode(fast, 4, 1000)
    assert fast_time.weights == pytest.approx(slow_time.weights / 2)
    assert fast_time.kv == pytest.approx(slow_time.kv / 2)
    assert (fast_time.overhead, fast_time.reduction) == (slow_time.overhead, slow_time.reduction)


def test_more_nodes_share_the_reading_and_meet_more_often() -> None:
    times = [decode(SERVER, ranks, 0) for ranks in (1, 2, 4)]
    assert times[0].weights > 1.9 * times[1].weights > 3.6 * times[2].weights
    assert times[0].reduction == 0.0 < times[1].reduction


def test_two_ranks_on_a_node_share_its_bandwidth() -> None:
    one = replace(SERVER, nodes=SERVER.nodes[:1], links=None)
    assert decode(one, 2, 0).weights == pytest.approx(decode(one, 1, 0).weights, rel=0.02)


def test_the_slowest_rank_decides() -> None:
    slow = replace(SERVER.nodes[3], read_gb_s=SERVER.nodes[3].read_gb_s / 3)
    uneven = replace(SERVER, nodes=(*SERVER.nodes[:3], slow))
    assert decode(uneven, 4, 0).weights == pytest.approx(3 * decode(SERVER, 4, 0).weights)
    assert decode(uneven, 3, 0) == decode(SERVER, 3, 0)  # the slow node is not used


def test_weights_in_the_cache_are_read_at_its_speed() -> None:
    large = tuple(replace(node, cache_mb=1e6) for node in SERVER.nodes)
    cached = replace(SERVER, nodes=large, attained=replace(SERVER.attained, cached_core_gb_s=1000.0))
    assert decode(cached, 4, 0).weights < decode(SERVER, 4, 0).weights / 10
    half = tuple(replace(node, cache_mb=13.3e3) for node in SERVER.nodes)  # a little more than a rank's 13.2 GB
    between = decode(replace(cached, nodes=half), 4, 0).weights
    assert decode(cached, 4, 0).weights < between < decode(SERVER, 4, 0).weights


def test_virtual_ranks_that_take_turns_take_longer() -> None:
    node = NodeRates(cores=2, memory_gb=100.0, read_gb_s=50.0, cache_mb=30.0, peak_tflops=0.5)
    machine = replace(SERVER, nodes=(node,), links=None)
    work = work_of("llama-7b", 4, threads=1)
    apart = [RankPlan(0, [cpu]) for cpu in range(4)]
    turns = [RankPlan(0, [cpu % 2]) for cpu in range(4)]
    assert Clock(machine, turns, work).decode(0).total == pytest.approx(2 * Clock(machine, apart, work).decode(0).total)
    answer = plan.plan("llama-7b", machine="nf8260g7", ranks=8)
    assert not answer["notes"]


def test_a_prompt_of_one_step_is_a_part_of_a_longer_one() -> None:
    clock = Clock(SERVER, SERVER.place(4), work_of("yuan2-102b", 4))
    short, long = clock.prefill(512), clock.prefill(1024)
    assert long.matrices == pytest.approx(2 * short.matrices)
    assert long.attention > 2.5 * short.attention
    flop = 2 * 512 * (102.578e9 - 1.106e9)
    assert short.matrices == pytest.approx(flop / (215e12 * SERVER.attained.prefill), rel=0.05)


# What does not fit.


def test_what_does_not_fit_says_what_would(run: Run, tmp_path: Path) -> None:
    small = replace(SERVER, nodes=tuple(replace(node, memory_gb=16.0) for node in SERVER.nodes))
    (file := tmp_path / "small.toml").write_text(format_machine(small))
    answer = plan.plan("yuan2-102b", machine=str(file))
    assert not answer["memory"]["fits"]
    assert 0 < answer["memory"]["longest_context"] < 4096
    again = plan.plan("yuan2-102b", machine=str(file), context=answer["memory"]["longest_context"])
    assert again["memory"]["fits"]
    assert not again["advice"]
    beyond = plan.plan("yuan2-102b", machine=str(file), context=answer["memory"]["longest_context"] + 64)
    assert not beyond["memory"]["fits"]
    bf16 = plan.plan("yuan2-102b", machine="nf8260g7", format="f32", ranks=1)
    assert "It would in nf4." in bf16["advice"]
    assert "It would over 2 ranks." in bf16["advice"]
    status, out, _ = run("plan", "yuan2-102b", "--machine", str(file))
    assert status == 0
    assert "It does not fit" in re.sub(r"\s+", " ", out)


# Machines.


def test_a_machine_survives_its_file(tmp_path: Path) -> None:
    assert parse_machine(TOML, "again") == SERVER
    assert known_machines() == ["nf8260g7"]
    assert sum(node.read_gb_s for node in SERVER.nodes) == 995
    assert sum(node.peak_tflops for node in SERVER.nodes) == 215
    named = replace(SERVER, name='a "quoted" \\ name')
    assert parse_machine(format_machine(named), "again") == named


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cores = 32", "cores = 0", r"nodes 1, sets cores to 0; it must be an integer"),
        ("cores = 32", "cores = 1000000", r"at most 64 and 4096 make a machine"),
        ("cores = 32", "cores = 'many'", r"sets cores to 'many'"),
        ("memory_gb = 256.0", "memory_gb = -1.0", r"sets memory_gb to -1.0; it must be a positive number"),
        ("read_gb_s = 248.75", "read_gb_s = nan", r"sets read_gb_s to nan"),
        ("read_gb_s = 248.75", "read_gb_s = inf", r"sets read_gb_s to inf"),
        ("cache_mb = 60.0", "cache = 60.0", r"does not say cache_mb"),
        ("cache_mb = 60.0", "cache_mb = 60.0\ncolour = 1", r"sets colour: fourfold does not know this key"),
        ("[links]", "[[links]]", r"sets links to .*; it must be an object"),
        ("latency_us = 0.2", "", r"links, does not say latency_us"),
        ("weights = 0.75", "weights = 75", r"sets weights to 75; a share must be at most 2"),
        ('format = "nf4"', 'format = "nf5"', r"sets format to 'nf5'; it must be one of nf4"),
        ("[attained]", "[attain]", r"attained, does not say format"),
        ("core_read_gb_s = 12.0", "core_read_gb_s =", r"is not valid TOML"),
    ],
)
def test_a_bad_description_is_refused_by_its_key(old: str, new: str, message: str, run: Run, tmp_path: Path) -> None:
    assert old in TOML
    (file := tmp_path / "bad.toml").write_text(TOML.replace(old, new))
    with pytest.raises(UserError, match=message):
        load_machine(str(file))
    status, _, err = run("plan", "yuan2-2b", "--machine", str(file))
    assert (status, len(err.splitlines())) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("yuan2-2b", "--machine", "nf9000"), "the known ones are nf8260g7"),
        (("yuan3-1t",), "the shapes are yuan2-102b"),
        (("yuan2-2b", "--machine", "nf8260g7", "--ranks", "0"), "--ranks must be from 1 to 64, not 0"),
        (("yuan2-2b", "--machine", "nf8260g7", "--ranks", "65"), "--ranks must be from 1 to 64"),
        (("yuan2-2b", "--machine", "nf8260g7", "--ranks", "40"), "its 32 attention heads"),
        (("yuan2-2b", "--machine", "nf8260g7", "--context", "8193"), "the model was trained for 1 to 8192 positions"),
        (("yuan2-2b", "--machine", "nf8260g7", "--context", "0"), "a context of 0 is not possible"),
        (("yuan2-2b", "--machine", "nf8260g7", "--prompt-tokens", "-3"), "--prompt-tokens must be from 1"),
        (("yuan2-2b", "--machine", "nf8260g7", "--format", "nf3"), "there is no format 'nf3'"),
        (("yuan2-2b", "--machine", "nf8260g7", "--kv", "int2"), "kv must be one of"),
        (("yuan2-2b", "--machine", "nf8260g7", "--save", "m.toml"), "--save keeps this machine as measured"),
        (("yuan2-2b", "--machine", "nf8260g7", "--picture", "p.jpg"), "must end in .svg or .png"),
        (("yuan2-2b", "--machine", "nf8260g7", "--picture", "/nowhere/p.svg"), "there is no directory /nowhere"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(arguments: tuple[str, ...], message: str, run: Run) -> None:
    status, out, err = run("plan", *arguments)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert message in err


def test_uneven_nodes_and_uneven_slices_add_up() -> None:
    nodes = (SERVER.nodes[0], replace(SERVER.nodes[0], cores=20), replace(SERVER.nodes[0], cores=7))
    uneven = replace(SERVER, nodes=nodes)
    placed = uneven.place(3)
    assert [len(rank.cpus) for rank in placed] == [32, 20, 7]
    config = SHAPES["smollm2-135m"]  # 9 heads over 2 ranks: 5 and 4, a KV head held twice
    formats = {spec.name: "nf4" for spec in weight_specs(config) if spec.is_matrix}
    work = count_work(config, formats, kv="bf16", context=64, threads=[3, 2])
    assert work.heads == (5, 4)
    assert sum(work.kv_layer_bytes) == 4 * 64 * 2 * 2  # four KV heads of 64, key and value, two bytes


# Subjects.


def test_a_model_is_found_by_name_config_and_directory(tmp_path: Path) -> None:
    path = directory(tmp_path, CONFIG, "int8")
    source = tmp_path / "source"
    assert find_subject(str(path), None).format == "int8"
    with pytest.raises(UserError, match="is int8, not nf4"):
        find_subject(str(path), "nf4")
    from_config = find_subject(str(source / "config.json"), None)
    assert (from_config.name, from_config.format) == ("source", "nf4")
    (source / "model.safetensors").unlink()
    assert find_subject(str(source), "bf16").in_format("nf4") == replace(from_config)
    (source / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        find_subject(str(source), None)


def test_a_bundled_model_has_a_plan(smollm2: Path) -> None:
    for name in ("smollm2", str(smollm2)):
        found = find_subject(name, None).config
        rest = {"norm_eps": found.norm_eps, "bos_id": found.bos_id, "eos_ids": found.eos_ids}
        assert found == replace(SHAPES["smollm2-135m"], **rest)


# This machine.


@pytest.mark.usefixtures("quick")
def test_this_machine_is_measured_saved_and_planned_with(run: Run, tmp_path: Path) -> None:
    path, saved = directory(tmp_path, CONFIG), tmp_path / "here.toml"
    status, out, err = run("plan", str(path), "--save", str(saved), "--json")
    assert (status, err) == (0, "")
    answer = json.loads(out.splitlines()[-1])
    assert answer["machine"]["about"].startswith("measured: ")
    assert all(rate > 0 for rate in answer["machine"]["attained"].values() if not isinstance(rate, str))
    again = plan.plan(str(path), machine=str(saved))
    assert again["machine"]["attained"] == answer["machine"]["attained"]
    assert again["decode"]["at_start"]["weights"] == pytest.approx(answer["decode"]["at_start"]["weights"])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("config", [LLAMA, YUAN], ids=["llama", "yuan"])
def test_bench_plan_puts_planned_beside_measured(config: dict[str, Any], run: Run, tmp_path: Path) -> None:
    path = directory(tmp_path, config)
    status, out, err = run("bench", "plan", str(path), "--ranks", "1,2", "--tokens", "2", "--repeats", "2", "--json")
    assert (status, err) == (0, "")
    result = json.loads(out.splitlines()[-1])
    rows = result["rows"]
    assert [row["ranks"] for row in rows] == [1, 2]
    for row in rows:
        planned, measured = row["planned_ms"], row["measured_ms"]
        assert planned["min"] / measured["max"] <= row["ratio"]["median"] <= planned["max"] / measured["min"]
        assert sum(ms for name, ms in row["parts_ms"].items() if name != "total") > 0
    console = Console(width=100, record=True, file=io.StringIO())
    bench.render(result, console)
    assert "planned / measured" in console.export_text()


def test_disturbed_repetitions_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Machines:
        """The memory is fast from the third measurement to the fifth."""

        count = 0

        def measure(self, **_: object) -> Any:
            self.count += 1
            rate = 50.0 if 3 <= self.count <= 5 else 30.0
            return replace(SERVER, nodes=(replace(SERVER.nodes[0], read_gb_s=rate),))

    monkeypatch.setattr(prediction, "_cpu_seconds", lambda: 0.0)
    calibrations = object.__new__(prediction.Calibrations)
    calibrations._calibration = Machines()
    repetitions = iter(range(100))
    assert calibrations.interleave(4, lambda: next(repetitions)) == [0, 2, 3, 5]
    assert calibrations.read_gb_s() == [30.0, 50.0, 50.0, 30.0]


def test_a_fit_is_exact_where_it_can_be_and_never_negative() -> None:
    import numpy as np

    rows = np.array([[1.0, 2.0, 0.0], [1.0, 5.0, 1.0], [1.0, 1.0, 4.0], [1.0, 9.0, 2.0]])
    truth = [3.0, 0.5, 2.0]
    assert calibrate.non_negative_fit(rows, rows @ truth) == pytest.approx(truth)
    fitted = calibrate.non_negative_fit(rows, rows @ [3.0, -0.1, 2.0])
    assert fitted[1] == 0.0
    assert min(fitted) >= 0


# Pictures.


def test_a_picture_says_what_it_shows(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for suffix in (".svg", ".png"):
        status, _, err = run(
            "plan", "yuan2-102b", "--machine", "nf8260g7", "--picture", str(tmp_path / f"p{suffix}"), "--json"
        )
        assert (status, err) == (0, "")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "p.svg").read_text()
    for text in ("yuan2-102b, nf4", "nf8260g7", "context (tokens", "time of one token (ms)", "4 ranks", "KV cache"):
        assert text in svg
    assert "prefers-color-scheme: dark" in svg
    run("plan", "yuan2-102b", "--machine", "nf8260g7", "--picture", str(tmp_path / "q.svg"), "--json")
    assert (tmp_path / "q.svg").read_text() == svg


def test_shapes_can_all_be_cut_or_say_why_not() -> None:
    for shape, config in SHAPES.items():
        assert work_of(shape, min(4, config.n_heads)).n_layers == config.n_layers
    with pytest.raises(UnsupportedError, match="attention heads"):
        work_of("smollm2-135m", 10)


def test_a_layer_with_a_window_reads_no_more_than_it() -> None:
    """Of Gemma 3's 26 layers four see everything, 22 see 511 others."""
    windowed, whole = work_of("gemma3-1b", 1), work_of("gemma3-1b", 1, sliding_window=None)
    assert windowed.seen(100) == whole.seen(100) == 26 * 100
    assert (windowed.seen(8000), whole.seen(8000)) == (4 * 8000 + 22 * 511, 26 * 8000)
    local, some, all_global = (
        [
            Clock(SERVER, SERVER.place(1), work_of("gemma3-1b", 1, **change)).decode(position).kv
            for position in (8000, 16000)
        ]
        for change in ({"global_every": 0}, {}, {"sliding_window": None})
    )
    assert local[0] == local[1] < some[0] < some[1] < all_global[1]
