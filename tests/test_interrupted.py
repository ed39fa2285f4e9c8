"""A conversion is whole or not there: interrupted, killed, on a full disk, or of a bad source."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fake_source
from fake_source import contents, names
from fourfold import conversion
from fourfold.checkpoint.fourfold_dir import open_directory
from fourfold.errors import CheckpointError, ResourceError, RuntimeFailure, UnsupportedError, UserError
from fourfold.models import weight_specs

SPECS = weight_specs(fake_source.CONFIG)


@pytest.fixture
def tensors() -> dict[str, fake_source.FakeTensor]:
    return fake_source.tensors()


KILLED = """
import os, signal, sys
from pathlib import Path
import fake_source
from fourfold import conversion

calls = 0
def progress(done, total):
    global calls
    calls += 1
    if calls == 9:
        os.kill(os.getpid(), signal.SIGKILL)

conversion.convert(fake_source.source(fake_source.tensors()), Path(sys.argv[1]), "nf4", progress=progress)
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed conversion writes."""
    path = tmp_path_factory.mktemp("conversion") / "model"
    conversion.convert(fake_source.source(fake_source.tensors()), path, "nf4")
    return path


def child(code: str, *args: str, before: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, env=environment, preexec_fn=before, capture_output=True, text=True, timeout=300)


def read_weights(tensors: dict[str, fake_source.FakeTensor]) -> set[str]:
    return {name for name, tensor in tensors.items() if tensor.reads}


def assert_resumes(dst: Path, converted: Path, tensors: dict[str, fake_source.FakeTensor], n_finished: int) -> None:
    """The rest is converted, what was finished is not read again; the bytes are an undisturbed conversion's."""
    conversion.convert(fake_source.source(tensors), dst, "nf4")
    kept = {spec.rows.names[0] for spec in SPECS[:n_finished]}
    assert read_weights(tensors) == set(tensors) - kept
    assert contents(dst) == contents(converted)
    assert not dst.with_name(dst.name + ".partial").exists()


def test_resumes_after_kill_9(tmp_path: Path, converted: Path, tensors: dict[str, fake_source.FakeTensor]) -> None:
    dst = tmp_path / "killed"
    assert child(KILLED, str(dst)).returncode == -signal.SIGKILL
    assert not dst.exists()
    assert_resumes(dst, converted, tensors, n_finished=9)


