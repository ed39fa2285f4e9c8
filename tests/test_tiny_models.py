"""Small random models of every architecture against the float64 reference: no data from elsewhere is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fourfold._core as _core
import reference
import tiny
from fourfold.checkpoint import open_source
from fourfold.checkpoint.fourfold_dir import FourfoldDirectory, open_directory
from fourfold.conversion import convert
from fourfold.engine import Engine
from fourfold.format import n_panels, unpack
from fourfold.models import weight_specs
from fourfold.models.rows import HeadPairs, PlusOne, Slice, TimeConv
from goldens import models as goldens

Tensors = dict[str, NDArray[Any]]

# Six query heads share two key/value heads, so that two ranks of three need the same one; the feed-forward is ragged.
HEADS = {"hidden_size": 192, "intermediate_size": 200, "num_attention_heads": 6}
CONFIGS = {"llama": tiny.CONFIG | HEADS, "qwen2": tiny.QWEN2 | HEADS, "yuan": tiny.YUAN} | goldens.CONFIGS
IDS = np.random.default_rng(2).integers(0, 96, 90).tolist()  # two KV pages
N_STEPS = 70


@pytest.fixture(scope="module", params=CONFIGS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """A Hugging Face directory and what is in it."""
    config = CONFIGS[request.param]
    tensors = tiny.balanced(config)
    return tiny.write_huggingface(tmp_path_factory.mktemp(request.param) / "source", config, tensors), tensors


def converted(source: Path, fmt: str) -> Path:
    path = source.with_name(fmt)
    if not path.exists():
        with open_source(source) as opened:
            convert(opened, path, fmt)
    return path


def steps(engine: Engine, ids: list[int]) -> NDArray[np.float32]:
    """Logits of ids that are fed one by one."""
    sequence = engine.new_sequence()
    out = np.stack([engine.extend(sequence, [i]) for i in ids])
    engine.free(sequence)
    return out


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_model_in_f32_is_the_reference(source: tuple[Path, Tensors], ranks: int) -> None:
    path, tensors = source
    engine = Engine(converted(path, "f32"), ranks=ranks, context=len(IDS))
    expected = reference.forward(engine.config, tensors, IDS)
    tolerance = 1e-3 * np.abs(expected).max()
    assert np.abs(engine.logits(IDS) - expected).max() <= tolerance
    assert np.abs(steps(engine, IDS[:N_STEPS]) - expected[:N_STEPS]).max() <= tolerance


def test_the_reference_notices_each_tensor(source: tuple[Path, Tensors]) -> None:
    """No tensor is of so little weight here that a wrong one would go unseen."""
    path, tensors = source
    config, ids = open_directory(converted(path, "f32")).config, IDS[:40]  # longer than a window
    expected = reference.forward(config, tensors, ids)
    for name in tensors:
        changed = reference.forward(config, tensors | {name: tensors[name][::-1]}, ids)
        assert np.abs(changed - expected).max() > 1e-2 * np.abs(expected).max(), name


def test_a_model_in_nf4_is_the_reference_on_its_unpacked_weights(source: tuple[Path, Tensors]) -> None:
    """The row that decodes to float32 leaves float32's own rounding alone: 1e-5 of the largest logit."""
    path, _ = source
    directory = converted(path, "nf4")
    isa = next(isa for isa in ("avx512", "avx2", "scalar") if isa in _core.read_machine().isas())
    engine = Engine(directory, ranks=2, kv="f32", kernel=f"linear_nf4_f32_{isa}", context=len(IDS))
    expected = reference.forward(engine.config, unpacked(open_directory(directory)), IDS)
    tolerance = 1e-5 * np.abs(expected).max()
    assert np.abs(engine.logits(IDS) - expected).max() <= tolerance
    assert np.abs(steps(engine, IDS[:N_STEPS]) - expected[:N_STEPS]).max() <= tolerance


def unpacked(directory: FourfoldDirectory) -> Tensors:
    """What a conversion holds, by Hugging Face's names and in their order: `convert` undone in numpy."""
    specs, tensors = weight_specs(directory.config), Tensors()
    values = {spec.name: _values(directory, spec.name) for spec in specs}
    for spec in specs:
        rows, w = spec.rows, values[spec.name]
        if isinstance(rows, TimeConv):
            tensors[rows.name] = np.stack([w[:, : rows.c], w[:, rows.c :]], axis=2)[..., None]
        elif isinstance(rows, HeadPairs):
            stacked = tensors.setdefault("pairs", np.empty((2 * rows.n_heads, rows.head_dim, rows.k), np.float32))
            stacked[rows.which :: 2] = w.reshape(rows.n_heads, rows.head_dim, rows.k)
            if rows.which == 1:
                both = tensors.pop("pairs").reshape(-1, rows.k)
                tensors[rows.first], tensors[rows.second] = np.split(both, 2)
        elif isinstance(rows, Slice):
            tensors.setdefault(rows.name, np.empty(rows.shape, np.float32))[rows.begin : rows.begin + len(w)] = w
        elif isinstance(rows, PlusOne):
            tensors[rows.name] = w - 1
        else:
            (name,) = rows.names
            tensors[name] = w
    return tensors


def _values(directory: FourfoldDirectory, name: str) -> NDArray[Any]:
    if name in directory.vectors:
        return directory.vectors[name]
    weight, file = directory.weights[name], directory.weights_path
    count = n_panels(weight.shape[0])
    panels = np.fromfile(file, np.uint8, weight.data_bytes, offset=weight.data_offset).reshape(count, -1)
    scales = None
    if weight.scale_offset is not None:
        scales = np.fromfile(file, np.float32, count, offset=weight.scale_offset)
    return unpack(panels, scales, weight.format, weight.shape)
