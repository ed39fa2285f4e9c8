"""Files of torch.save: views read right, and whatever does not fit its file refused in a sentence."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torch_writer
from fourfold.checkpoint.pickle_data import Call, Name
from fourfold.checkpoint.source import SourceFile
from fourfold.checkpoint.torch_file import WEIGHTS, TorchFile, weights
from fourfold.errors import CheckpointError, UnsupportedError
from torch_writer import Global, Reduce, Storages, ordered, pickled

REFUSALS = (CheckpointError, UnsupportedError)


def opened(path: Path) -> dict[str, Any]:
    return weights(SourceFile(path))


def refusal(path: Path) -> str:
    with pytest.raises(REFUSALS) as caught:
        opened(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


# ---- what is read


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_are_the_tensors_rows(tmp_path: Path, dtype: Any) -> None:
    arrays = {"matrix": np.arange(24).reshape(6, 4).astype(dtype), "vector": np.arange(5).astype(dtype)}
    tensors = opened(torch_writer.write(tmp_path / "w.bin", arrays, {"alias": "matrix"}))
    assert tensors.keys() == {"matrix", "vector", "alias"}
    for name, array in {**arrays, "alias": arrays["matrix"]}.items():
        rows = tensors[name].rows(1, 4)
        assert (rows.dtype, tensors[name].shape) == (dtype, array.shape)
        np.testing.assert_array_equal(rows, array[1:4])


def test_names_that_share_a_storage_share_its_bytes(tmp_path: Path) -> None:
    tensors = opened(torch_writer.write(tmp_path / "w.bin", {"a": np.ones((4, 4), np.float32)}, {"b": "a"}))
    assert tensors["a"] == tensors["b"]


VIEWS = {
    "an offset": (3, (2, 5), (5, 1)),
    "transposed": (0, (5, 4), (1, 5)),
    "a column": (2, (4,), (5,)),
    "every other row": (0, (2, 5), (10, 1)),
    "repeated": (1, (3, 5), (0, 1)),
    "windows": (0, (6, 3), (2, 1)),
    "four axes": (0, (2, 5, 2, 1), (5, 1, 10, 77)),
    "one row": (15, (1, 5), (999, 1)),
    "none": (20, (0, 5), (5, 1)),
    "no column": (0, (3, 0), (0, 1)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_what_torch_would_see(tmp_path: Path, view: str) -> None:
    offset, shape, strides = VIEWS[view]
    base, storages = np.arange(20, dtype=np.float32), Storages()
    tensor = storages.view(storages.add(base), offset, shape, strides)
    (found,) = opened(storages.write(tmp_path / "w.bin", {"x": tensor})).values()
    expected = np.empty(shape, np.float32)
    for at in np.ndindex(*shape):
        expected[at] = base[offset + sum(i * stride for i, stride in zip(at, strides, strict=True))]
    assert found.shape == shape
    np.testing.assert_array_equal(found.rows(0, shape[0]), expected)
    np.testing.assert_array_equal(found.rows(shape[0] // 2, shape[0]), expected[shape[0] // 2 :])


def test_storages_that_are_not_aligned_are_copied(tmp_path: Path) -> None:
    """As where somebody has packed the zip file again."""
    storages = Storages()
    content = {"x": storages.tensor(np.arange(6, dtype=np.float32).reshape(2, 3)),
               "y": storages.view(0, 0, (3, 2), (1, 3))}  # fmt: skip
    path = storages.write(tmp_path / "w.bin", content)
    for shift in range(4):
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / f"{shift}.bin", "w") as new:
            new.writestr("a" * (1 + shift), b"")
            for info in old.infolist():
                new.writestr(info.filename, old.read(info))
        for tensor in opened(tmp_path / f"{shift}.bin").values():
            assert tensor.rows(0, tensor.shape[0]).flags.aligned
            assert tensor.rows(1, 2).sum() in (12, 5)


def test_what_else_a_file_holds_is_a_record(tmp_path: Path) -> None:
    content = {"args": torch_writer.namespace(lr=0.5, dtype=Global("torch", "bfloat16")), "n": 3, 7: "seven"}
    file = TorchFile(SourceFile(Storages().write(tmp_path / "w.pt", content)), names=None)
    assert isinstance(file.content, dict)
    args = file.content["args"]
    assert isinstance(args, Call)
    assert (args.function, args.state) == (
        Name("argparse", "Namespace"),
        {"lr": 0.5, "dtype": Name("torch", "bfloat16")},
    )
    assert file.content["n"] == 3
    assert 7 not in file.content
    assert "seven" in file.content.values()


# ---- damaged and hostile files


Bad = Callable[[Storages], Any]
UNFIT: dict[str, Bad] = {
    "past the end": lambda s: s.view(0, 1, (5, 4), (4, 1)),
    "an offset past the end": lambda s: s.view(0, 20, (1,), (1,)),
    "strides past the end": lambda s: s.view(0, 0, (5, 4), (5, 1)),
    "a negative stride": lambda s: s.view(0, 19, (5, 4), (-4, 1)),
    "a negative offset": lambda s: s.view(0, -1, (5, 4), (4, 1)),
    "a negative size": lambda s: s.view(0, 0, (-5, -4), (4, 1)),
    "a size that is no number": lambda s: s.view(0, 0, ("5", 4), (4, 1)),
    "a flag for a size": lambda s: s.view(0, 0, (True, 4), (4, 1)),
    "10^12 elements": lambda s: s.view(0, 0, (10**6, 10**6), (0, 0)),
    "a huge size": lambda s: s.view(0, 0, (2**70,), (0,)),
    "too many axes": lambda s: s.view(0, 0, (1,) * 65, (1,) * 65),
    "fewer strides": lambda s: s.view(0, 0, (5, 4), (4,)),
    "more elements than the storage": lambda s: s.view(0, 0, (5, 4), (4, 1), numel=21),
    "fewer": lambda s: s.view(0, 0, (5, 3), (3, 1), numel=15),
    "an absent storage": lambda s: Reduce(
        Global("torch._utils", "_rebuild_tensor_v2"),
        (
            torch_writer.Persistent(("storage", Global("torch", "FloatStorage"), "7", "cpu", 20)),
            0,
            (20,),
            (1,),
            False,
            {},
        ),
    ),
    "no storage": lambda s: Reduce(Global("torch._utils", "_rebuild_tensor_v2"), (None, 0, (20,), (1,), False, {})),
    "another persistent thing": lambda s: Reduce(
        Global("torch._utils", "_rebuild_tensor_v2"), (torch_writer.Persistent("0"), 0, (20,), (1,), False, {})
    ),
    "too few arguments": lambda s: Reduce(Global("torch._utils", "_rebuild_tensor_v2"), (0, (20,))),
    "arguments that are no tuple": lambda s: Reduce(Global("torch._utils", "_rebuild_tensor_v2"), None),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_view_that_does_not_fit_its_storage(tmp_path: Path, name: str) -> None:
    storages = Storages()
    storages.add(np.arange(20, dtype=np.float32))
    path = storages.write(tmp_path / "w.bin", {"x": UNFIT[name](storages)})
    assert "is damaged: tensor x does not fit its storage" in refusal(path)


def test_what_is_sound_but_not_read_is_named(tmp_path: Path) -> None:
    storages = Storages()
    double, negated = storages.add(np.zeros(3)), storages.add(np.zeros(3, np.float32))
    wide = storages.write(tmp_path / "a.bin", {"x": storages.view(double, 0, (3,), (1,))})
    assert "tensor x is in torch.DoubleStorage; fourfold reads only FloatStorage, Half" in refusal(wide)
    bits = storages.write(tmp_path / "b.bin", {"x": storages.view(negated, 0, (3,), (1,), metadata=({"neg": True},))})
    assert "tensor x is a negated or conjugated view" in refusal(bits)
    big = storages.write(tmp_path / "c.bin", {"x": storages.view(negated, 0, (3,), (1,))}, byteorder=b"big")
    assert "big-endian" in refusal(big)


def test_forms_that_are_older_are_told_how_to_be_converted(tmp_path: Path) -> None:
    (tmp_path / "old.bin").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"\x80\x02M\xe9\x03.")
    assert "torch.save(torch.load(FILE, map_location='cpu', weights_only=True), FILE)" in refusal(tmp_path / "old.bin")


# ---- zip files


def rezipped(path: Path, **options: Any) -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_name("again.bin"), "w", **options) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return path.with_name("again.bin")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3, dtype=np.float16)}
    return torch_writer.write(tmp_path / "w.bin", arrays)


def test_compressed_members_are_refused(small: Path) -> None:
    assert "is compressed or encrypted" in refusal(rezipped(small, compression=zipfile.ZIP_DEFLATED))


def test_zip_files_that_are_not_torchs(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "it has no data.pkl" in refusal(tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "is not a file of torch.save" in refusal(tmp_path / "b.bin")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(small: Path) -> None:
    with zipfile.ZipFile(small, "a") as archive:
        archive.writestr("archive/data/0", bytes(24))
    assert "two of its members have the same name" in refusal(small)


def patched(path: Path, field: int, form: str, value: int, member: int = -1) -> Path:
    """One field of one entry of the table of contents, counted from the entry's start."""
    content = bytearray(path.read_bytes())
    at, starts = 0, []
    while (at := content.find(b"PK\x01\x02", at)) >= 0:
        starts.append(at)
        at += 4
    struct.pack_into(form, content, starts[member] + field, value)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("field", "form", "value", "said"),
    [
        (42, "<I", 2**31, "is not where its table of contents says"),
        (42, "<I", 3, "is not where its table of contents says"),
        (24, "<I", 2**31, "is compressed or encrypted"),
        (20, "<I", 2**31, "is compressed or encrypted"),
        (8, "<H", 1, "is compressed or encrypted"),
        (10, "<H", 99, "is compressed or encrypted"),
        (28, "<H", 60000, "is damaged"),
        (0, "<I", 0, "is not a whole zip file"),
    ],
)
def test_a_table_of_contents_that_lies(small: Path, field: int, form: str, value: int, said: str) -> None:
    assert said in refusal(patched(small, field, form, value))


