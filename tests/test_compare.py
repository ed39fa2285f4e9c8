"""benchmarks/compare.py: peers that fail do not stop the others, and what is shown is what was measured."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrices import Rotation, activations, block, product_error, whole

import compare
from fourfold.bench import limits
from fourfold.checkpoint import check_complete, open_source
from fourfold.cli import run_as
from fourfold.errors import CheckpointError, UserError
from fourfold.format import stored_bytes
from fourfold.models import weight_specs
from fourfold.models.shapes import SHAPES
from peers import chart, inputs, install, report, rounds
from peers.catalogue import FOURFOLD, PEERS, Environment, Peer
from peers.results import Results, Sample, read, write
from peers.work import Load, Work, matrix
from peers.worker import PeerFailed, Worker

ROOT = Path(__file__).parents[1]
FAKE = [sys.executable, str(Path(__file__).parent / "fake_peer.py")]
WORKERS = str(ROOT / "benchmarks" / "workers")
MACHINE = {"cpu": "A CPU", "isa": "avx2", "threads": 1, "peak": "avx2_f32"}
WORK = Work(
    "matrix-1",
    "One matrix <1 × 1>",
    "matrix",
    {},
    (
        Load("1", "1 token", {"seconds": 1}, "matrix", 1, 0.0),
        Load("512", "512 tokens", {"seconds": 2}, "matrix", 512, 40.0),
    ),
    memory_bytes=1,
)


def fake(how: str) -> Worker:
    return Worker([*FAKE, how, WORKERS], Path("/dev/null"))


def peer(name: str) -> Peer:
    return Peer(name, f"the {name} one", None, {"matrix": ()}, "a fake")


@pytest.fixture
def contest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Results]:
    """Rounds of fakes, by how they behave, where the memory reads 100 bytes/s and the cores do 2 FLOP/s."""

    def measured(self: limits.Limits) -> None:
        self._read.append(100.0)
        self._peak.append(2.0)

    monkeypatch.setattr(limits.Limits, "_measure", measured)
    monkeypatch.setattr(limits, "READ_BYTES", 0)

    def run(*hows: str, n_rounds: int = 2, results: Results | None = None) -> Results:
        titles = {how: f"the {how} one" for how in hows}
        results = results or Results(MACHINE, works={WORK.name: WORK.describe()}, peers=titles)

        def command(peer: Peer, work: Work) -> list[str]:
            if peer.name == "missing":
                raise install.NotInstalled("no wheel")
            return [*FAKE, peer.name, WORKERS]

        rounds.measure(WORK, [peer(how) for how in hows], n_rounds, results, command, tmp_path, lambda results: None)
        return results

    return run


def test_a_worker_answers_whatever_its_library_prints(contest: Callable[..., Results]) -> None:
    results = contest("good", "slow")
    assert results.failures == {}
    assert [sample.seconds for sample in results.samples if sample.peer == "good"] == [1.0, 2.0] * 2
    assert [sample.of_limit for sample in results.samples if sample.peer == "good"] == [1000 / 1 / 100, 40 / 2 / 2] * 2
    assert results.speedup(WORK.name, "1", "good", over="slow") == 2
    order = [sample.peer for sample in results.samples if sample.load == "1"]
    assert order == ["good", "slow", "slow", "good"], "who begins changes from round to round"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("dies", "ended by SIGSEGV: Error: out of luck"),
        ("raises", "ValueError: not with me"),
        ("lies", "it says that a turn took -1.0 seconds"),
        ("cannot load", "MemoryError: too large"),
        ("claims nothing", "it says of itself {'bytes': 0"),
        ("missing", "no wheel"),
    ],
)
def test_a_peer_that_fails_is_named_and_the_others_go_on(
    contest: Callable[..., Results], how: str, reason: str
) -> None:
    results = contest("good", how, "slow")
    assert results.failures.keys() == {f"{WORK.name}/{how}"}
    assert results.failures[f"{WORK.name}/{how}"].startswith(reason)
    assert len(results.samples) == 2 * 2 * 2
    assert f"the {how} one failed at One matrix <1 × 1>: {reason[:20]}" in report.markdown(results)


def test_a_peer_that_hangs_is_given_up(contest: Callable[..., Results], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "TURN_SECONDS", 3.0)
    results = contest("hangs", "good", n_rounds=1)
    assert results.failures == {f"{WORK.name}/hangs": "it did not answer within 3 s"}
    assert len(results.samples) == 2


def test_a_peer_that_works_again_has_not_failed(contest: Callable[..., Results]) -> None:
    results = contest("good", "missing")
    results.failures[f"{WORK.name}/good"] = "it was ill"
    contest("good", results=results)
    assert results.failures.keys() == {f"{WORK.name}/missing"}
    assert len(results.samples) == 2 * 2 * 2, "rounds are added to those that were there"


def test_a_worker_rests_between_its_turns_and_ends_with_its_driver() -> None:
    with fake("good") as worker:
        worker.ask({"load": {}}, 60)
        _wait_for(lambda: _state(worker._process.pid) == "T")
        assert worker.ask({"turn": {"seconds": 3}}, 60) == {"seconds": 3.0}
    assert _state(worker._process.pid) is None
    worker.close()  # once more: nothing


def test_a_killed_driver_leaves_no_worker_behind() -> None:
    script = (
        "import sys, time; from pathlib import Path; from peers.worker import Worker\n"
        f"worker = Worker({[*FAKE, 'good', WORKERS]!r}, Path('/dev/null')); worker.ask({{'load': {{}}}}, 60)\n"
        "print(worker._process.pid, flush=True); time.sleep(3600)"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT / "benchmarks")}
    )
    assert driver.stdout
    pid = int(driver.stdout.readline())
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    _wait_for(lambda: _state(pid) in (None, "Z"))


def test_an_answer_that_is_not_json_is_a_failure() -> None:
    talker = Worker([sys.executable, "-c", "print('hello'); input()"], Path("/dev/null"))
    with talker, pytest.raises(PeerFailed, match="answered b'hello', which is not a JSON object"):
        talker.ask({"load": {}}, 60)


def _state(pid: int) -> str | None:
    """R, S, T (stopped), Z (dead, its parent not told) ...; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def _wait_for(true: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def results() -> Results:
    """Two rounds: the other peer takes half of fourfold's time for 1 token, and twice its time for 512."""
    made = Results(MACHINE, {WORK.name: WORK.describe()}, {FOURFOLD.name: "fourfold NF4", "other": "Other & Sons"})
    for peer, times in ((FOURFOLD.name, (1.0, 3.0)), ("other", (0.5, 6.0))):
        made.facts[f"{WORK.name}/{peer}"] = {
            "bytes": 35_000_000,
            "version": "1",
            "path": "a | b",
            "errors": {"1": 0.09},
        }
        for number, factor in enumerate((1.0, 1.2)):
            made.samples += [
                Sample(WORK.name, load.name, peer, str(number), factor * seconds / 1e3, 0.5)
                for load, seconds in zip(WORK.loads, times, strict=True)
            ]
    return made


def test_results_come_back_from_their_file(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "results.json"
    assert read(path, MACHINE) == Results(MACHINE)
    write(results, path)
    assert read(path) == read(path, MACHINE) == results
    results.forget(WORK.name)
    assert results == Results(results.machine, results.works, results.peers)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 0}', '{"version": 1, "machine": {}, "samples": [3]}'])
def test_a_damaged_file_of_results_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="not a file of results"):
        read(path)


