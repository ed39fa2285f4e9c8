"""Files of a checkpoint as they are read: in pieces, never mapped, and by none but who opened them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

import fourbit_writers as writers
import tiny
from fourfold.checkpoint import open_source
from fourfold.checkpoint.source import FileTensor, SourceFile
from fourfold.checkpoint.torch_file import StridedTensor
from fourfold.conversion import convert
from fourfold.errors import CheckpointError

CONFIG = tiny.CONFIG | {"num_hidden_layers": 12}


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def replace(path: Path) -> None:
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    copy.rename(path)


@pytest.mark.parametrize("spoil", [truncate, touch, replace])
def test_a_source_that_changes_while_it_is_converted_is_an_error_and_no_crash(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = tiny.write_huggingface(tmp_path / "source", CONFIG, tiny.tensors(CONFIG))
    weights = next(folder.glob("*.safetensors"))
    with (
        open_source(folder) as source,
        pytest.raises(CheckpointError, match=r"safetensors (has changed since it was opened|was changed while)"),
    ):
        convert(source, tmp_path / "made", "nf4", progress=lambda done, total: spoil(weights))


def test_a_gguf_file_that_is_truncated_is_an_error_and_no_crash(tmp_path: Path, smollm2: Path) -> None:
    copy = tmp_path / "model.gguf"
    copy.write_bytes(smollm2.read_bytes())
    with open_source(copy) as source:
        truncate(copy)
        with pytest.raises(CheckpointError, match="has changed since it was opened; begin again"):
            convert(source, tmp_path / "made", "nf4")


def test_an_open_source_holds_no_file(tmp_path: Path) -> None:
    """A checkpoint may have more files than a process may have open."""
    folder = tiny.write_huggingface(tmp_path / "source", CONFIG, tiny.tensors(CONFIG))
    with open_source(folder) as source:
        tensor = next(iter(source.tensors.values()))
        rows = tensor.rows(0, 1)
        held = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        assert not any(str(folder) in file for file in held)
        assert str(folder) not in Path("/proc/self/maps").read_text()
    assert rows.size
    with pytest.raises(ValueError, match="has been closed"):
        tensor.rows(0, 1)


def test_columns_are_those_of_the_whole(tmp_path: Path) -> None:
    matrix = np.arange(5 * 7, dtype=np.int32).reshape(5, 7)
    (tmp_path / "file").write_bytes(b"head" + matrix.tobytes())
    tensor = FileTensor(SourceFile(tmp_path / "file"), 4, matrix.dtype, matrix.shape)
    for start, stop in ((0, 7), (2, 5), (6, 7), (3, 3)):
        np.testing.assert_array_equal(tensor.columns(start, stop), matrix[:, start:stop])
        np.testing.assert_array_equal(tensor.rows(start // 2, stop // 2), matrix[start // 2 : stop // 2])


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_of_any_strides_are_those_of_the_storage(tmp_path: Path, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    strides = tuple(data.draw(st.integers(0, 40)) for _ in shape)
    storage = np.arange(1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)), dtype=np.float32)
    (tmp_path / "file").write_bytes(b"head" + storage.tobytes())
    tensor = StridedTensor(SourceFile(tmp_path / "file"), 4, storage.dtype, shape, strides)
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    whole = as_strided(storage, shape, [4 * stride for stride in strides])
    np.testing.assert_array_equal(tensor.rows(start, stop), whole[start:stop])


def test_rows_of_a_transposed_tensor_take_no_more_of_the_file_than_they_are(tmp_path: Path) -> None:
    storage = np.arange(64 * 1000, dtype=np.float32)
    (tmp_path / "file").write_bytes(storage.tobytes())
    file = SourceFile(tmp_path / "file")
    taken: list[int] = []
    read_runs = file.read_runs
    file.read_runs = lambda *a: (taken.append(a[2] * a[3]), read_runs(*a))[1]  # type: ignore[method-assign]
    rows = StridedTensor(file, 0, storage.dtype, (1000, 64), (1, 1000)).rows(100, 110)
    np.testing.assert_array_equal(rows, storage.reshape(64, 1000).T[100:110])
    assert sum(taken) == rows.nbytes


def test_opening_reads_no_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is large stays on disk until it is asked for."""
    path, _ = writers.checkpoint(tmp_path / "model", writers.awq_config(), writers.awq)
    n_read = count_reads(monkeypatch)
    open_source(path).close()
    assert 0 < sum(n_read) < 1 << 16


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each read of a checkpoint's files from now on."""
    n_read: list[int] = []
    read_runs = SourceFile.read_runs

    def counted(file: SourceFile, start: int, stride: int, n_runs: int, n_bytes: int) -> Any:
        n_read.append(n_runs * n_bytes)
        return read_runs(file, start, stride, n_runs, n_bytes)

    monkeypatch.setattr(SourceFile, "read_runs", counted)
    return n_read


@pytest.mark.parametrize(
    ("config", "writer"), [(writers.gptq_config(), writers.gptq), (writers.awq_config(), writers.awq)]
)
def test_some_outputs_take_as_much_of_the_file_as_they_are(
    config: dict[str, Any], writer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they lie in columns: a matrix must not be read again for every piece of it."""
    path, _ = writers.checkpoint(tmp_path / "model", config, writer)
    with open_source(path) as source:
        tensor = source.tensors["model.layers.0.self_attn.q_proj.weight"]
        n = tensor.shape[0]
        n_read = count_reads(monkeypatch)
        tensor.rows(0, n)
        whole = sum(n_read)
        n_read.clear()
        tensor.rows(n // 2, n // 2 + 16)
        assert sum(n_read) <= whole * 16 / n
