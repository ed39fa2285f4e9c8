"""benchmarks/transformers_bnb.py: the models that it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

import transformers_bnb


def test_a_model_is_kept_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(model: str, directory: Path) -> None:
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        if fails:
            raise OSError("no space left on device")
        (directory / "model.safetensors").write_text("weights")

    monkeypatch.setattr(transformers_bnb, "_make", make)
    fails = True
    with pytest.raises(OSError, match="no space left"):
        transformers_bnb._directory("llama-1b", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    fails = False
    directory = transformers_bnb._directory("llama-1b", tmp_path / "cache")
    assert (directory / "model.safetensors").read_text() == "weights"
    monkeypatch.setattr(transformers_bnb, "_make", None)
    assert transformers_bnb._directory("llama-1b", tmp_path / "cache") == directory
