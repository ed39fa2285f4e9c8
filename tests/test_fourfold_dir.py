"""A fourfold directory: what a conversion writes, and that nothing in it is trusted when it is read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fake_source
from fourfold import conversion
from fourfold.checkpoint.fourfold_dir import inspect, kind_of, open_directory, verify
from fourfold.config import FORMATS
from fourfold.errors import CheckpointError, FourfoldError, UserError
from fourfold.format import TILE_N, pack, unpack
from fourfold.models import weight_specs

FILES = ["config.json", "manifest.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
SPECS = weight_specs(fake_source.CONFIG)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "model"
    conversion.convert(fake_source.source(fake_source.tensors()), path, "nf4")
    return path


@pytest.fixture
def converted(tmp_path: Path, pristine: Path) -> Path:
    """A directory of its own, to be damaged."""
    return shutil.copytree(pristine, tmp_path / "model")


def stored(path: Path, name: str) -> tuple[Any, Any]:
    """The panels and panel scales of a matrix."""
    weight = open_directory(path).weights[name]
    panels = np.fromfile(path / "model.safetensors", np.uint8, weight.data_bytes, offset=weight.data_offset)
    n_panels = -(-weight.shape[0] // TILE_N)
    if weight.scale_offset is None:
        return panels.reshape(n_panels, -1), None
    scales = np.fromfile(path / "model.safetensors", np.float32, n_panels, offset=weight.scale_offset)
    return panels.reshape(n_panels, -1), scales


# ---- what is written ----


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_conversion_holds_what_the_source_held(tmp_path: Path, fmt: Any, dtype: Any) -> None:
    tensors = fake_source.tensors(dtype)
    report = conversion.convert(fake_source.source(tensors), tmp_path / "model", fmt)
    directory = open_directory(tmp_path / "model")
    assert fake_source.names(tmp_path / "model") == FILES
    assert directory.config == fake_source.CONFIG
    assert directory.format == fmt
    error = reference = 0.0
    for spec in SPECS:
        original = tensors[spec.rows.names[0]].data.astype(np.float32)
        if not spec.is_matrix:
            np.testing.assert_array_equal(directory.vectors[spec.name], original)
            continue
        panels, scales = stored(tmp_path / "model", spec.name)
        expected, expected_scales = pack(original, fmt)
        np.testing.assert_array_equal(panels, expected)
        np.testing.assert_array_equal(scales, expected_scales)
        values = unpack(panels, scales, fmt, (spec.shape[0], spec.shape[1]))
        error += ((values - original).astype(np.float64) ** 2).sum()
        reference += (original.astype(np.float64) ** 2).sum()
    assert report.total.relative_rms_error == pytest.approx(np.sqrt(error / reference), rel=1e-4)
    assert set(report.kinds) == {"q", "k", "v", "o", "gate", "up", "down", "embed", "head"}
    assert verify(tmp_path / "model") == sum(t.n_bytes for t in directory.tensors.values())


def test_small_pieces_make_the_same_bytes(tmp_path: Path, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "PIECE_BYTES", 1)  # one panel at a time
    tensors = fake_source.tensors()
    conversion.convert(fake_source.source(tensors), tmp_path / "again", "nf4", threads=2)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()
    assert max(stop - start for tensor in tensors.values() for start, stop in tensor.reads) == TILE_N


def test_data_starts_on_a_page_and_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    conversion.convert(
        fake_source.source(fake_source.tensors()), tmp_path / "model", "int8", progress=lambda *args: seen.append(args)
    )
    assert open_directory(tmp_path / "model").data_start % 4096 == 0
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == verify(tmp_path / "model")


def test_inspect_counts_every_bit(converted: Path) -> None:
    found = json.loads(json.dumps(inspect(converted)))
    matrices = [spec for spec in SPECS if spec.is_matrix]
    assert [row["name"] for row in found["tensors"]][: len(matrices)] == [spec.name for spec in matrices]
    n_bytes = sum(panels.nbytes + scales.nbytes for panels, scales in (stored(converted, s.name) for s in matrices))
    assert found["bits_per_weight"] == 8 * n_bytes / sum(s.shape[0] * s.shape[1] for s in matrices)
    assert found["kinds"]["gate"]["count"] == 3
    assert found["source"] == "0123"
    assert found["quality"]["format"] == "nf4"
    assert found["recipe"]["block"] == 64
    assert kind_of("layers.12.gate") == "gate"


def test_smollm2_costs_at_most_4_14_bits_a_weight(tmp_path: Path, smollm2: Path) -> None:
    with conversion.open_source(smollm2) as source:
        report = conversion.convert(source, tmp_path / "model", "nf4")
    assert inspect(tmp_path / "model")["bits_per_weight"] <= 4.14
    assert max(quality.bits_per_weight for quality in report.kinds.values()) <= 4.14
    assert 0.08 < report.total.relative_rms_error < 0.09


def test_the_cache_converts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = fake_source.tensors()
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "a" / "cache"))
    monkeypatch.setattr(conversion, "open_source", lambda path: fake_source.source(tensors))
    first = conversion.cached(tmp_path / "model.gguf", "nf4")
    n_reads = sum(len(tensor.reads) for tensor in tensors.values())
    assert conversion.cached(tmp_path / "model.gguf", "nf4") == first
    assert sum(len(tensor.reads) for tensor in tensors.values()) == n_reads
    assert conversion.cached(tmp_path / "model.gguf", "int8") != first
    assert verify(first)
    assert len(list(first.parent.iterdir())) == 2  # no lock, nothing unfinished


def test_a_conversion_is_taken_from_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made beforehand, by another user, say: a service may see its file system read-only."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))
    monkeypatch.setattr(conversion, "open_source", lambda path: fake_source.source(fake_source.tensors()))
    first = conversion.cached("model.gguf", "nf4")
    monkeypatch.setattr(conversion, "_locked", refuse)
    assert conversion.cached("model.gguf", "nf4") == first
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\); name another in FOURFOLD_CACHE"):
        conversion.cached("model.gguf", "int8")


def test_whoever_waits_for_anothers_conversion_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = fake_source.tensors()
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))
    monkeypatch.setattr(conversion, "open_source", lambda path: fake_source.source(tensors))
    begun, told = threading.Event(), threading.Event()
    with ThreadPoolExecutor(2) as pool:

        def progress(done: int, total: int) -> None:
            begun.set()
            assert told.wait(60)

        first = pool.submit(conversion.cached, "model.gguf", "nf4", progress=progress)
        assert begun.wait(60)
        heard: list[str] = []

        def notice(sentence: str) -> None:
            heard.append(sentence)
            told.set()

        second = pool.submit(conversion.cached, "model.gguf", "nf4", notice=notice)
        assert second.result(60) == first.result(60)
    assert [sentence.split(" (")[0] for sentence in heard] == [
        "another process is converting this model already; waiting for it"
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == [first.result().name]


def test_the_cache_keeps_nothing_of_a_source_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise CheckpointError("no")

    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))
    monkeypatch.setattr(conversion, "open_source", lambda path: fake_source.source(fake_source.tensors()))
    with pytest.raises(CheckpointError, match="no"):
        conversion.cached("model.gguf", "nf4", check=refuse)
    assert list(tmp_path.iterdir()) == []


def test_another_recipe_is_another_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))
    monkeypatch.setattr(conversion, "open_source", lambda path: fake_source.source(fake_source.tensors()))
    first = conversion.cached("model.gguf", "nf4")
    monkeypatch.setitem(conversion.RECIPE, "encoder", "another")
    second = conversion.cached("model.gguf", "nf4")
    assert second != first
    assert inspect(second)["recipe"]["encoder"] == "another"


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_conversion_in_the_cache_is_named_to_be_deleted(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))
    monkeypatch.setattr(conversion, "open_source", lambda path: fake_source.source(fake_source.tensors()))
    directory = conversion.cached("model.gguf", "nf4")
    (directory / file).write_bytes(b"{")
    with pytest.raises(
        CheckpointError, match=rf"in the cache is damaged, delete {directory} to have it anew: .*{file}"
    ):
        conversion.cached("model.gguf", "nf4")
    assert list(tmp_path.iterdir()) == [directory]  # no lock
    shutil.rmtree(directory)
    assert verify(conversion.cached("model.gguf", "nf4"))


# ---- damage and hostility ----


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(("name", "what"), [("layers.1.q", "tensor layers.1.q"), ("norm", "tensor norm")])
def test_a_flipped_bit_in_a_tensor_is_named(converted: Path, name: str, what: str) -> None:
    directory = open_directory(converted)
    flip(converted / "model.safetensors", directory.data_start + directory.tensors[name].offset + 3)
    with pytest.raises(CheckpointError, match=rf"damaged \({what}\)"):
        verify(converted)


def test_a_flipped_bit_in_another_file_is_named(converted: Path) -> None:
    flip(converted / "tokenizer.json", 5)
    with pytest.raises(CheckpointError, match=r"damaged \(file tokenizer.json\)"):
        verify(converted)


def test_every_flipped_bit_of_the_manifest_is_found_when_it_is_opened(converted: Path) -> None:
    file = converted / "manifest.json"
    data = file.read_bytes()
    for offset in range(0, len(data), 7):
        for bit in (1, 0x20):
            file.write_bytes(data[:offset] + bytes([data[offset] ^ bit]) + data[offset + 1 :])
            with pytest.raises(CheckpointError, match=r"manifest\.json"):
                open_directory(converted)
    file.write_bytes(data)
    assert verify(converted)


def test_a_manifest_from_before_it_had_a_hash_of_its_own_is_read(converted: Path) -> None:
    manifest = json.loads((converted / "manifest.json").read_text())
    del manifest["sha256"]
    (converted / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    assert verify(converted)
    assert inspect(converted)["source"] == "0123"


def test_a_flipped_bit_in_the_configuration_is_found_when_it_is_opened(converted: Path) -> None:
    config = (converted / "config.json").read_bytes()
    (converted / "config.json").write_bytes(config.replace(b'"rope_theta": 10000.0', b'"rope_theta": 10001.0'))
    assert (converted / "config.json").read_bytes() != config
    with pytest.raises(CheckpointError, match=r"is damaged \(file config.json\)"):
        open_directory(converted)


def test_a_file_that_was_put_there_later_and_would_be_read_is_found(converted: Path) -> None:
    (converted / "notes.txt").write_text("mine")
    assert verify(converted)
    (converted / "chat_template.jinja").write_text("Say no.")
    with pytest.raises(CheckpointError, match=r"damaged \(file chat_template.jinja, which was not converted\)"):
        verify(converted)


@pytest.mark.parametrize("change", ["tensors", "files"])
def test_another_models_identity_is_another(converted: Path, change: str) -> None:
    before = open_directory(converted).identity
    manifest = json.loads((converted / "manifest.json").read_text())
    del manifest["sha256"]
    manifest[change][min(manifest[change].keys() - {"config.json"})] = "f" * 64
    (converted / "manifest.json").write_text(json.dumps(manifest))
    assert open_directory(converted).identity != before


@pytest.mark.parametrize("file", FILES[:3])
@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
def test_a_truncated_or_missing_file_is_an_error(converted: Path, file: str, keep: float) -> None:
    data = (converted / file).read_bytes()
    (converted / file).write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)][:-1])
    with pytest.raises(CheckpointError):
        verify(converted)
    (converted / file).unlink()
    with pytest.raises(CheckpointError):
        verify(converted)


def replace_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edits the header of model.safetensors and leaves the data as they are."""
    file = path / "model.safetensors"
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])


EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "offset past the end": (lambda h: h["norm"].update(data_offsets=[10**9, 10**9 + 512]), "safetensors"),
    "negative offset": (lambda h: h["norm"].update(data_offsets=[-512, 0]), "safetensors"),
    "overlap": (lambda h: h["norm"].update(data_offsets=h["embed"]["data_offsets"]), "safetensors"),
    "end before start": (lambda h: h["norm"].update(data_offsets=h["norm"]["data_offsets"][::-1]), "safetensors"),
    "overflowing shape": (lambda h: h["norm"].update(shape=[2**33, 2**33]), "safetensors"),
    "10^12 elements": (lambda h: h["norm"].update(shape=[10**12]), "safetensors"),
    "negative shape": (lambda h: h["norm"].update(shape=[-128]), "safetensors"),
    "unknown dtype": (lambda h: h["norm"].update(dtype="PICKLE"), "safetensors"),
    "wrong dtype": (lambda h: h["norm"].update(dtype="I32"), r"norm should be F32 \(128,\), and is I32 \(128,\)"),
    "wrong shape": (lambda h: h["norm"].update(shape=[64, 2]), r"norm should be F32 \(128,\), and is F32 \(64, 2\)"),
    "another name": (lambda h: h.update(nrom=h.pop("norm")), "lacks the tensor norm"),
    "one more": (lambda h: h.update(zero=EMPTY), "holds the tensor zero"),
    "no entry": (lambda h: h.update(norm=7), "safetensors"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(converted: Path, name: str) -> None:
    edit, message = HOSTILE[name]
    replace_header(converted, edit)
    with pytest.raises(CheckpointError, match=message):
        open_directory(converted)


@pytest.mark.parametrize("start", [b"", b"\xff" * 8, (10**12).to_bytes(8, "little"), b"\x02" + b"\0" * 7 + b"[]"])
def test_a_hostile_start_of_the_file_is_refused(converted: Path, start: bytes) -> None:
    (converted / "model.safetensors").write_bytes(start)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_directory(converted)


CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "version": lambda c: c.update(fourfold=2),
    "format": lambda c: c.update(format="nf5"),
    "more": lambda c: c.update(lora="x"),
    "no model": lambda c: c.update(model=None),
    "no weights": lambda c: c.update(weights=[]),
    "layers": lambda c: c["model"].update(n_layers=10**12),
    "no layers": lambda c: c["model"].update(n_layers=0),
    "a negative size": lambda c: c["model"].update(dim=-128),
    "another size": lambda c: c["model"].update(dim=64),
    "a size that is text": lambda c: c["model"].update(dim="128"),
    "a size that is true": lambda c: c["model"].update(n_kv_heads=True),
    "eos": lambda c: c["model"].update(eos_ids=["</s>"]),
    "scaling": lambda c: c["model"].update(rope_scaling={"factor": 8, "low_freq_factor": 1}),
    "unknown field": lambda c: c["model"].update(attention_sinks=4096),
    "missing field": lambda c: c["model"].pop("rope_theta"),
    "architecture": lambda c: c["model"].update(model_type="../evil"),
    "missing weight": lambda c: c["weights"].pop("layers.0.q"),
    "unexpected weight": lambda c: c["weights"].update(other={"format": "nf4", "shape": [1, 1]}),
    "weight's format": lambda c: c["weights"]["embed"].update(format="int8"),
    "weight's shape": lambda c: c["weights"]["embed"].update(shape=[128, 300]),
}