SHOT = """
import os, signal, sys
from pathlib import Path
import fake_source
from fourfold import conversion

# The process dies at the given system call of those that reach the disk: before it, or after half of it.
left = int(sys.argv[2])
def shot(call, halve):
    def count(fd, data, *rest):
        global left
        left -= 1
        if left == 0:
            halve(fd, data[: len(data) // 2], *rest)
            os.kill(os.getpid(), signal.SIGKILL)
        return call(fd, data, *rest)
    return count
os.pwrite = shot(os.pwrite, os.pwrite)
writer = conversion.DirectoryWriter
append = writer._append
def half_a_line(self, record):
    global left
    left -= 1
    if left == 0:
        self._journal.write(b'{"weight": "em')
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, record)
writer._append = half_a_line
conversion.PIECE_BYTES = 1 << 15  # many pieces to a weight
conversion.convert(fake_source.source(fake_source.tensors()), Path(sys.argv[1]), "nf4")
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_any_write_it_ends_in_the_same_bytes(tmp_path: Path, converted: Path, seed: int) -> None:
    rng, dst = np.random.default_rng(seed), tmp_path / "dst"
    n_finished = [0]
    for _ in range(40):
        if (status := child(SHOT, str(dst), str(rng.integers(1, 40))).returncode) == 0:
            break
        assert status == -signal.SIGKILL
        assert not dst.exists()
        lines = (tmp_path / "dst.partial/journal.jsonl").read_bytes().split(b"\n")[1:-1]
        n_finished.append(len(lines))
    assert n_finished == sorted(n_finished)  # nothing that was finished is ever lost
    assert len(set(n_finished)) > 2
    assert contents(dst) == contents(converted)


def test_resumes_after_an_interrupt(
    tmp_path: Path, converted: Path, tensors: dict[str, fake_source.FakeTensor]
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversion.convert(fake_source.source(fake_source.tensors()), tmp_path / "dst", "nf4", progress=interrupt)
    n_finished = len((tmp_path / "dst.partial/journal.jsonl").read_text().splitlines()) - 1
    assert 0 < n_finished < len(SPECS)
    assert_resumes(tmp_path / "dst", converted, tensors, n_finished)


def test_a_torn_journal_and_damaged_data_are_done_again(
    tmp_path: Path, converted: Path, tensors: dict[str, fake_source.FakeTensor]
) -> None:
    dst, partial = tmp_path / "killed", tmp_path / "killed.partial"
    child(KILLED, str(dst))
    journal = (partial / "journal.jsonl").read_bytes()
    (partial / "journal.jsonl").write_bytes(journal[:-5])  # the ninth weight's line
    with (partial / "model.safetensors").open("r+b") as file:  # the first weight's first byte
        start = open_directory(converted).data_start
        file.seek(start)
        byte = file.read(1)[0]
        file.seek(start)
        file.write(bytes([byte ^ 1]))
    conversion.convert(fake_source.source(tensors), dst, "nf4")
    assert read_weights(tensors) == set(tensors) - {spec.rows.names[0] for spec in SPECS[1:8]}
    assert contents(dst) == contents(converted)


@pytest.mark.parametrize("lost", [b"\0" * 700, b'{"weight": "layers.0.q"}\n' * 9, b'[1]\n{"weight": "layers.0.q"'])
def test_a_journal_whose_end_did_not_reach_the_disk_is_taken_up_before_it(
    lost: bytes, tmp_path: Path, converted: Path, tensors: dict[str, fake_source.FakeTensor]
) -> None:
    dst, journal = tmp_path / "killed", tmp_path / "killed.partial" / "journal.jsonl"
    child(KILLED, str(dst))
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:4]) + lost + b"".join(lines[7:]))
    assert_resumes(dst, converted, tensors, n_finished=3)


def test_a_journal_of_which_nothing_reached_the_disk_begins_anew(
    tmp_path: Path, converted: Path, tensors: dict[str, fake_source.FakeTensor]
) -> None:
    dst, journal = tmp_path / "killed", tmp_path / "killed.partial" / "journal.jsonl"
    child(KILLED, str(dst))
    journal.write_bytes(b"\0" * len(journal.read_bytes()))
    assert_resumes(dst, converted, tensors, n_finished=0)


def test_a_partial_of_something_else_is_not_touched(tmp_path: Path) -> None:
    child(KILLED, str(tmp_path / "dst"))
    before = contents(tmp_path / "dst.partial")
    for fmt, fingerprint in (("nf4", "another"), ("int8", "0123")):
        with pytest.raises(UserError, match=r"dst\.partial is an unfinished conversion of another source or format"):
            conversion.convert(fake_source.source(fake_source.tensors(), fingerprint), tmp_path / "dst", fmt)
    assert contents(tmp_path / "dst.partial") == before


def test_two_conversions_to_one_place_are_refused(tmp_path: Path) -> None:
    def again(done: int, total: int) -> None:
        conversion.convert(fake_source.source(fake_source.tensors()), tmp_path / "dst", "nf4")

    with pytest.raises(UserError, match="another process is writing"):
        conversion.convert(fake_source.source(fake_source.tensors()), tmp_path / "dst", "nf4", progress=again)


# ---- disks and destinations ----


def test_a_destination_that_exists_is_not_touched(converted: Path) -> None:
    before = contents(converted)
    with pytest.raises(UserError, match="model exists already"):
        conversion.convert(fake_source.source(fake_source.tensors()), converted, "nf4")
    assert contents(converted) == before
    assert names(converted.parent) == ["model"]


def test_a_destination_without_a_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no directory"):
        conversion.convert(fake_source.source(fake_source.tensors()), tmp_path / "no" / "model", "nf4")
    assert names(tmp_path) == []


def test_too_small_a_disk_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ResourceError, match=r"needs 0\.03 GB more on its disk"):
        conversion.convert(fake_source.source(fake_source.tensors()), tmp_path / "model", "nf4")
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_is_one_sentence_and_resumes(
    tmp_path: Path, converted: Path, tensors: dict[str, fake_source.FakeTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    room, pwrite = 60_000, os.pwrite

    def small_disk(fd: int, data: bytes, offset: int) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = pwrite(fd, data[:room], offset)
        room -= n
        return n

    monkeypatch.setattr(os, "pwrite", small_disk)
    with pytest.raises(ResourceError, match=r"no room to write .*dst\.partial .*goes on where it stopped"):
        conversion.convert(fake_source.source(fake_source.tensors()), tmp_path / "dst", "nf4")
    monkeypatch.undo()
    n_finished = len((tmp_path / "dst.partial/journal.jsonl").read_text().splitlines()) - 1
    assert n_finished > 0
    assert_resumes(tmp_path / "dst", converted, tensors, n_finished)


def test_a_full_disk_stops_it_and_more_room_lets_it_go_on(tmp_path: Path, converted: Path) -> None:
    code = """
