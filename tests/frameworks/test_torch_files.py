"""What torch.save really writes, read without torch; and torch reads what tests/torch_writer.py writes.

These need torch: `make frameworks`.
"""

from __future__ import annotations

import argparse
import collections
import random
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tiny
import torch_writer
from fourfold.checkpoint.pickle_data import Call, Name, Persistent
from fourfold.checkpoint.source import SourceFile
from fourfold.checkpoint.torch_file import TorchFile, weights
from fourfold.errors import UnsupportedError
from megatron_writer import write_megatron

torch = pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def as_array(tensor: Any) -> Any:
    """With the tensor's own type; bfloat16 by its bits."""
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def examples(dtype: str) -> dict[str, Any]:
    """Parameters, shared storages, views with offsets and gaps, transposes, a convolution's weight."""
    torch.manual_seed(0)
    base = torch.randn(6, 8).to(getattr(torch, dtype))
    conv = torch.randn(4, 6, 2, 1).to(getattr(torch, dtype))
    return {
        "plain": base.clone(),
        "parameter": torch.nn.Parameter(base.clone()),
        "nested.parameter": torch.nn.Parameter(torch.nn.Parameter(base[1:3].clone()), requires_grad=False),
        "shared": base,
        "shared.again": base,
        "shared.rows": base[2:5],
        "shared.columns": base[:, 3:6],
        "shared.transposed": base.T,
        "shared.steps": base[::2, ::3],
        "shared.vector": base[:, 2],
        "repeated": base[0].expand(3, 8),
        "conv": conv,
        "conv.channels_last": conv.contiguous(memory_format=torch.channels_last),
        "empty": torch.empty(0, 5).to(getattr(torch, dtype)),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_writes_is_read(tmp_path: Path, dtype: str, protocol: int) -> None:
    tensors = examples(dtype)
    saved = collections.OrderedDict(tensors)
    saved._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    torch.save(saved, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    found = weights(SourceFile(tmp_path / "pytorch_model.bin"))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        rows = found[name].rows(0, tensor.shape[0])
        assert rows.dtype == DTYPES[dtype]
        np.testing.assert_array_equal(rows, as_array(tensor), err_msg=name)
        middle = slice(len(rows) // 2, len(rows))
        np.testing.assert_array_equal(found[name].rows(middle.start, middle.stop), rows[middle], err_msg=name)


def test_a_state_dict_of_a_module(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Conv2d(2, 3, (2, 1)))
    torch.save(module.state_dict(), tmp_path / "w.bin")
    found = weights(SourceFile(tmp_path / "w.bin"))
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(found[name].rows(0, tensor.shape[0]), as_array(tensor))


def test_other_types_are_named(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.int64, torch.bool, torch.uint8):
        torch.save({"x": torch.zeros(3, dtype=dtype)}, tmp_path / "w.bin")
        with pytest.raises(UnsupportedError, match=r"tensor x is in torch\.\w+Storage"):
            weights(SourceFile(tmp_path / "w.bin"))


def test_the_older_form_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(3)}, tmp_path / "w.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError, match=r"before version 1\.6"):
        weights(SourceFile(tmp_path / "w.bin"))


def test_a_training_checkpoint(tmp_path: Path) -> None:
    """A whole one, as Megatron saves it: model, arguments, optimizer, random states."""
    model = torch.nn.Linear(3, 4).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    rng = {"random": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    args = argparse.Namespace(num_layers=2, params_dtype=torch.bfloat16, kind=collections.Counter("abc"))
    content = {"args": args, "iteration": 5, "model": {"encoder": model.state_dict()}, "rng_state": [rng]}
    torch.save(content | {"optimizer": optimizer.state_dict()}, tmp_path / "model_optim_rng.pt")
    file = TorchFile(SourceFile(tmp_path / "model_optim_rng.pt"), names=None)
    assert isinstance(file.content, dict)
    kept = file.content["args"]
    assert isinstance(kept, Call)
    assert isinstance(kept.state, dict)
    assert (kept.state["num_layers"], kept.state["params_dtype"]) == (2, Name("torch", "bfloat16"))
    found = file.tensors(file.content["model"])
    np.testing.assert_array_equal(found["encoder.weight"].rows(0, 4), as_array(model.weight))


def plain(value: Any) -> Any:
    """Records as tuples, which can be compared."""
    match value:
        case Call():
            return "call", plain(value.function), plain(value.arguments), plain(value.state)
        case Persistent():
            return "outside", plain(value.id)
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case tuple() | list():
            return [plain(item) for item in value]
    return value


def test_our_writer_writes_what_torch_writes(tmp_path: Path) -> None:
    """The same program's result, the same members at the same alignment; only the memo and what torch logs differ."""
    arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(5).astype(np.float16)}
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    saved = collections.OrderedDict(tensors | {"p": torch.nn.Parameter(tensors["a"]), "t": tensors["a"].T})
    torch.save({"model": saved, "args": argparse.Namespace(x=1, y=[0.5, None], z=b"ab")}, tmp_path / "theirs.pt")
    storages = torch_writer.Storages()
    ours = {name: storages.tensor(array) for name, array in arrays.items()}
    ours |= {"p": storages.parameter(ours["a"]), "t": storages.view(0, 0, (4, 3), (1, 4))}
    arguments = torch_writer.namespace(x=1, y=[0.5, None], z=b"ab")
    storages.write(tmp_path / "ours.pt", {"model": torch_writer.ordered(ours), "args": arguments}, root="theirs")
    files = [TorchFile(SourceFile(tmp_path / f"{name}.pt"), names=None) for name in ("theirs", "ours")]
    assert plain(files[0].content) == plain(files[1].content)
    members = [set(zipfile.ZipFile(tmp_path / f"{name}.pt").namelist()) for name in ("theirs", "ours")]
    assert members[1] <= members[0]
    assert {name for name in members[0] - members[1] if not Path(name).name.startswith(".")} == {
        "theirs/.data/serialization_id"
    }
    for file in files:
        for tensor in file.tensors({"a": file.content["model"]["a"], "b": file.content["model"]["b"]}).values():
            assert tensor.offset % 64 == 0


def test_torch_reads_what_our_writer_writes(tmp_path: Path) -> None:
    arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(5).astype(ml_dtypes.bfloat16)}
    path = torch_writer.write(tmp_path / "w.bin", arrays, {"c": "a"})
    loaded = torch.load(path, weights_only=True)
    for name, array in {**arrays, "c": arrays["a"]}.items():
        np.testing.assert_array_equal(as_array(loaded[name]), array)
    assert loaded["a"].data_ptr() == loaded["c"].data_ptr()


def test_torch_reads_what_our_megatron_writer_writes(shared: Path, tmp_path: Path) -> None:
    config, tensors = tiny.golden(shared, "yuan-d64")
    write_megatron(
        tmp_path, config, tensors, 1, [3], change=lambda content, *_: content["optimizer"].pop("grad_scaler")
    )
    path = tmp_path / "iter_0000500" / "mp_rank_00" / "model_optim_rng.pt"
    loaded = torch.load(path, weights_only=False)  # our own file
    assert loaded["args"].num_layers == 3
    assert loaded["rng_state"][0]["np_rng_state"][1].tolist() == [50462976, 117835012, 185207048, 252579084]
    embedding = loaded["model"]["language_model"]["embedding"]["word_embeddings"]["weight"]
    np.testing.assert_array_equal(as_array(embedding), tensors["model.embed_tokens.weight"])
