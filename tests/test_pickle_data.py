"""Pickles as data: read as Python reads them, nothing in them executed, the hostile ones refused in a sentence."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.checkpoint import pickle_data
from fourfold.checkpoint.pickle_data import Call, Name, Persistent, read_pickle
from fourfold.checkpoint.source import SourceFile
from fourfold.checkpoint.torch_file import weights
from fourfold.errors import CheckpointError, UnsupportedError
from torch_writer import Global, Raw, Reduce, Storages, pickled

REFUSALS = (CheckpointError, UnsupportedError)
SYSTEM = Global(os.system.__module__, "system")


def refusal(path: Path) -> str:
    with pytest.raises(REFUSALS) as caught:
        weights(SourceFile(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_data_are_read_as_python_reads_them(protocol: int) -> None:
    value = {
        "numbers": [0, 1, -1, 255, 256, 65536, -(2**31), 2**40, -(2**2000), 1.5, True, False, None],
        "texts": ["", "é", "漢" * 300, "x" * 70000],
        "bytes": (b"" if protocol == 2 else b"abc",) * 2 if protocol > 2 else (),
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "nested": {"a": {"b": [{"c": "d"}]}},
    }
    value["again"] = value["texts"]
    read = read_pickle(pickle.dumps(value, protocol), "here", None)
    assert read == value
    assert isinstance(read, dict)
    assert read["again"] is read["texts"]


# ---- hostile


def test_nothing_that_a_file_asks_for_is_done(tmp_path: Path) -> None:
    """In a process of its own: neither the call, nor the import, in a file that may hold anything."""
    (tmp_path / "trap.py").write_text(f"x = open({str(tmp_path / 'imported')!r}, 'w').close()")
    run = Reduce(SYSTEM, (f"touch {tmp_path / 'executed'}",))
    evaluated = Reduce(Global("builtins", "eval"), (f"open({str(tmp_path / 'evaluated')!r}, 'w')",), {"x": 1}, {"y": 2})
    content = {"model": {}, "a": run, "b": Global("trap", "x"), "c": evaluated, "d": Reduce(Reduce(SYSTEM, ()), ())}
    path = Storages().write(tmp_path / "w.pt", content)
    ours = f"""if True:
        from pathlib import Path
        from fourfold.checkpoint.source import SourceFile
        from fourfold.checkpoint.torch_file import TorchFile
        print(sorted(TorchFile(SourceFile(Path({str(path)!r})), names=None).content))"""
    assert in_a_process(ours, tmp_path) == "['a', 'b', 'c', 'd', 'model']\n"
    assert {file.name for file in tmp_path.iterdir()} == {"trap.py", "w.pt"}
    pythons = f"""if True:
        import contextlib, pickle, zipfile
        with contextlib.suppress(Exception):
            pickle.loads(zipfile.ZipFile({str(path)!r}).read("archive/data.pkl"))"""
    in_a_process(pythons, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"executed", "imported"}, "the trap was none"


def in_a_process(script: str, folder: Path) -> str:
    """What it prints; modules in the folder can be imported there."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{script}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