def test_results_of_another_machine_are_not_mixed_in(results: Results, tmp_path: Path) -> None:
    write(results, tmp_path / "results.json")
    with pytest.raises(UserError, match="another --cache"):
        read(tmp_path / "results.json", {**MACHINE, "threads": 2})
    with pytest.raises(UserError, match="no results"):
        read(tmp_path / "nothing.json")


def test_the_table_gives_medians_spreads_and_shares_and_says_who_is_ahead(results: Results) -> None:
    text = report.markdown(results)
    assert "| **fourfold NF4** | 1.1 (1–1.2); 0.50 | 3.3 (3–3.6); 0.50 |" in text
    assert "| Other & Sons | 0.55 (0.5–0.6); 0.50 | 6.6 (6–7.2); 0.50 |" in text
    assert text.count("× as fast") == 1
    assert "- fourfold NF4: the classes that" in text
    assert "llama.cpp: " not in text, "it was not measured"
    assert "- Other & Sons, One matrix <1 × 1>, 1 token: 2.00 × as fast." in text
    results.samples = [sample for sample in results.samples if sample.load == "512"]
    assert "Nobody is ahead of fourfold" in report.markdown(results)
    results.samples = [sample for sample in results.samples if sample.peer == "other"]
    assert "ahead" not in report.markdown(results), "who was not measured is not ahead either"


