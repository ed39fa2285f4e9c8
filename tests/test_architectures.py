"""Every architecture's logits against Transformers' own, for every cut and instruction set; from GGUF too, and quantized.

The logits lie in tests/goldens, with the script that computes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fourfold._core as _core
import numpy as np
import pytest

import tiny
from fourfold.checkpoint import open_source
from fourfold.conversion import convert
from fourfold.engine import Engine
from goldens import models

ISAS = _core.read_machine().isas()
TOLERANCE = 1e-3


def golden(model: str, length: int) -> Any:
    """Logits (T, vocabulary) of weights that are the same here as there."""
    with np.load(models.logits_file(model, length)) as found:
        assert str(found["weights"]) == models.fingerprint(models.weights(model)), "numpy draws other numbers now"
        return found["logits"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, format) -> its fourfold directory, converted once."""
    root, made = tmp_path_factory.mktemp("architectures"), {}

    def directory(model: str, fmt: str) -> Path:
        if (model, fmt) not in made:
            source = tiny.write_huggingface(root / model, models.CONFIGS[model], models.weights(model))
            with open_source(source) as opened:
                convert(opened, path := root / f"{model}-{fmt}", fmt)
            made[model, fmt] = path
        return made[model, fmt]

    return directory


def steps(engine: Engine, ids: list[int]) -> Any:
    """Logits of ids that are fed one by one."""
    sequence = engine.new_sequence()
    out = np.stack([engine.extend(sequence, [i]) for i in ids])
    engine.free(sequence)
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("model", "length"), models.texts())
def test_logits_are_those_of_transformers(
    directory: Any, monkeypatch: pytest.MonkeyPatch, model: str, length: int, ranks: int, isa: str
) -> None:
    monkeypatch.setenv("FOURFOLD_ISA", isa)
    ids, expected = models.ids(model, length), golden(model, length)
    context = None if length <= models.CONFIGS[model].get("original_max_position_embeddings", length) else 256
    engine = Engine(directory(model, "f32"), ranks=ranks, context=context)
    assert np.abs(engine.logits(ids) - expected).max() <= TOLERANCE
    assert np.abs(steps(engine, ids) - expected).max() <= TOLERANCE
