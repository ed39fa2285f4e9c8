"""The command line over a scripted model: what goes to stdout, what to stderr, and the exit status."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_source
from fourfold import cli, cli_evaluate, cli_generate, conversion, llm
from fourfold.errors import RuntimeFailure, UserError
from fourfold.progress import bar, warn
from scripted import scripted_llm

Run = Callable[..., tuple[int, str, str]]
Start = Callable[..., subprocess.Popen[str]]

# A process of its own: `main` with a model that says "one two ...", and waits amid that where it is to be interrupted.
SLOW = """
import itertools, sys, time
sys.path.insert(0, {tests!r})
from scripted import ScriptedEngine, scripted_llm
from fourfold import cli, cli_generate
extend = ScriptedEngine.extend
calls = itertools.count()
ScriptedEngine.extend = lambda *a: (time.sleep(100 if next(calls) == {waits_at} else 0.06), extend(*a))[1]
cli_generate.load = lambda options: scripted_llm("one two three four five six seven eight nine ten.<eos>")[0]
cli.main(sys.argv[1:])
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes every model the scripted one."""

    def answers(text: str, **options: object) -> None:
        monkeypatch.setattr(cli_generate, "load", lambda _: scripted_llm(text, **options)[0])

    return answers


def test_run_prints_the_answer_alone_and_the_speed_on_stderr(run: Run, answers: Callable[..., None]) -> None:
    answers("Paris, né à Lutèce.<eos>")
    status, out, err = run("run", "-p", "capital?")
    assert (status, out) == (0, "Paris, né à Lutèce.\n")
    assert err.strip().endswith("GB/s")
    assert "tokens/s" in err
    assert len(err.splitlines()) == 1


def test_run_takes_the_prompt_from_a_pipe(
    run: Run, answers: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers("ok<eos>")
    for text, status in (("hello", 0), (" \n", 2)):
        read, write = os.pipe()
        os.write(write, text.encode())
        os.close(write)
        with os.fdopen(read) as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert run("run")[0] == status


def test_json_is_the_last_line(run: Run, answers: Callable[..., None]) -> None:
    answers("漢 字<eos>")
    status, out, err = run("run", "smollm2", "-p", "x", "--json")
    document = json.loads(out.splitlines()[-1])
    assert (status, err) == (0, "")
    assert (document["text"], document["finish_reason"], document["model"]) == ("漢 字", "stop", "smollm2")
    assert document["completion_tokens"] == len(document["token_ids"]) == 8


@pytest.mark.parametrize(
    ("options", "fed"),
    [
        ((), b"[user]q[assistant]"),
        (("--system", "be kind"), b"[system]be kind[user]q[assistant]"),
        (("--chat-template", "yuan-n"), b"q"),  # and <sep>
        (("--raw",), b"q"),
    ],
)
def test_run_uses_the_chat_template_unless_told_otherwise(
    options: tuple[str, ...], fed: bytes, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = scripted_llm("a<eos>")
    monkeypatch.setattr(cli_generate, "load", lambda _: model)
    assert run("run", "-p", "q", *options)[0] == 0
    assert bytes(i for i in engine.fed[0] if i < 256) == fed
    assert engine.closed


def test_sampling_options_reach_the_sampler(run: Run, answers: Callable[..., None]) -> None:
    answers("one STOP two<eos>")
    assert run("run", "-p", "x", "--stop", "STOP", "--stop", "two")[1] == "one \n"
    assert run("run", "-p", "x", "--max-tokens", "2")[1] == "on\n"
    params = cli_generate.sampling_params({"top_k": 3, "seed": 4, "stop": ["a"], "temperature": None})
    assert (params.top_k, params.seed, params.stop, params.temperature) == (3, 4, ("a",), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "-p", "x", "--temperature", "-1"), "temperature must be a number from 0 to 100, not -1.0"),
        (("run", "-p", "x", "--top-p", "0"), "top_p must be a number above 0 to 1"),
        (("run", "-p", "x", "--nope"), "No such option: --nope"),
        (("run", "-p", "x", "--seed", "one"), "--seed"),
        (("fly",), "No such command 'fly'"),
        (("bench", "fly"), "No such command 'fly'"),
        (("run", "-p", ""), "the prompt is empty"),
        (("run", "-p", "x", "/no/such/model"), "there is no model at /no/such/model"),
        (("run", "-p", "x", ".", "--format", "q4"), "there is no format 'q4'"),
        (("run", "-p", "x", "--ranks", "0"), "ranks must be"),
        (("chat", "--raw"), "a chat needs the chat template"),
        (
            ("run", "-p", "x", "/no/such/model", "--chat-template", "yuan"),
            "no chat template 'yuan'; fourfold has yuan-n,",
        ),
        (("chat", "/no/such/model", "--chat-template", "yuan"), "there is no chat template 'yuan'"),
        (("quantize", ".", "/x", "--tokenizer", "/no/such/place"), "/no/such/place has neither tokenizer.json nor"),
        (("eval", "smollm2"), "give one of --text FILE, --ids FILE.npy and --lambada FILE.jsonl"),
        (("eval", "smollm2", "--text", "/no/such/file"), "cannot be read as UTF-8 text"),
        (("eval", "smollm2", "--ids", __file__), "cannot be read as a .npy file"),
        (("eval", "smollm2", "--text", __file__, "--against-format", "f32"), "name that with --against"),
        (("eval", "smollm2", "--text", __file__, "--passages", "2"), "--passages is for --lambada"),
        (("eval", "smollm2", "--lambada", __file__, "--max-tokens", "9"), "--max-tokens is for --text and --ids"),
        (("eval", "smollm2", "--lambada", __file__), "is no JSON object with a text"),
        (("run", "-p", "x", "--raw", "--chat-template", "yuan-n"), "--raw leaves the chat template out"),
        (("run", "-p", "x", "--ranks", "99999999999999999999"), "ranks must be a whole number from 1 to 2147483647"),
        (("run", "a" * 5000, "-p", "x"), "cannot be used: File name too long"),
        (("quantize", ".", "/"), "has no config.json"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(arguments: tuple[str, ...], message: str, run: Run) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("fourfold: ")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("do it\notherwise"), 2, "fourfold: do it otherwise\n"),
        (RuntimeFailure("rank 2 stalled"), 1, "fourfold: rank 2 stalled\n"),
        (ZeroDivisionError("oh"), 1, "fourfold: ZeroDivisionError: oh (FOURFOLD_DEBUG=1 shows where)\n"),
        (MemoryError(), 1, "fourfold: there is not enough memory for this; "),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_the_status_says_whose_fault_it_is(
    error: BaseException, status: int, message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(cli_generate, "load", fail)
    monkeypatch.delenv("FOURFOLD_DEBUG", raising=False)
    got, _, err = run("run", "-p", "x")
    assert got == status
    assert err.startswith(message)
    assert "Traceback" not in err
    if status == 1:
        monkeypatch.setenv("FOURFOLD_DEBUG", "1")
        assert "Traceback" in run("run", "-p", "x")[2]


def test_no_template_no_system_message_and_no_chat(run: Run, answers: Callable[..., None]) -> None:
    answers("ok<eos>", template=None)
    assert run("run", "-p", "x")[1] == "ok\n"
    assert run("run", "-p", "x", "--system", "y")[0] == 2
    status, _, err = run("chat", "-p", "x")
    assert status == 2
    assert "no chat template; use `fourfold run`" in err


def test_help_and_version(run: Run) -> None:
    for arguments in ((), ("--help",), ("bench",), ("run", "--help")):
        status, out, err = run(*arguments)
        assert (status, err) == (0, "")
        assert "Usage" in out
    assert "(default: 512)" in " ".join(run("run", "--help")[1].replace("│", "").split())  # no markup that vanishes
    assert run("--version")[1].startswith("fourfold 0.")


def test_doctor_prints_json(run: Run) -> None:
    document = json.loads(run("doctor", "--quick", "--json")[1].splitlines()[-1])
    assert document["uses"]["isa"] in document["machine"]["isas"]


def test_a_path_with_brackets_is_shown_as_it_is(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "[bold]x[" / "y]"
    path.mkdir(parents=True)
    conversion.convert(fake_source.source(fake_source.tensors()), path / "m", "nf4")
    status, out, _ = run("verify", str(path / "m"))
    assert (status, "".join(out.split()).partition("intact")[0]) == (0, f"path{path / 'm'}")
    warn(f"{path} is odd")
    assert capsys.readouterr().err == f"! {path} is odd\n"


def test_a_bar_shows_any_title(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with bar("converting [bold]x[/y]") as report:
        report(1, 2)
    assert "converting [bold]x[/y]" in capsys.readouterr().err


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_no_number_is_null_in_json(run: Run, monkeypatch: pytest.MonkeyPatch, figure: float) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    measured = {"nll": figure, "of_read": {"median": 1.5, "all": [figure, 2.0]}, "pair": (figure, "é")}
    monkeypatch.setattr(cli_evaluate, "evaluate", lambda _: measured)
    found = json.loads(run("eval", "a", "--ids", "b", "--json")[1], parse_constant=refuse)
    assert found == {"nll": None, "of_read": {"median": 1.5, "all": [None, 2.0]}, "pair": [None, "é"]}


def test_eval_compares_two_models(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[tuple[str, str | None]] = []

    def fake(model: str, *, format: str | None, **_: object) -> llm.LLM:
        opened.append((model, format))
        return scripted_llm("x")[0]

    monkeypatch.setattr(cli_evaluate, "LLM", fake)
    (tmp_path / "text.txt").write_text("some text")
    np.save(tmp_path / "ids.npy", np.arange(9))
    text, ids = str(tmp_path / "text.txt"), str(tmp_path / "ids.npy")
    status, out, _ = run("eval", "a", "--text", text, "--against", "b", "--against-format", "f32", "--json")
    document = json.loads(out.splitlines()[-1])
    assert status == 0
    assert (document["tokens"], document["kl_mean"], document["top1_agreement"]) == (9, 0, 1)
    assert opened == [("a", None), ("b", "f32")]
    assert json.loads(run("eval", "a", "--ids", ids, "--json")[1])["tokens"] == 8
    assert "perplexity" in run("eval", "a", "--ids", ids)[1]


def test_chat_reads_a_pipe_to_its_end(answers: Callable[..., None]) -> None:
    done = _process("chat", "--json", input="hello\n/help\n/reset\n/bogus\nagain\n")
    answer = "one two three four five six seven eight nine ten."
    *answered, document = done.stdout.splitlines()
    assert done.returncode == 0
    assert answered == [answer, answer]
    messages = json.loads(document)["messages"]
    assert [m["content"] for m in messages] == ["again", answer]  # the first turn was forgotten
    assert "smollm2 · nf4 · scalar · 1 rank · 2 threads" in done.stderr
    assert "No command /bogus" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_ctrl_c_stops_an_answer_and_not_the_chat(start: Start) -> None:
    process = start("chat", "--json", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("hello\n")
    process.stdin.flush()
    assert process.stdout.read(4) == "one "
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate("/exit\n", timeout=100)
    document = json.loads(out.splitlines()[-1])
    assert process.returncode == 0
    assert document["answers"][0]["finish_reason"] == "cancelled"
    assert document["messages"][1]["content"].startswith("one ")


@pytest.mark.parametrize("where", ["chat_stream", "close", "note"])
def test_a_second_ctrl_c_ends_the_turn_and_not_the_chat(where: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the turn is: in the template, in giving the pages back, in saying how fast it was."""
    model, engine = scripted_llm("ok<eos>")
    waiting = [True]

    def interrupted(call: Callable[..., Any], when: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
        def once(*arguments: Any, **options: Any) -> Any:
            if waiting and when(*arguments):
                waiting.pop()
                raise KeyboardInterrupt
            return call(*arguments, **options)

        return once

    if where == "chat_stream":
        monkeypatch.setattr(model, "chat_stream", interrupted(model.chat_stream))
    elif where == "close":
        monkeypatch.setattr(llm.Stream, "close", interrupted(llm.Stream.close))
    else:
        monkeypatch.setattr(cli_generate, "_note", interrupted(cli_generate._note, lambda text: "tokens" in text))
    monkeypatch.setattr(cli_generate, "load", lambda _: model)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n"))
    status, out, _ = run("chat", "--json")
    assert (status, waiting) == (0, [])
    assert [m["content"] for m in json.loads(out.splitlines()[-1])["messages"]][-2:] == ["again", "ok"]
    assert engine.live == set()


def test_ctrl_c_ends_a_run_with_status_130(start: Start) -> None:
    process = start("run", "-p", "x", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(4) == "one "
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_a_reader_that_leaves_early_is_no_crash(start: Start) -> None:
    process = start("run", "-p", "x", waits_at=None, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=100) == 1
    assert process.stderr.read() == ""


def test_at_a_terminal_the_second_ctrl_c_at_the_prompt_leaves(start: Start) -> None:
    ours, theirs = pty.openpty()
    process = start(
        *("chat",),
        **{name: theirs for name in ("stdin", "stdout", "stderr")},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    shown = _read_until(ours, "> ")
    os.write(ours, b"hello\r")
    shown += _read_until(ours, "one ")
    os.write(ours, b"\x03")
    for before in ("tokens/s", "leaves."):
        shown += _read_until(ours, before) + _read_until(ours, "> ")
        time.sleep(0.3)  # the prompt is shown just before the interpreter waits for a key or a signal
        os.write(ours, b"\x03")
    assert process.wait(timeout=100) == 0
    os.close(ours)
    assert "ten." not in shown


def _read_until(terminal: int, text: str) -> str:
    seen, deadline = b"", time.monotonic() + 100
    while text.encode() not in seen:
        assert select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0], seen
        seen += os.read(terminal, 1)
    return seen.decode(errors="replace")


def _command(arguments: tuple[str, ...], waits_at: int | None = None) -> list[str]:
    return [sys.executable, "-c", SLOW.format(tests=str(Path(__file__).parent), waits_at=waits_at), *arguments]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the command, and ends it with the test. An answer waits for an interrupt from its tenth step on."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, waits_at: int | None = 10, **options: object) -> subprocess.Popen[str]:
        command = _command(arguments, waits_at)
        started.append(subprocess.Popen(command, text=True, **options))  # type: ignore[call-overload]
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _process(*arguments: str, input: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(arguments), input=input, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("closed", "status"), [("<&-", 2), (">&-", 0)])
def test_a_standard_stream_that_is_closed_is_an_empty_one(closed: str, status: int) -> None:
    code = _command(())[2]
    prompt = "" if closed == "<&-" else "-p x"
    command = ["sh", "-c", f'"$0" -c "$1" run {prompt} {closed}', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "")
    assert len(done.stderr.splitlines()) == 1
    assert ("the prompt is empty" in done.stderr) == (status == 2)