def test_speeds_of_models_are_tokens_a_second_least_first() -> None:
    load = {"title": "prompt of 512", "unit": "prompt", "tokens": 512}
    work = {"title": "A model", "kind": "model", "loads": {"prompt": load}}
    samples = [Sample("model", "prompt", FOURFOLD.name, str(i), 0.5 * 2**i, 0.4) for i in range(3)]
    results = Results(MACHINE, {"model": work}, {FOURFOLD.name: "fourfold"}, samples=samples)
    assert "| prompt of 512, tokens/s |" in report.markdown(results)
    assert "| **fourfold** | 512 (256–1024); 0.40 |" in report.markdown(results)


def test_the_table_takes_its_place_in_a_page_and_leaves_the_rest() -> None:
    page = report.insert("# Performance\n\nText.\n", "one")
    assert page.startswith("# Performance\n\nText.\n\n## Against others\n")
    again = report.insert(page + "\n## More\n", "two")
    assert again == page.replace("one", "two") + "\n## More\n"
    assert report.insert("", "one").startswith("## Against others")


def test_the_chart_is_longer_where_a_peer_is_faster(results: Results) -> None:
    picture = ElementTree.fromstring(chart.chart(results))
    svg = "{http://www.w3.org/2000/svg}"
    widths = {bar.get("class"): [] for bar in picture.iter(f"{svg}rect") if "bar" in str(bar.get("class"))}
    for bar in picture.iter(f"{svg}rect"):
        if bar.get("class") in widths:
            widths[bar.get("class")].append(float(bar.get("width", 0)) / chart.BARS)
    assert widths["bar"] == pytest.approx([1, 0.5], abs=0.01)
    assert widths["us bar"] == pytest.approx([0.5, 1], abs=0.01)
    texts = [text.text for text in picture.iter(f"{svg}text")]
    assert {"Other & Sons", "fourfold NF4", "One matrix <1 × 1>", "0.55", "3.3", "50 %"} <= set(texts)
    assert "prefers-color-scheme: dark" in str(picture.findtext(f"{svg}style"))


def test_the_chart_of_nothing_is_a_picture_still() -> None:
    ElementTree.fromstring(chart.chart(Results(MACHINE, {WORK.name: WORK.describe()})))


class Plain:
    """Copies of the matrix as it stands; `wrong` ones are of another, `shared` ones are one."""

    path, version = "numpy", "1"

    def __init__(self, k: int, n: int, *, wrong: bool = False, shared: bool = False) -> None:
        self._w, self.n_copies = whole(k, n) * (-1 if wrong else 1), 3
        self.n_bytes = (1 << 50) if shared else self._w.nbytes

    def activations(self, x: Any) -> Any:
        return x

    def multiply(self, copy: int, x: Any) -> Any:
        return x @ self._w.T

    def floats(self, y: Any) -> Any:
        return y


def test_a_matrix_is_timed_only_where_its_product_is_right() -> None:
    subject = {"k": 64, "n": 1024, "tokens": (1, 512)}
    rotation = Rotation(Plain(64, 1024), subject)
    assert rotation.turn({"tokens": 1}) > 0
    assert rotation.turn({"tokens": 512}) > 0
    assert max(rotation.facts()["errors"].values()) < 1e-6
    with pytest.raises(RuntimeError, match=r"the product of 1 tokens is off by 2\.00 of its size"):
        Rotation(Plain(64, 1024, wrong=True), subject)
    with pytest.raises(RuntimeError, match="one is shared"):
        Rotation(Plain(64, 1024, shared=True), subject)


def test_the_error_of_a_product_is_relative() -> None:
    x = activations(4, 64)
    y = np.tile(x @ block(64).T, (1, 2))
    assert product_error(y, x) == 0
    assert product_error(y * np.float32(1.1), x) == pytest.approx(0.1, rel=1e-4)


