"""Weights that stay in their file: the same bits as in memory, files that change or fail, and who decides."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fake_source
import fourfold._core as _core
import fourfold.engine
import preload
from fourfold import bench, cli, doctor
from fourfold.checkpoint import Source
from fourfold.config import FORMATS
from fourfold.conversion import convert
from fourfold.engine import Engine
from fourfold.errors import ResourceError, RuntimeFailure, UserError
from fourfold.footprint import Footprint
from fourfold.llm import LLM
from fourfold.machine import RankPlan, read_machine
from fourfold.residency import STRETCHES, Residency, choose_residency

Logits = NDArray[np.float32]
# Every format over every number of ranks; each model meets every one of both.
CUTS = [(("llama", "yuan")[(i + ranks) % 2], fmt, ranks) for i, fmt in enumerate(FORMATS) for ranks in (1, 2, 3, 4)]
IDS = list(range(1, 50))


def both_ways(engine: Engine) -> list[Logits]:
    """Logits of a text at once and, of its first half, step by step; a step without logits before both."""
    sequence = engine.new_sequence()
    engine._feed(sequence, IDS * 13, every=False)  # two steps: none of the first one's rows is wanted
    engine.free(sequence)
    sequence = engine.new_sequence()
    steps = [engine.extend(sequence, [i]) for i in IDS[: len(IDS) // 2]]
    engine.free(sequence)
    return [engine.logits(IDS), *steps]


def same_bits(a: list[Logits], b: list[Logits]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(llama with a head of its own, or yuan with a tied one; format) -> a fourfold directory."""
    llama = dataclasses.replace(fake_source.CONFIG, max_context=1024)
    yuan = dataclasses.replace(
        llama, model_type="yuan", dim=256, n_kv_heads=4, head_dim=64, tie_embeddings=True, vocab_size=280
    )
    configs = {"llama": dataclasses.replace(llama, head_dim=64), "yuan": yuan}
    made: dict[tuple[str, str], Path] = {}

    def directory(name: str, fmt: str) -> Path:
        if (name, fmt) not in made:
            config, folder = configs[name], tmp_path_factory.mktemp(f"{name}-{fmt}")
            source = Source(folder, config, fake_source.tensors(config=config), {}, "0", [])
            convert(source, folder / "model", fmt)
            made[name, fmt] = folder / "model"
        return made[name, fmt]

    return directory


@pytest.fixture
def nf4(models: Callable[[str, str], Path], tmp_path: Path) -> Path:
    """A copy to be maltreated."""
    return Path(shutil.copytree(models("yuan", "nf4"), tmp_path / "model"))


# ---- the same bits


@pytest.mark.parametrize(("name", "fmt", "ranks"), CUTS)
def test_weights_on_disk_give_the_same_bits(
    models: Callable[[str, str], Path], name: str, fmt: str, ranks: int
) -> None:
    in_memory = Engine(models(name, fmt), ranks=ranks, weights="memory")
    on_disk = Engine(models(name, fmt), ranks=ranks, weights="disk")
    assert same_bits(both_ways(on_disk), both_ways(in_memory))
    facts = on_disk.describe()["disk"]
    n_steps = 2 + 1 + len(IDS) // 2
    assert n_steps * facts["bytes_per_step"] <= on_disk.disk_bytes_read() <= (n_steps + 2) * facts["bytes_per_step"]
    untied = name == "llama"  # whose embedding is looked up and never read whole
    assert (facts["weight_bytes"] > facts["bytes_per_step"]) == untied
    on_disk.close()


def test_matrices_of_many_pieces_give_the_same_bits(shared: Path, converted: Callable[[Path, str], Path]) -> None:
    directory = converted(shared / "stories15M", "f32")  # its head is read in 9 pieces
    for ranks in (1, 2):
        engines = [Engine(directory, ranks=ranks, weights=where) for where in ("memory", "disk")]
        ids = list(range(300, 340))
        assert np.array_equal(*(engine.logits(ids) for engine in engines))