EMPTY = Storages([np.zeros(0, np.float32)]).view(0, 0, (0,), (1,))
HOSTILE: dict[str, tuple[Any, str]] = {
    "a call": (Reduce(SYSTEM, ("touch executed",)), "asks to import posix.system, which weights do not need"),
    "a name": (SYSTEM, r"asks to import posix\.system"),
    "a name from the stack": (Raw(b"\x8c\x05posix\x8c\x06system\x93"), r"asks to import posix\.system"),
    "a name of numbers": (Raw(b"K\x01K\x02\x93"), "its pickle breaks off"),
    "a call of a text": (Reduce("os.system", ("touch executed",)), "x is no tensor but <an object>"),
    "a call of a call": (Reduce(Reduce(Global("torch", "FloatStorage"), ()), ()), "x is no tensor but <an object>"),
    "a storage as a function": (Reduce(Global("torch", "FloatStorage"), (1,)), r"no tensor but <torch\.FloatStorage>"),
    "another rebuilder": (
        Reduce(Global("torch._utils", "_rebuild_qtensor"), ()),
        "asks to import torch._utils._rebuild_q",
    ),
    "NEWOBJ": (Raw(b"cposix\nsystem\n)\x81"), r"asks to import posix\.system"),
    "INST": (Raw(b"(U\x05touchiposix\nsystem\n"), "uses the pickle instruction INST"),
    "OBJ": (Raw(b"(ctorch\nFloatStorage\no"), "uses the pickle instruction OBJ"),
    "EXT1": (Raw(b"\x82\x01"), "uses the pickle instruction EXT1"),
    "EXT4": (Raw(b"\x84\x01\x02\x03\x04"), "uses the pickle instruction EXT4"),
    "a buffer": (Raw(b"\x97"), "uses the pickle instruction NEXT_BUFFER"),
    "text of old": (Raw(b"S'abc'\n"), "uses the pickle instruction STRING"),
    "a persistent id of text": (Raw(b"Pstorage\n"), "uses the pickle instruction PERSID"),
    "BUILD of a text": (Raw(b"X\x01\x00\x00\x00a}b"), "its pickle breaks off"),
    "BUILD of a tensor": (
        Reduce(Global("torch._utils", "_rebuild_tensor_v2"), (), state={"x": 1}),
        "does not fit its stor",
    ),
    "no instruction": (Raw(b"\xff"), "its pickle breaks off"),
    "POP": (Raw(b"0"), "uses the pickle instruction POP"),
    "too few": (Raw(b"NN\x87\x87"), "its pickle breaks off"),
    "no mark": (Raw(b"Nt"), "its pickle breaks off"),
    "an absent memory": (Raw(b"h\x07"), "its pickle breaks off"),
    "a huge memory": (Raw(b"Nr\xff\xff\xff\xff"), "x is no tensor but of Python's type NoneType"),
    "a huge frame": (Raw(b"\x95" + b"\xff" * 8 + b"N"), "x is no tensor"),
    "a huge text": (Raw(b"\x8d" + b"\xff" * 7 + b"\x7f"), "its pickle breaks off"),
    "a huge number": (Raw(b"\x8b\xff\xff\xff\x7f"), "its pickle breaks off"),
    "a number too negative": (Raw(b"\x8b\xff\xff\xff\xff"), "its pickle breaks off"),
    "half a character": (Raw(b"X\x01\x00\x00\x00\xff"), "its pickle breaks off"),
    "a name without an end": (Raw(b"cposix"), "its pickle breaks off"),
    "a protocol of tomorrow": (Raw(b"\x80\x06N"), "its pickle breaks off"),
    "an odd dictionary": (Raw(b"}(X\x01\x00\x00\x00au"), "its pickle breaks off"),
    "items for a number": (Raw(b"K\x01(X\x01\x00\x00\x00aNu"), "its pickle breaks off"),
    "a list for a dictionary": (Raw(b"}(Ne"), "its pickle breaks off"),
    "deep": (Raw(b"\x85".join([b")"] + [b""] * 200_000)), "x is no tensor but of Python's type tuple"),
    "a deep key": (Raw(b"}" + b"\x85".join([b")"] + [b""] * 200_000) + b"Ns"), "damaged: a tensor has no name"),
    "itself": (Raw(b"}q\x00X\x01\x00\x00\x00ah\x00s"), "holds no dictionary of tensors under x.a.a.a"),
    "a long name": (Raw(b"c" + b"o" * 201 + b"\nx\n"), "its pickle breaks off"),
    "a tensor with a long name": ({"x" * 1001: {"y": None}}, "a tensor has no name, or that of another"),
    "two of one name": ({"y": {"z": EMPTY}, "y.z": EMPTY}, "a tensor has no name, or that of another"),
    "a number": (7, "x is no tensor but of Python's type int"),
    "a list": ([1], "x is no tensor but of Python's type list"),
    "a tensor without a name": ({3: 4}, "a tensor has no name, or that of another"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    content, said = HOSTILE[name]
    path = Storages([np.zeros(0, np.float32)]).write(tmp_path / "w.bin", {"x": content})
    assert re.search(said, refusal(path))
    assert [file.name for file in tmp_path.iterdir()] == ["w.bin"]


def test_dictionaries_that_multiply_are_not_walked(tmp_path: Path) -> None:
    """Seven levels of a thousand names each for the level below."""
    keys = [struct.pack("<I", 4) + f"k{i:03}".encode() for i in range(1000)]
    code = b"}q\x00"
    for level in range(1, 8):
        code += b"}q" + bytes([level]) + b"(" + b"".join(b"X" + key + b"h" + bytes([level - 1]) for key in keys) + b"u"
    path = Storages().write(tmp_path / "w.bin", None, pickle=b"\x80\x02" + code + b".")
    assert "more than 100000 tensors" in refusal(path)


def test_pickles_beyond_any_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_data, "MAX_BYTES", 1000)
    monkeypatch.setattr(pickle_data, "MAX_INSTRUCTIONS", 100)
    long = Storages().write(tmp_path / "long.bin", None, pickle=pickled("x" * 1000))
    busy = Storages().write(tmp_path / "busy.bin", None, pickle=pickled([None] * 200))
    assert "pickle of 1008 bytes" in refusal(long)
    assert "more than 100 instructions" in refusal(busy)


def test_names_that_would_write_on_the_terminal(tmp_path: Path) -> None:
    for i, content in enumerate(({"a\x1b[2J": None}, {"x": Global("os\x1b[2J", "y")}, {"x": {"a\nb": None}})):
        path = Storages().write(tmp_path / f"{i}.bin", None, pickle=pickled(content))
        assert refusal(path).isprintable()


@settings(max_examples=400)
@given(st.binary(max_size=60))
def test_random_instructions_never_surprise(code: bytes) -> None:
    with contextlib.suppress(*REFUSALS):
        read_pickle(b"\x80\x02" + code + b".", "here", None)


def test_records_are_inert() -> None:
    """What stands for an object says its name and can do nothing."""
    for record in (Name("os", "system"), Call(Name("os", "system"), ()), Persistent(1)):
        assert not callable(record)
    assert repr(Call(Name("os", "system"), ("x" * 10**6,))) == "<os.system>"
