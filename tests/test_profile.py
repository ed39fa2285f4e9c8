"""A profile accounts for every nanosecond, counts what was read, and writes what a trace viewer can show."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fourfold._core as _core
import tiny
from chain import make_team
from fourfold import cli, cli_generate, cli_profile
from fourfold.bench import limits
from fourfold.chat_template import ChatTemplate
from fourfold.checkpoint import open_source
from fourfold.conversion import convert
from fourfold.engine import Engine, Feed
from fourfold.errors import ResourceError, RuntimeFailure, UserError
from fourfold.llm import LLM
from fourfold.profile import MARK, PHASES, Profile, Work
from fourfold.trace_file import write_trace
from scripted import TEMPLATE, byte_tokenizer
from test_team import chain

Json = dict[str, Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    with open_source(tiny.write_huggingface(folder / "source", tiny.YUAN, tiny.tensors(tiny.YUAN))) as opened:
        convert(opened, folder / "nf4", "nf4")
    return folder / "nf4"


@pytest.fixture(params=[1, 2])
def engine(directory: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine(directory, ranks=request.param)
    yield engine
    engine.close()


def feed(engine: Engine, *sizes: int) -> list[Any]:
    """A text in pieces of these sizes; the logits after each."""
    sequence = engine.new_sequence()
    logits = [engine.extend(sequence, list(range(n))) for n in sizes]
    engine.free(sequence)
    return logits


# ---- what a step has to do


@pytest.mark.parametrize("window", [None, 1, 5, 8, 30])
@pytest.mark.parametrize(("tokens", "start"), [(1, 0), (1, 20), (6, 0), (6, 3), (6, 7), (6, 20)])
def test_what_rows_see_through_a_window(tokens: int, start: int, window: int | None) -> None:
    seen = [range(max(0, p + 1 - window) if window else 0, p + 1) for p in range(start, start + tokens)]
    work = Work.of_step(tokens, 1, start, window)
    assert work.local_seen == sum(map(len, seen))
    assert work.local_positions == len({position for row in seen for position in row})
    assert (work.positions, work.seen) == (start + tokens, sum(p + 1 for p in range(start, start + tokens)))


# ---- marks


@pytest.mark.parametrize(("n_ranks", "n_threads"), [(1, 1), (1, 2), (2, 2), (3, 1)])
def test_every_thread_marks_every_op_in_turn(n_ranks: int, n_threads: int) -> None:
    work = chain(make_team(n_ranks, n_threads))
    work.step()
    assert work.program.marks(0, 0) == b""
    work.program.record(True)
    phases = {"linear": ["pack", "wait", "work", "wait"]}
    names = work.program.op_names
    expected = [(i, phase) for i, name in enumerate(names) for phase in phases.get(name, ["work", "wait"])]
    for _ in range(2):  # the second forgets the first
        work.step()
        for rank in range(n_ranks):
            for thread in range(n_threads):
                marks = np.frombuffer(work.program.marks(rank, thread), MARK)
                assert (np.diff(marks["ns"]) >= 0).all()
                happened = [(op, PHASES[phase]) for op, phase in marks[["op", "phase"]].tolist()]
                assert happened == [*expected, (len(names) - 1, "end")]
    with pytest.raises(IndexError):
        work.program.marks(n_ranks, 0)
    work.program.record(False)
    work.step()
    assert work.program.marks(0, 0) == b""


# ---- sums


def test_the_sums_add_up_to_the_wall(engine: Engine) -> None:
    with engine.profile() as found:
        feed(engine, 30, 1, 1, 1)
    feed(engine, 2)  # no longer part of it
    summary = found.summary()
    steps = summary["steps"]
    assert {kind: (step["steps"], step["tokens"]) for kind, step in steps.items()} == {
        "prefill": (1, 30),
        "decode": (3, 3),
    }
    for step in steps.values():
        assert sum(row["ms"] for row in step["rows"]) + step["entering_ms"] == pytest.approx(step["ms"])
        for row in step["rows"]:
            assert 0 <= row["pack_ms"] + row["wait_ms"] <= row["ms"]
    whole = sum(step["ms"] for step in steps.values()) + summary["profiling_ms"] + summary["outside_ms"]
    assert whole == pytest.approx(summary["wall_ms"])
    assert min(summary["profiling_ms"], summary["outside_ms"]) > 0
    assert len(summary["threads"]) == len(found.threads) == sum(len(rank.cpus) for rank in engine.plan)
    for thread in summary["threads"]:
        phases = [thread[f"{name}_ms"] for name in ("work", "pack", "wait", "entering", "outside")]
        assert sum(phases) == pytest.approx(summary["wall_ms"])
        assert min(phases) > 0
    json.dumps(summary)


def test_what_must_be_read_and_multiplied_is_counted(engine: Engine) -> None:
    with engine.profile() as found:
        feed(engine, 70, 1)
    steps = found.summary()["steps"]
    config = engine.config
    row = engine._embed_bytes // config.vocab_size
    assert steps["decode"]["bytes"] == engine.bytes_per_token(71) + row
    n_weights = sum(np.prod(w.shape) for name, w in open_weights(engine).items() if name != "embed")
    attention = 4 * config.n_layers * config.n_heads * config.head_dim
    head = config.vocab_size * config.dim
    assert steps["decode"]["gflop"] * 1e9 == pytest.approx(2 * (n_weights + head) + attention * 71)
    assert steps["prefill"]["gflop"] * 1e9 == pytest.approx(2 * (70 * n_weights + head) + attention * sum(range(71)))
    for kind, m in (("decode", 1), ("prefill", 70)):
        rows = {row["op"]: row for row in steps[kind]["rows"]}
        kernel = engine.kernels(m)["nf4"]
        linears = {"conv1", "conv2", "v", "q k", "o", "up gate", "down"}
        assert {op: row["kernels"] for op, row in rows.items() if row["kernels"]} == {
            **{op: [kernel] for op in linears},
            "attention": [engine.kernels(m)["attention"]],
            "head": [engine.kernels(1)["nf4"]],
        }
        for op in (*linears, "attention"):
            assert rows[op]["layers"] == [0, 1]
            assert rows[op]["calls"] == 2
            assert rows[op]["gb_s"] == pytest.approx(rows[op]["bytes"] / rows[op]["ms"] / 1e6)
            assert rows[op]["gflop_s"] == pytest.approx(rows[op]["gflop"] / rows[op]["ms"] * 1e3)


def open_weights(engine: Engine) -> Any:
    from fourfold.models import weight_specs

    return {spec.name: spec for spec in weight_specs(engine.config) if spec.is_matrix}


def test_amx_is_told_from_the_kernels_names(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine.profile() as found:
        feed(engine, 1)
    used = engine.kernels(1)
    for of_amx in ("nf4", "attention"):
        isas = {name: "amx" if of == of_amx else "avx512" for of, name in used.items()}
        monkeypatch.setattr(_core, "isa_of_kernel", isas.__getitem__)
        rows = found.summary()["steps"]["decode"]["rows"]
        for row in rows:
            assert row["amx"] == (used[of_amx] in row["kernels"])


def test_recording_changes_no_bit_and_ends(engine: Engine) -> None:
    before = feed(engine, 20, 1, 3)
    with engine.profile() as found:
        during = feed(engine, 20, 1, 3)
    n_steps = len(found.kept)
    after = feed(engine, 20, 1, 3)
    for logits in (during, after):
        for ours, theirs in zip(logits, before, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert n_steps == len(found.kept) == 3


def test_a_step_without_logits_is_recorded(engine: Engine) -> None:
    """As the first steps of a prompt that takes several are."""
    sequence = engine.new_sequence()
    with engine.profile() as found:
        engine.step([Feed(sequence, list(range(20)), 0)], tokens="many", outputs="few")
    engine.free(sequence)
    assert found.kept[0].kernels.keys() == {20}
    with pytest.raises(ValueError, match="no rows"):
        engine.kernels(0)


def test_one_profile_at_a_time(engine: Engine) -> None:
    with engine.profile(), pytest.raises(UserError, match="under way already"), engine.profile():
        pass
    with engine.profile() as again:
        feed(engine, 1)
    assert len(again.kept) == 1
    engine.close()
    with pytest.raises(UserError, match="closed"), engine.profile():
        pass


def test_a_step_that_fails_ends_no_profile_in_a_riddle(directory: Path) -> None:
    engine = Engine(directory, ranks=2, timeout_seconds=0.2)
    with engine.profile() as found:
        feed(engine, 5)
        engine._team.stall_next(1, 0, 1)
        with pytest.raises(RuntimeFailure, match="rank 1, thread 0 did not arrive"):
            feed(engine, 5)
    assert found.summary()["steps"]["prefill"]["steps"] == 1


# ---- the file


def read_trace(path: Path) -> Json:
    """Parsed, and checked against the Trace Event Format and against the threads of the world: one thing at a time."""
    trace: Json = json.loads(path.read_text())
    assert set(trace) == {"displayTimeUnit", "otherData", "traceEvents"}
    ends: dict[tuple[int, int], int] = {}
    for event in trace["traceEvents"]:
        assert {"name", "ph", "pid", "tid", "args"} <= set(event)
        assert event["ph"] in "MX"
        row = event["pid"], event["tid"]
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
            assert row not in ends, "a row is named before its events"
            continue
        assert isinstance(event["cat"], str)
        begin, length = round(event["ts"] * 1000), round(event["dur"] * 1000)  # whole nanoseconds
        assert begin >= ends.get(row, 0), "events of a row overlap or go back"
        assert length >= 0
        ends[row] = begin + length
    return trace


def test_a_trace_has_a_row_for_every_thread_and_every_op_on_it(engine: Engine, tmp_path: Path) -> None:
    with engine.profile() as found:
        feed(engine, 40, 1, 1)
    write_trace(found, path := tmp_path / "trace.json")
    assert list(tmp_path.iterdir()) == [path]
    trace = read_trace(path)["traceEvents"]
    named = [e["args"]["name"] for e in trace if e["name"] == "thread_name"]
    assert named == ["steps", *(f"rank {rank}, thread {thread}" for rank, thread in found.threads)]
    processes = [e["args"]["name"] for e in trace if e["name"] == "process_name"]
    assert processes == ["caller", *(f"rank {rank}" for rank in range(len(engine.plan)))]
    steps = [e for e in trace if e.get("cat") == "step"]
    assert [(e["name"], e["args"]["position"]) for e in steps] == [("prefill", 0), ("decode", 40), ("decode", 41)]
    spans = [e for e in trace if e["ph"] == "X" and e.get("cat") != "step"]
    for span in spans:  # a thread works only while the step is under way
        step = steps[span["args"]["step"]]
        assert step["ts"] <= span["ts"] + 1e-3
        assert span["ts"] + span["dur"] <= step["ts"] + step["dur"] + 1e-3
    downs = [e for e in spans if e["name"] == "down"]
    assert len(downs) == 3 * 2 * len(found.threads)
    first = downs[0]["args"]
    assert (first["op"], first["layer"], first["tokens"]) == ("linear", 0, 40)
    assert (first["weights"], first["kernel"]) == ("layers.0.down", engine.kernels(40)["nf4"])
    attended = next(e["args"] for e in spans if e["name"] == "attention")
    assert attended["kernel"] == engine.kernels(40)["attention"]
    assert {"pack for o", "wait within o", "wait after down"} <= {e["name"] for e in spans}
    waits = sum(e["dur"] for e in spans if e["cat"] == "wait") / 1e3
    assert waits == pytest.approx(sum(thread["wait_ms"] for thread in found.summary()["threads"]), rel=1e-3)


def test_a_full_trace_says_what_it_leaves_out(engine: Engine, tmp_path: Path) -> None:
    with engine.profile() as found:
        feed(engine, 1)
    n_spans = sum(len(marks) - 1 for marks in found.kept[0].marks)
    small = Profile(found.ops, found.plan, max_spans=2 * n_spans)
    for _ in range(5):
        small.add(found.kept[0])
    write_trace(small, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())  # the same step again and again: not in order
    assert sum(e.get("cat") == "step" for e in trace["traceEvents"]) == 2
    assert trace["otherData"]["note"].startswith("The last 3 steps are in the table but not in the trace")
    summary = small.summary()
    assert (summary["steps"]["decode"]["steps"], summary["steps_without_trace"]) == (5, 3)


def test_a_trace_that_cannot_be_written_leaves_nothing(engine: Engine, tmp_path: Path) -> None:
    with engine.profile() as found:
        feed(engine, 1)
    (old := tmp_path / "trace.json").write_text("old")
    found.kept.append(dataclasses.replace(found.kept[0], marks=()))  # an error amid writing
    with pytest.raises(ValueError, match="shorter"):
        write_trace(found, old)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("trace.json", "old")]


# ---- the command line


@pytest.fixture
def run(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    def load(_: object) -> LLM:
        return LLM._from_parts(Engine(directory), byte_tokenizer(), ChatTemplate(TEMPLATE))

    monkeypatch.setattr(cli_generate, "load", load)
    monkeypatch.setattr(limits, "READ_BYTES", 0)
    monkeypatch.setattr(cli_profile, "MEASUREMENTS", 1)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(["run", "-p", "hello", "--max-tokens", "6", "--ignore-eos", *arguments])
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


def test_run_writes_the_trace_and_shows_the_table(run: Any, tmp_path: Path) -> None:
    status, out, err = run("--profile", str(path := tmp_path / "trace.json"))
    assert status == 0, err
    assert "rank" not in out
    read_trace(path)
    words = " ".join(err.split())
    assert "prefill: 1 step, 22 tokens" in words
    assert "decode: 5 steps, 5 tokens" in words
    assert "enter and leave" in words
    assert "AMX" in words
    assert "(layers 0–1)" in words
    assert "Limits, measured right after: reading at" in words
    assert str(path) in "".join(err.split())
    assert "…" not in err
    together = [line.split() for line in err.splitlines() if line.startswith("together")]
    assert [row[2] for row in together] == ["100.0%", "100.0%"]


def test_the_table_as_json_has_shares_of_the_limits(run: Any, tmp_path: Path) -> None:
    status, out, err = run("--profile", str(tmp_path / "trace.json"), "--json")
    assert (status, err) == (0, "")
    result = json.loads(out.splitlines()[-1])["profile"]
    rows = {row["op"]: row for row in result["steps"]["decode"]["rows"]}
    assert rows["down"]["of_read"] == pytest.approx(rows["down"]["gb_s"] / result["limits"]["read_gb_s"]["median"])
    rows = {row["op"]: row for row in result["steps"]["prefill"]["rows"]}
    peak = result["limits"]["peak_gflop_s"]["median"]
    assert rows["down"]["of_peak"] == pytest.approx(rows["down"]["gflop_s"] / peak)


def test_without_memory_for_the_limits_the_table_has_no_shares(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ResourceError("memory is short")

    monkeypatch.setattr(cli_profile, "Limits", refuse)
    status, _, err = run("--profile", str(tmp_path / "trace.json"))
    assert status == 0
    assert "No shares of limits: memory is short." in err


def test_a_file_that_could_not_be_written_is_refused_before_loading(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_generate, "load", lambda _: pytest.fail("a model was loaded"))
    for path, message in ((tmp_path, "is a directory"), (tmp_path / "no" / "trace.json", "cannot be written")):
        status, out, err = run("--profile", str(path))
        assert (status, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1


def test_a_full_disk_is_said_in_a_sentence(run: Any) -> None:
    status, _, err = run("--profile", "/dev/full")
    assert status == 2
    assert "there is no room" in err.splitlines()[-1]
    assert Path("/dev/full").is_char_device()