@pytest.mark.parametrize("away", ["gate", "up", "down"])
@pytest.mark.parametrize(("name", "ranks"), [("llama", 1), ("yuan", 3)])
def test_a_feed_forward_partly_on_disk_gives_the_same_bits(
    models: Callable[[str, str], Path], name: str, ranks: int, away: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate and up are packed for down where all are in memory, and written for it where one is not."""
    directory, ids = models(name, "nf4"), [i % 50 + 1 for i in range(600)]
    whole = Engine(directory, ranks=ranks)

    def residency(need: Footprint, *_: Any) -> Residency:
        on_disk = frozenset(weight for weight in need.slices if weight.endswith(f".{away}"))
        return Residency(frozenset(need.slices) - on_disk, on_disk)

    monkeypatch.setattr(fourfold.engine, "choose_residency", residency)
    parted = Engine(directory, ranks=ranks)
    assert parted._residency.on_disk
    assert np.array_equal(parted.logits(ids), whole.logits(ids))
    assert parted.disk_bytes_read() > 0


def with_memory_for(share: float, need: Footprint, context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has room for that share of the weights."""
    monkeypatch.setattr(_core, "RING_BYTES", 0)
    rest = sum(need.besides_weights(context)) + sum(need.on_disk) + need.rope
    weights = sum(sum(room) for name, room in need.slices.items() if name not in need.looked_up)
    available = int((rest + share * weights) / 0.9) + 1
    machine = dataclasses.replace(read_machine(), available_bytes=available)
    monkeypatch.setattr(fourfold.engine, "read_machine", lambda: machine)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("ranks", [1, 4])
def test_what_memory_has_room_for_stays_there(
    shared: Path, converted: Callable[[Path, str], Path], ranks: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = converted(shared / "golden" / "yuan-d64", "f32")
    whole = Engine(directory, ranks=ranks, kv="int8")
    monkeypatch.setattr(fourfold.engine, "MAX_STEP_TOKENS", 8)  # so that weights outweigh activations
    need = Engine(directory, ranks=ranks, kv="int8")._footprint
    with_memory_for(share, need, whole.context, monkeypatch)
    engine = Engine(directory, ranks=ranks, kv="int8")
    kept, left = engine._residency.in_memory, engine._residency.on_disk
    assert kept | left == set(need.slices)
    n_kept, n_all = (sum(sum(need.slices[name]) for name in names) for names in (kept, kept | left))
    largest = max(map(sum, need.slices.values()))
    assert share * n_all - largest < n_kept <= share * n_all
    assert np.array_equal(engine.logits(IDS), whole.logits(IDS))


# ---- files that change or fail


def spoil(engine: Engine, message: str) -> None:
    """When what was read ahead is used up, a step says what happened; the next ones say that there was a failure."""

    def some_steps() -> None:
        for _ in range(5):
            engine.logits(IDS)

    with pytest.raises(RuntimeFailure, match=message) as error:
        some_steps()
    assert "\n" not in str(error.value)
    with pytest.raises(RuntimeFailure, match="broken by an earlier failure; load the model again"):
        engine.logits(IDS)
    engine.check_integrity()
    engine.close()


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_file_that_shrinks_is_an_error_and_no_crash(nf4: Path, ranks: int) -> None:
    engine = Engine(nf4, ranks=ranks, weights="disk")
    engine.logits(IDS)
    os.truncate(nf4 / "model.safetensors", 10_000)
    spoil(engine, "model.safetensors was changed while weights were being read from it; begin again")


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_file_that_shrinks_while_it_is_loaded_is_an_error_and_no_crash(nf4: Path, ranks: int) -> None:
    with pytest.raises(RuntimeFailure, match="was changed while weights were being read from it; begin again"):
        Engine(nf4, ranks=ranks, report=lambda done, total: os.truncate(nf4 / "model.safetensors", 10_000))


def test_a_file_that_is_written_to_is_an_error(nf4: Path) -> None:
    engine = Engine(nf4, ranks=2, weights="disk")
    with (nf4 / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x00")
    spoil(engine, "was changed while")


def test_a_directory_that_is_replaced_changes_nothing(nf4: Path, models: Callable[[str, str], Path]) -> None:
    engine = Engine(nf4, ranks=2, weights="disk")
    before = engine.logits(IDS)
    shutil.move(nf4, nf4.with_name("old"))
    shutil.copytree(models("yuan", "int8"), nf4)
    shutil.rmtree(nf4.with_name("old"))
    for _ in range(3):
        assert np.array_equal(engine.logits(IDS), before)


SCRIPT = """
import ctypes, sys
from fourfold.engine import Engine
from fourfold.errors import RuntimeFailure
engine = Engine(sys.argv[1], ranks=2, weights="disk", timeout_seconds=0.5)
engine.logits([1, 2, 3])
ctypes.CDLL(None).setenv(sys.argv[2].encode(), b"1", 1)
try:
    for _ in range(5):
        sequence = engine.new_sequence()
        engine.extend(sequence, [1])
        engine.free(sequence)
except RuntimeFailure as error:
    print(error)
engine.close()
"""


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("DISK_FAILS", "model.safetensors could not be read (Input/output error); check the disk"),
        ("DISK_HANGS", " s; "),  # of the reader, or of the thread that looks an embedding up
    ],
)
def test_a_disk_that_fails_or_hangs_ends_the_step_in_one_sentence(
    nf4: Path, tmp_path: Path, trouble: str, message: str
) -> None:
    printed = preload.run(SCRIPT, tmp_path, str(nf4), trouble)
    assert message in printed
    assert len(printed.splitlines()) == 1


NO_READER = """
import ctypes, sys
import fourfold.engine
from fourfold.errors import FourfoldError
start_team = fourfold.engine.start_team
def start_team_and_no_more(*arguments):
    team = start_team(*arguments)
    ctypes.CDLL(None).setenv(b"NO_THREADS", b"1", 1)
    return team
fourfold.engine.start_team = start_team_and_no_more
try:
    fourfold.engine.Engine(sys.argv[1], ranks=2, weights="disk")
except FourfoldError as error:
    print(type(error).__name__, error)
"""


def test_without_a_thread_to_read_with_no_weights_stay_on_disk(nf4: Path, tmp_path: Path) -> None:
    message = "model.safetensors with (Resource temporarily unavailable); raise this process's limit of threads\n"
    printed = preload.run(NO_READER, tmp_path, str(nf4), timeout=100)
    assert printed.startswith("RuntimeFailure the system gives no thread to read")
    assert printed.endswith(message)


FORK = """
import os, sys, time
from fourfold.engine import Engine
from fourfold.errors import RuntimeFailure
engine = Engine(sys.argv[1], ranks=2, weights="disk")
before = engine.logits([1, 2, 3])
if child := os.fork():
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(status if (engine.logits([1, 2, 3]) == before).all() else 3)
try:
    engine.logits([1, 2, 3])
except RuntimeFailure as error:
    print(error, flush=True)
engine.close()
os._exit(0)
"""


def test_a_forked_process_waits_for_no_disk(nf4: Path) -> None:
    """Neither in a step nor at the end."""
    command = [sys.executable, "-c", FORK, str(nf4)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.startswith("this process was forked from the one that has the model's threads; load the model")


# ---- who decides


def test_nothing_of_the_file_is_kept_where_weights_fit(nf4: Path) -> None:
    engine = Engine(nf4, ranks=1)
    held = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert not any(str(nf4) in file for file in held)
    assert str(nf4) not in Path("/proc/self/maps").read_text()
    assert engine.describe()["disk"] is engine.slowness is engine.measure_disk() is None
    assert engine.disk_bytes_read() == 0


def test_weights_on_disk_leave_no_mapping_either(nf4: Path) -> None:
    engine = Engine(nf4, ranks=1, weights="disk")
    engine.logits(IDS)
    assert str(nf4) not in Path("/proc/self/maps").read_text()


NEED = Footprint(
    weights=(100 << 20, 100 << 20),
    slices={f"w{i}": (10 << 20, 10 << 20) for i in range(10)},
    kv_page=(1 << 20, 1 << 20),
    state_page=(0, 0),
    state_text=(0, 0),
    work=(50 << 20, 50 << 20),
    rope=0,
    looked_up=frozenset(),
    on_disk=(1 << 20, 1 << 20),
)


def choose(weights: Any, megabytes: int, nodes: tuple[int, int] | None = None) -> Any:
    """On a machine with so much memory; on two nodes with so much each."""
    machine = dataclasses.replace(read_machine(), available_bytes=megabytes << 20)
    plan = [RankPlan(0, [0]), RankPlan(0, [0])]
    if nodes:
        some = machine.nodes[0]
        both = [dataclasses.replace(some, id=i, available_bytes=mb << 20) for i, mb in enumerate(nodes)]
        machine, plan = dataclasses.replace(machine, nodes=both), [RankPlan(0, [0]), RankPlan(1, [0])]
    return choose_residency(NEED, weights, 64, machine, plan)


def test_the_disk_is_used_where_memory_does_not_suffice_or_where_it_is_asked_for() -> None:
    assert choose("auto", 302) == choose("memory", 302)
    assert not choose("auto", 302).uses_disk  # 2 · (100 + 50 + 1) MB
    assert choose("auto", 301 + 256).in_memory == frozenset(NEED.slices)
    assert choose("disk", 10_000).on_disk == frozenset(NEED.slices)
    with pytest.raises(ResourceError, match=r"needs 0\.32 GB .* and 0\.31 GB are free: use weights on disk, a smaller"):
        choose("memory", 300)


def test_a_node_that_is_too_small_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "RING_BYTES", 4 << 20)
    assert not choose("auto", 1000, nodes=(151, 151)).uses_disk
    some = choose("auto", 1000, nodes=(500, 120))  # of the second's 120, 12 are spared and 52 are for the rest
    assert len(some.in_memory) == 5
    assert some.in_memory | some.on_disk == frozenset(NEED.slices)
    with pytest.raises(ResourceError, match=r"even with its weights on disk .* GB on NUMA node 1 .* smaller context"):
        choose("auto", 1000, nodes=(500, 51))


def test_a_model_smaller_than_what_is_read_ahead_is_not_sent_to_the_disk() -> None:
    with pytest.raises(ResourceError, match=r"the model needs 0\.32 GB .* are free: use a smaller context, a smaller"):
        choose("auto", 300)


def test_what_stays_lies_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "RING_BYTES", 0)
    many = dataclasses.replace(NEED, slices={f"w{i}": (1 << 20, 1 << 20) for i in range(160)})
    rest = 2 * (50 + 1 + 1)
    machine = dataclasses.replace(read_machine(), available_bytes=int((rest + 160) / 0.9 + 1) << 20)
    kept = choose_residency(many, "auto", 64, machine, [RankPlan(0, [0]), RankPlan(0, [0])]).in_memory
    is_kept = [f"w{i}" in kept for i in range(160)]
    assert sum(is_kept) == 80
    assert sum(b and not a for a, b in zip([False, *is_kept], is_kept, strict=False)) == STRETCHES