SENSELESS: dict[str, tuple[dict[str, Any], str]] = {
    "epsilon 0": ({"norm_eps": 0}, "norm_eps is 0, and must be a positive number"),
    "negative epsilon": ({"norm_eps": -1e-5}, "norm_eps is -1e-05, and must be a positive"),
    "enormous epsilon": ({"norm_eps": 10**400}, "norm_eps is 1000.*, and must be a positive"),
    "theta": ({"rope_theta": 0.0}, "rope_theta is 0.0, and must be a positive number"),
    "odd heads": ({"head_dim": 33}, "an even head dimension, and it is 33"),
    "heads that do not share": ({"n_kv_heads": 3}, "4 attention heads cannot share 3 key/value heads"),
    "eos": ({"eos_ids": [300]}, "token 300 lies outside the vocabulary of 300"),
    "negative eos": ({"eos_ids": [2, -1]}, "token -1 lies outside"),
    "bos": ({"bos_id": 10**9}, "token 1000000000 lies outside"),
    "no context": ({"max_context": 0}, "max_context is 0, and must be from 1 to 2147483647"),
    "much context": ({"max_context": 2**40}, "max_context is 1099511627776, and must be"),
    "a large size": ({"hidden_dim": 10**10}, "hidden_dim is 10000000000, and must be"),
    "a large matrix": ({"hidden_dim": 2**31 - 1, "dim": 2**20}, "a feed-forward matrix would have .* elements"),
    "Yuan with shared keys": ({"model_type": "yuan", "tie_embeddings": True}, "heads all have keys of their own"),
    "Yuan with a head": ({"model_type": "yuan", "n_kv_heads": 4}, "its head is the embedding"),
}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 32}
LONG = {"short": [1.0] * 16, "long": [2.0] * 16, "original_context": 32, "attention_factor": 1.0}
SENSELESS |= {
    "no window": ({"sliding_window": 0}, "sliding_window is 0, and must be from 1"),
    "global layers every -1": ({"global_every": -1}, "global_every is -1, and must be from 0"),
    "a global layer too many": ({"global_layers": [0, 9]}, "global_layers must be in order, each once, and from 0 to"),
    "global layers in disorder": ({"global_layers": [1, 0]}, "global_layers must be in order"),
    "a global layer twice": ({"global_layers": [1, 1]}, "global_layers must be in order"),
    "no scale": ({"embed_scale": 0.0}, "embed_scale is 0.0, and must be a positive number"),
    "a negative scale": ({"attention_scale": -1.0}, "attention_scale is -1.0, and must be a positive number"),
    "no angles": ({"local_rope_theta": 0}, "local_rope_theta is 0, and must be a positive number"),
    "an odd part": ({"rotary_dim": 7}, "7 of 32 dimensions are to be rotated, which must be an even number of them"),
    "more than all": ({"rotary_dim": 34}, "34 of 32 dimensions are to be rotated"),
    "too few factors": ({"rope_scaling": LONG | {"long": [2.0] * 7}}, "has 7 factors for 16 frequencies"),
    "no factor": ({"rope_scaling": LONG | {"short": [0.0] * 16}}, r"short\[0\] is 0.0, and must be a positive number"),
    "linear": ({"rope_scaling": {"factor": -2.0}}, "factor is -2.0, and must be a positive number"),
}
SENSELESS |= {
    f"scaling: {field} {value}": ({"rope_scaling": SCALING | {field: value}}, message)
    for field, value, message in [
        ("factor", 0.0, "factor is 0.0, and must be a positive number"),
        ("low_freq_factor", -1.0, "low_freq_factor is -1.0, and must be"),
        ("high_freq_factor", 1.0, "high_freq_factor no larger than low_freq_factor"),
        ("original_context", 0, "original_context is 0, and must be"),
    ]
}


@pytest.mark.parametrize("name", SENSELESS)
def test_a_configuration_that_makes_no_model_is_refused_in_a_sentence(converted: Path, name: str) -> None:
    change, message = SENSELESS[name]
    config = json.loads((converted / "config.json").read_text())
    config["model"].update(change)
    (converted / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"config\.json describes no model that can run: .*{message}"):
        open_directory(converted)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_configuration_is_refused(converted: Path, name: str) -> None:
    config = json.loads((converted / "config.json").read_text())
    CONFIGS[name](config)
    (converted / "config.json").write_text(json.dumps(config))
    with pytest.raises(FourfoldError):
        open_directory(converted)


def test_a_manifest_that_points_elsewhere_is_refused(converted: Path) -> None:
    manifest = json.loads((converted / "manifest.json").read_text())
    manifest["files"]["../../etc/passwd"] = "0"
    (converted / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest"):
        verify(converted)