def test_fourfold_stands_its_turns(tmp_path: Path) -> None:
    command = rounds.commands(tmp_path, 1)
    work = matrix(512, 1024)
    with Worker(command(FOURFOLD, work), tmp_path / "log") as worker:
        facts = worker.ask({"load": {**work.subject, "rotating_bytes": 1_000_000}}, 120)["facts"]
        assert facts["bytes"] == pytest.approx(stored_bytes("nf4", (1024, 512)), rel=0.001)
        assert all(0.06 < error < 0.11 for error in facts["errors"].values()), facts
        assert all(0 < worker.ask({"turn": dict(load.request)}, 120)["seconds"] < 1 for load in work.loads)


def test_a_random_model_for_other_readers_is_whole(tmp_path: Path, smollm2: Path) -> None:
    config = replace(
        SHAPES["llama-3b"], vocab_size=300, dim=64, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=32, hidden_dim=128
    )
    inputs._write_gguf(config, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    with open_source(tmp_path / "model.gguf") as source:
        check_complete(weight_specs(source.config), source)
        assert source.config == replace(config, max_context=inputs.CONTEXT, rope_scaling=None, eos_ids=(2,))
        row = source.tensors["model.layers.0.mlp.down_proj.weight"].rows(0, 64)
    assert row.std() == pytest.approx(config.hidden_dim**-0.5, rel=0.05)


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a shell script in the place of whatever an installation runs; where it runs."""
    start = subprocess.Popen

    def replace_by(script: str) -> Path:
        def popen(command: list[str], **options: Any) -> Any:
            return start(["sh", "-c", f"cd {tmp_path}; {script}", "sh", *command], **options)

        monkeypatch.setattr(install.subprocess, "Popen", popen)
        return tmp_path

    return replace_by


def test_an_environment_that_cannot_be_made_says_why(pip: Callable[[str], Path]) -> None:
    cache = pip("echo 'ERROR: no wheel'; echo 'pip is old'; exit 1")
    environment = Environment("wrong", ("a-package",))
    with pytest.raises(install.NotInstalled, match=r"ERROR: no wheel \(see "):
        install.install(environment, cache)
    with pytest.raises(install.NotInstalled, match=r"^not installed: ended with status 1: ERROR: no wheel"):
        install.python_of(environment, cache)
    pip("mkdir -p venvs/wrong")
    install.install(environment, cache)
    assert install.python_of(environment, cache).parts[-4:] == ("venvs", "wrong", "bin", "python")


def test_an_installation_that_does_not_end_is_ended_with_all_it_started(pip: Callable[[str], Path]) -> None:
    cache = pip("sleep 3600 & echo $! > child; wait")
    with pytest.raises(install.NotInstalled, match=r"more than 0\.02 minutes"):
        install.install(Environment("slow", ("a-package",), minutes=0.02), cache)
    child = int((cache / "child").read_text())
    _wait_for(lambda: _state(child) in (None, "Z"))


def test_an_environment_is_made_once(pip: Callable[[str], Path]) -> None:
    cache = pip('mkdir -p venvs/right; echo "$FLAGS $@" >> commands')
    environment = Environment("right", ("a-package==1",), {"FLAGS": "{HERE}/tile_config.h"})
    for _ in range(2):
        install.install(environment, cache)
    first, second = (cache / "commands").read_text().splitlines()
    assert first.endswith(f"-m venv {cache / 'venvs' / 'right'}")
    assert second.endswith("a-package==1")
    assert Path(second.split()[0]).is_file(), "the folder of the peers has been put in"
    assert install.python_of(environment, cache) == cache / "venvs" / "right" / "bin" / "python"
    with pytest.raises(install.NotInstalled, match="not installed: run"):
        install.python_of(Environment("right", ("a-package==2",)), cache)


def test_every_peer_has_its_worker() -> None:
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    for peer in PEERS:
        assert all((Path(WORKERS) / script).is_file() for script, *_ in peer.workers.values())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--work", "tensor"], "there is no work 'tensor'"),
        (["--peers", "fourfold,nobody"], "there is no peer 'nobody'"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--report"], "there are no results"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments, "--cache", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        run_as("compare", compare.app)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("compare: ")
    assert sentence in err
    assert len(err.splitlines()) == 1


def test_two_comparisons_do_not_disturb_each_other(tmp_path: Path) -> None:
    with compare._alone(tmp_path), pytest.raises(UserError, match="another comparison"), compare._alone(tmp_path):
        pass
    with compare._alone(tmp_path):
        pass