import shutil, subprocess, sys
from pathlib import Path
import fake_source
from fourfold import conversion
from fourfold.errors import ResourceError

dst, n_finished = Path(sys.argv[1]) / "dst", 0
source = fake_source.source(fake_source.tensors())
shutil.disk_usage = lambda path: type("Usage", (), {"free": 1 << 40})  # the disk fills up later than it is asked
for size in ("160k", "240k", "10m"):
    subprocess.run(["mount", "-o", f"remount,size={size}", dst.parent], check=True)
    try:
        conversion.convert(source, dst, "nf4")
    except ResourceError as error:
        lines = (Path(f"{dst}.partial") / "journal.jsonl").read_text().count(chr(10))
        assert lines > n_finished, lines
        n_finished = lines
        print(error)
shutil.copytree(dst, sys.argv[2])
"""
    path = tmp_path / "disk"
    path.mkdir()
    prelude = """
import os, subprocess, sys
inside = "mount -t tmpfs -o size=160k tmpfs $1 && exec $0 -c \\"$2\\" $1 $3"
os.execvp("unshare", ["unshare", "-rm", "sh", "-c", inside, sys.executable, sys.argv[1], sys.argv[2], sys.argv[3]])
"""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no disk can be made here: mount namespaces are not permitted")
    done = child(prelude, str(path), code, str(tmp_path / "copy"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("there is no room to write") == 2
    assert contents(tmp_path / "copy") == contents(converted)


def test_a_limit_on_file_sizes_is_one_sentence(tmp_path: Path) -> None:
    code = """
import sys, fake_source
from fourfold import conversion
from fourfold.errors import ResourceError
try:
    conversion.convert(fake_source.source(fake_source.tensors()), sys.argv[1], "nf4")
except ResourceError as error:
    print(error)
"""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # noqa: E731
    done = child(code, str(tmp_path / "dst"), before=limit)
    assert done.stdout.startswith("there is no room to write")
    assert not (tmp_path / "dst").exists()


def test_a_bad_request_leaves_nothing_behind(
    tmp_path: Path, tensors: dict[str, fake_source.FakeTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors["model.layers.2.mlp.down_proj.weight"].data[5, 7] = np.nan
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.down_proj\.weight .*holds NaN or infinity"):
        conversion.convert(fake_source.source(tensors), tmp_path / "dst", "nf4")
    tensors["model.layers.2.mlp.down_proj.weight"].data[5, 7] = 0
    tensors["model.norm.weight"].data[0] = np.inf
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .*holds NaN or infinity"):
        conversion.convert(fake_source.source(tensors), tmp_path / "dst", "nf4")
    del tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.norm\.weight"):
        conversion.convert(fake_source.source(tensors), tmp_path / "dst", "nf4")
    with pytest.raises(UserError, match="no format 'nf5'"):
        conversion.convert(fake_source.source(fake_source.tensors()), tmp_path / "dst", "nf5")
    monkeypatch.setenv("FOURFOLD_ISA", "sse9")
    with pytest.raises(UnsupportedError, match="sse9"):
        conversion.convert(fake_source.source(fake_source.tensors()), tmp_path / "dst", "nf4")
    assert names(tmp_path) == []


def test_only_a_number_that_is_not_finite_is_the_sources_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("panels must have another shape")

    monkeypatch.setattr(conversion._core, "pack", fail)
    with pytest.raises(RuntimeFailure, match="embed could not be packed: panels must have another shape"):
        conversion.convert(fake_source.source(fake_source.tensors()), tmp_path / "dst", "nf4")


@pytest.mark.parametrize("name", ["/", "."])
def test_a_destination_without_a_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is not a name for a new directory"):
        conversion.convert(fake_source.source(fake_source.tensors()), Path(name), "nf4")


@pytest.mark.parametrize("threads", [0, -1, 10**9])
def test_an_impossible_number_of_threads_is_refused(threads: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="threads must be a whole number from 1 to"):
        conversion.convert(fake_source.source(fake_source.tensors()), tmp_path / "x", "nf4", threads=threads)
