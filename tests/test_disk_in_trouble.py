"""A disk that fails, hangs or is slow while a model is loaded from it: a sentence, and Ctrl-C at any time."""

from __future__ import annotations

from pathlib import Path

import pytest

import fake_source
import preload
from fourfold.conversion import convert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    with fake_source.source(fake_source.tensors()) as source:
        convert(source, folder / "nf4", "nf4")
    return folder / "nf4"


LOAD = """
import ctypes, os, signal, sys, threading, time
from fourfold.engine import Engine
from fourfold.errors import RuntimeFailure
path, trouble, weights, timeout, interrupts = sys.argv[1:]
ctypes.CDLL(None).setenv(trouble.encode(), b"1", 1)
sent = []
def interrupt():
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
if interrupts == "yes":
    threading.Timer(0.3, interrupt).start()
try:
    Engine(path, ranks=2, weights=weights, timeout_seconds=float(timeout))
    print("loaded")
except RuntimeFailure as error:
    print(error)
except KeyboardInterrupt:
    print("interrupted" if time.monotonic() - sent[0] < 10 else "too late")
"""


@pytest.mark.parametrize("weights", ["memory", "disk"])
@pytest.mark.parametrize(
    ("trouble", "timeout", "interrupts", "printed"),
    [
        ("DISK_HANGS", "60", "yes", "interrupted\n"),
        ("DISK_HANGS", "0.5", "no", "model.safetensors gave nothing for 0.5 s; check the disk\n"),
        ("DISK_IS_SLOW", "60", "yes", "interrupted\n"),
        ("DISK_IS_SLOW", "0.5", "no", "loaded\n"),
        ("DISK_FAILS", "60", "no", "model.safetensors could not be read (Input/output error); check the disk\n"),
    ],
)
def test_loading_from_a_disk_in_trouble_can_be_interrupted_and_ends(
    model: Path, tmp_path: Path, trouble: str, timeout: str, interrupts: str, printed: str, weights: str
) -> None:
    assert preload.run(LOAD, tmp_path, str(model), trouble, weights, timeout, interrupts).endswith(printed)