# ---- what people see


@pytest.mark.parametrize("how", [lambda: LLM("x", weights="floppy"), lambda: bench.decode(weights="floppy")])  # type: ignore[arg-type]
def test_other_places_for_weights_are_refused(how: Callable[[], Any]) -> None:
    with pytest.raises(UserError, match="weights must be one of auto, memory, disk, not 'floppy'"):
        how()


def test_run_warns_and_says_what_the_disk_gave(
    shared: Path, converted: Callable[[Path, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(converted(shared / "stories15M", "nf4"))
    outputs = []
    for options in ((), ("--json",)):
        with pytest.raises(SystemExit) as status:
            cli.main(["run", directory, "-p", "Once", "--raw", "--max-tokens", "5", "--weights", "disk", *options])
        assert status.value.code == 0
        outputs.append(capsys.readouterr())
    warning, speed = outputs[0].err.splitlines()
    assert "0.01 GB of weights are not in memory and are read from disk for every token" in warning
    assert "GB/s from disk (" in speed
    assert "GB of memory for 0.01 GB of weights" in speed
    facts = json.loads(outputs[1].out)
    disk = facts["disk"]
    assert 0 < disk["bytes_per_step"] <= disk["weight_bytes"] <= facts["weight_bytes"]
    assert disk["of_measured"] == pytest.approx(disk["gb_s"] / disk["measured_gb_s"])
    assert facts["resident_bytes"] > 10_000_000


def test_doctor_reads_the_largest_kept_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "MIN_DISK_BYTES", 1_000_000)
    assert doctor._disk() is None
    for name, n_bytes in (("small", 2_000_000), ("large", 3_000_000), ("other", 1000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(n_bytes))
    found = doctor._disk()
    assert found is not None
    assert found["file"] == str(tmp_path / "large" / "model.safetensors")
    assert found["gb_s"] > 0


def test_bench_measures_the_disk_around_each_repetition(nf4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.limits, "READ_BYTES", 0)
    result = bench.decode(model=str(nf4), weights="disk", tokens=3, repeats=2)
    assert result["disk_gb_s"]["median"] > 0
    assert result["of_disk"]["min"] > 0
    assert result["limits"]["disk_gb_s"]["max"] > 0
    assert "of_disk" not in bench.decode(model=str(nf4), tokens=3, repeats=2)