def test_a_member_that_would_reach_beyond_the_end(small: Path) -> None:
    patched(patched(small, 24, "<I", 2**31), 20, "<I", 2**31)
    assert "would reach beyond its end" in refusal(small)


def test_a_table_of_contents_of_absurd_size(tmp_path: Path) -> None:
    """A sparse file of 64 GB that says of itself that nearly all of it is its table of contents."""
    size = 64 << 30
    with (tmp_path / "w.bin").open("wb") as file:
        file.write(b"PK\x03\x04")
        end = size - 98
        file.seek(end)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, end, 0))
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    assert f"its table of contents would have {size - 98} bytes" in refusal(tmp_path / "w.bin")


def test_files_far_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Two storages of 40 GB, all holes but their last rows, read at once and with no more memory than those rows."""
    storages, shape = Storages([np.zeros(1, np.float32)] * 2), (10_000_000, 1000)
    content = {name: storages.view(i, 0, shape, (1000, 1), numel=10**10) for i, name in enumerate("ab")}
    path = tmp_path / "w.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", pickled(content))
        for i, value in enumerate((7, 8)):
            info = zipfile.ZipInfo(f"w/data/{i}")
            archive.writestr(info, b"")
            assert archive.fp
            archive.fp.seek(4 * 10**10 - 4000, os.SEEK_CUR)
            archive.fp.write(np.full(1000, value, np.float32).tobytes())
            info.file_size = info.compress_size = 4 * 10**10
            archive.start_dir = archive.fp.tell()  # type: ignore[attr-defined]
    tensors = opened(path)
    for name, value in (("a", 7), ("b", 8)):
        rows = tensors[name].rows(10**7 - 2, 10**7)
        assert (rows.sum(), rows[1].min()) == (1000 * value, value)


def test_truncated_anywhere(small: Path) -> None:
    content = small.read_bytes()
    for length in {*range(1, 40), *range(40, len(content), 37), len(content) - 1}:
        small.write_bytes(content[:length])
        refusal(small)
    small.write_bytes(b"")
    assert "is empty" in refusal(small)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_never_surprise(small: Path, data: st.DataObject) -> None:
    """In the pickle, the headers and the table of contents alike; with and without the allow-list."""
    storages = Storages()
    content = {"a": storages.tensor(np.arange(6, dtype=np.float32)), "b": torch_writer.namespace(x=1, y=[2, (3,)])}
    whole = bytearray(storages.write(small, ordered(content)).read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=5)):
        whole[at] = data.draw(st.integers(0, 255))
    small.write_bytes(whole)
    said = ""
    try:
        file = TorchFile(SourceFile(small), data.draw(st.sampled_from([None, WEIGHTS])))
        for tensor in file.tensors(file.content).values():
            tensor.rows(0, tensor.shape[0]) if tensor.shape else None
    except REFUSALS as refused:
        said = str(refused)
    assert "\n" not in said
