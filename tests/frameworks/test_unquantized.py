"""benchmarks/unquantized.py: the models that it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

import unquantized


def test_a_model_is_kept_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(model: str, directory: Path) -> None:
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        if fails:
            raise OSError("no space left on device")
        (directory / "model.safetensors").write_text("weights")

    monkeypatch.setattr(unquantized, "_make", make)
    fails = True
    with pytest.raises(OSError, match="no space left"):
        unquantized.directory("llama-1b", tmp_path / "cache")
    assert list((tmp_path / "cache" / "transformers").iterdir()) == []
    fails = False
    directory = unquantized.directory("llama-1b", tmp_path / "cache")
    assert (directory / "model.safetensors").read_text() == "weights"
    monkeypatch.setattr(unquantized, "_make", None)
    assert unquantized.directory("llama-1b", tmp_path / "cache") == directory
