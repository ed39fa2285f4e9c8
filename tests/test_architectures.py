"""Architectures' logits against Transformers' own, for every cut and instruction set; from GGUF too, and quantized.

The logits lie in tests/goldens, with the script that computes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

import fourfold._core as _core
import reference
import tiny
from fourfold.checkpoint import check_complete, open_source
from fourfold.checkpoint.fourfold_dir import open_directory
from fourfold.config import LongRope, ModelConfig
from fourfold.conversion import convert
from fourfold.engine import Engine
from fourfold.errors import CheckpointError, UnsupportedError
from fourfold.models import weight_specs
from goldens import models
from test_tiny_models import unpacked

ISAS = _core.read_machine().isas()
TOLERANCE = 1e-3
# Each text over every number of ranks and on every instruction set; all texts together over every pair of them.
CUTS = [
    (*text, ranks, ISAS[(i + ranks) % len(ISAS)]) for i, text in enumerate(models.texts()) for ranks in (1, 2, 3, 4)
]


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


@pytest.mark.parametrize(("model", "length", "ranks", "isa"), CUTS)
def test_logits_are_those_of_transformers(
    directory: Any, monkeypatch: pytest.MonkeyPatch, model: str, length: int, ranks: int, isa: str
) -> None:
    monkeypatch.setenv("FOURFOLD_ISA", isa)
    ids, expected = models.ids(model, length), golden(model, length)
    context = None if length <= models.CONFIGS[model].get("original_max_position_embeddings", length) else 256
    engine = Engine(directory(model, "f32"), ranks=ranks, context=context)
    assert np.abs(engine.logits(ids) - expected).max() <= TOLERANCE
    assert np.abs(steps(engine, ids) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_window_that_moves_over_pages_and_chunks(directory: Any, ranks: int) -> None:
    """400 positions of 512, of which attention takes 256 at a time: local layers see 20 of them, a global one all."""
    path, ids = directory("gemma3", "f32"), np.random.default_rng(5).integers(0, 96, 400).tolist()
    engine = Engine(path, ranks=ranks)
    expected = reference.forward(engine.config, models.weights("gemma3"), ids)
    assert np.abs(engine.logits(ids) - expected).max() <= TOLERANCE
    sequence = engine.new_sequence()
    engine.extend(sequence, ids[:240])
    for i in range(240, 400, 4):  # few rows, whose chunks the threads divide
        assert np.abs(engine.extend(sequence, ids[i : i + 4]) - expected[i + 3]).max() <= TOLERANCE


def test_a_model_with_factors_for_long_texts_takes_them_where_they_are_asked_for(directory: Any) -> None:
    path, ids = directory("phi3-long", "f32"), models.ids("phi3-long", 60)
    short, long = Engine(path), Engine(path, context=65)
    assert short.context == 64
    assert np.abs(short.logits(ids) - golden("phi3-long", 60)).max() <= TOLERANCE
    assert np.abs(long.logits(ids) - golden("phi3-long", 60)).max() > 0.1


# ---- quantized, and elsewhere than in memory


def distance(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("fmt", ["nf4", "int4", "fp4", "int8"])
@pytest.mark.parametrize("model", models.CONFIGS)
def test_a_quantized_model_is_the_reference_on_its_unpacked_weights(directory: Any, model: str, fmt: str) -> None:
    """But for at most 8 roundings to bfloat16 a layer: keys, values, queries, weights and what linears read."""
    path, ids = directory(model, fmt), models.ids(model, 60)
    engine = Engine(path, ranks=2, context=64)
    expected = reference.forward(engine.config, unpacked(open_directory(path)), ids)
    allowed = engine.config.n_layers * 8 * 2**-9
    assert distance(engine.logits(ids), expected) <= allowed
    assert distance(steps(engine, ids), expected) <= allowed


@pytest.mark.parametrize("model", models.CONFIGS)
def test_a_cache_of_int8_and_weights_on_disk(directory: Any, model: str) -> None:
    path, ids = directory(model, "f32"), models.ids(model, 60)
    exact = Engine(path, context=64).logits(ids)
    assert 0 < distance(Engine(path, ranks=2, context=64, kv="int8").logits(ids), exact) <= 0.02
    for ranks in (1, 3):
        in_memory, on_disk = (Engine(path, ranks=ranks, context=64, weights=where) for where in ("memory", "disk"))
        assert on_disk.describe()["disk"]["bytes_per_step"] > 0
        assert (on_disk.logits(ids) == in_memory.logits(ids)).all()
        assert (steps(on_disk, ids[:20]) == steps(in_memory, ids[:20])).all()


# ---- from GGUF

# What GGUF says of each model beside what every architecture does; Gemma's scale of the scores it cannot say.
GGUF: dict[str, dict[str, Any]] = {
    "qwen3": {"qwen3.attention.key_length": 64, "qwen3.attention.value_length": 64, "qwen3.rope.freq_base": 1e6},
    "mistral": {"llama.attention.sliding_window": 24, "llama.rope.dimension_count": 32},
    "phi3": {
        "phi3.attention.sliding_window": 31,
        "phi3.rope.dimension_count": 64,
        "phi3.rope.scaling.original_context_length": 256,
    },
    "phi3-long": {
        "phi3.attention.sliding_window": 0,
        "phi3.rope.dimension_count": 48,
        "phi3.rope.scaling.original_context_length": 64,
        "phi3.rope.scaling.attn_factor": float(np.sqrt(1 + np.log(4) / np.log(64))),
    },
    "gemma3": {
        "gemma3.attention.key_length": 64,
        "gemma3.attention.value_length": 64,
        "gemma3.attention.sliding_window": 20,
        "gemma3.attention.sliding_window_pattern": 3,
        "gemma3.rope.freq_base": 1e5,
        "gemma3.rope.freq_base_swa": 1e3,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    },
}
NO_TOKENIZER = {"tokenizer.ggml.model": None, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}


def write_gguf(path: Path, model: str, kind: str = "F32", **changes: Any) -> Path:
    """One of the models, with changes to its metadata."""
    config, tensors = models.CONFIGS[model], models.weights(model)
    if factors := config.get("rope_scaling"):
        for name in ("short", "long"):
            tensors[f"rope_factors_{name}.weight"] = np.array(factors[f"{name}_factor"], np.float32)
    metadata = NO_TOKENIZER | GGUF[model] | changes
    return tiny.write_gguf(path, config, tensors, metadata=metadata, kind=GGMLQuantizationType[kind])


def config_of(path: Path) -> ModelConfig:
    with open_source(path) as source:
        check_complete(weight_specs(source.config), source)
        return source.config


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("model", GGUF)
def test_a_gguf_file_has_the_logits_of_the_directory_with_its_weights(tmp_path: Path, model: str, kind: str) -> None:
    def as_stored(weight: Any) -> Any:
        if kind == "F32" or weight.ndim == 1 or weight.shape[1] % 32:
            return weight
        return dequantize(quantize(weight, GGMLQuantizationType[kind]), GGMLQuantizationType[kind])

    config = models.CONFIGS[model] | ({"query_pre_attn_scalar": 64} if model == "gemma3" else {})
    stored = {name: as_stored(weight) for name, weight in models.weights(model).items()}
    logits = []
    for source in (
        write_gguf(tmp_path / "model.gguf", model, kind),
        tiny.write_huggingface(tmp_path / "source", config, stored),
    ):
        with open_source(source) as opened:
            convert(opened, tmp_path / f"{source.name}-f32", "f32")
        logits.append(Engine(tmp_path / f"{source.name}-f32", context=64).logits(models.ids(model, 60)))
    close = {"qwen3": 0, "mistral": 0, "phi3": 0}.get(model, 1e-5)  # factors and norms in GGUF are rounded to float32
    assert np.abs(logits[0] - logits[1]).max() <= close


def test_what_gguf_leaves_out_of_gemma3_is_as_published(tmp_path: Path) -> None:
    silent = {f"gemma3.{key}": None for key in (
        "attention.sliding_window_pattern", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.type",
        "rope.scaling.factor",
    )}  # fmt: skip
    path = write_gguf(tmp_path / "model.gguf", "gemma3", **silent)
    config = config_of(path)
    assert (config.global_every, config.rope_theta, config.local_rope_theta) == (6, 1e6, 1e4)
    assert (config.rope_scaling, config.attention_scale) == (None, 1 / 8)
    assert config.embed_scale == float(np.float32(np.sqrt(160)))
    assert [config.window(i) for i in range(7)] == [20] * 5 + [None, 20]
    with open_source(write_gguf(path, "gemma3", **{"gemma3.block_count": 62})) as source:
        assert source.config.attention_scale == 32**-0.5  # the 27B's: the width, 160, over 5 heads


def test_phi3_in_gguf_has_a_window_or_none_and_factors_in_pairs(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert config_of(write_gguf(path, "phi3")).sliding_window == 31
    long = config_of(write_gguf(path, "phi3-long"))
    assert (long.sliding_window, long.rotary_dim) == (None, 48)
    assert isinstance(long.rope_scaling, LongRope)
    assert long.rope_scaling.original_context == 64
    assert long.rope_scaling.attention_factor == pytest.approx(np.sqrt(1 + np.log(4) / np.log(64)))
    for model, name, error, named in (
        ("phi3", "rope_factors_long.weight", UnsupportedError, r"the tensor rope_factors_long\.weight"),
        ("qwen3", "rope_factors_short.weight", UnsupportedError, r"the tensor rope_factors_short\.weight"),
        ("phi3", "rope_freqs.weight", UnsupportedError, r"the tensor rope_freqs\.weight"),
        ("gemma3", "rope_freqs.weight", UnsupportedError, r"the tensor rope_freqs\.weight"),
        ("phi3", "blk.0.attn_q.weight", CheckpointError, r"holds the tensor .*q_proj"),
    ):
        tensors = models.weights(model) | {name: np.ones(32, np.float32)}
        tiny.write_gguf(path, models.CONFIGS[model], tensors, metadata=NO_TOKENIZER | GGUF[model])
        with pytest.raises(error, match=named):
            config_of(path)


def test_a_llama_in_gguf_that_has_a_window_is_a_mistral(tmp_path: Path) -> None:
    config = config_of(write_gguf(tmp_path / "model.gguf", "mistral"))
    assert (config.model_type, config.sliding_window, config.global_every) == ("mistral", 24, 0)
    without = write_gguf(tmp_path / "model.gguf", "mistral", **{"llama.attention.sliding_window": None})
    assert config_of(without).model_type == "llama"


def test_a_llama_in_gguf_of_the_shape_of_mistrals_first_version_says_that_its_window_is_not_there(
    tmp_path: Path,
) -> None:
    """By its metadata: no tensor here has that shape."""

    def notes(**changes: Any) -> tuple[str, ...]:
        silent: dict[str, Any] = {"llama.attention.sliding_window": None, "llama.rope.dimension_count": 128}
        shape = {"block_count": 32, "context_length": 32768, "embedding_length": 4096, "feed_forward_length": 14336,
                 "attention.head_count": 32, "attention.head_count_kv": 8, "rope.freq_base": 10000.0}  # fmt: skip
        metadata = silent | {f"llama.{key}": value for key, value in shape.items()} | changes
        with open_source(write_gguf(tmp_path / "model.gguf", "mistral", **metadata)) as source:
            return source.notes

    (said,) = notes()
    assert "has the shape of Mistral 7B v0.1, whose layers see 4096 positions; it does not say so" in said
    assert notes(**{"llama.rope.freq_base": 1e6}) == ()  # v0.2 and v0.3 have no window
    assert notes(**{"llama.attention.sliding_window": 4096}) == ()


@pytest.mark.parametrize(
    ("model", "metadata", "named"),
    [
        ("gemma3", {"gemma3.final_logit_softcapping": 30.0}, "final_logit_softcapping: fourfold caps neither"),
        ("gemma3", {"gemma3.rope.scaling.type": "yarn"}, r"rope\.scaling\.type to 'yarn'"),
        ("qwen3", {"qwen3.attention.sliding_window": 24}, r"attention\.sliding_window"),
        ("phi3", {"phi3.rope.scaling.type": "yarn"}, r"rope\.scaling\.type to 'yarn'"),
    ],
)
def test_what_changes_the_result_is_refused_by_name(
    tmp_path: Path, model: str, metadata: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedError, match=named):
        config_of(write_gguf(tmp_path / "model.gguf", model, **metadata))
