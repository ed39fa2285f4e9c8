"""Whole models in float32, the exact path: against other people's logits, for every cut and every instruction set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import fourfold._core as _core
import fourfold.engine
import reference
from fourfold.checkpoint.fourfold_dir import open_directory
from fourfold.engine import MAX_SEQUENCES, Engine, Feed
from fourfold.errors import ResourceError, RuntimeFailure, UnsupportedError, UserError
from threads import allowed_cpus, eventually

ISAS = _core.read_machine().isas()
GOLDENS = {"yuan-d64": "f32", "yuan-d128-bf16angles": "bf16"}  # and the precision of their rotary angles
# Every cut on every instruction set; each golden meets every one of both.
CUTS = [([*GOLDENS][(i + ranks) % 2], ranks, isa) for i, isa in enumerate(ISAS) for ranks in (1, 2, 3, 4)]
Converted = Callable[[Path, str], Path]
Logits = NDArray[np.float32]


def fed(engine: Engine, ids: list[int], sizes: list[int]) -> list[Logits]:
    """Logits after each piece of a text that is fed in pieces of these sizes, the rest in pieces of the last size."""
    sequence, at, out = engine.new_sequence(), 0, []
    while at < len(ids):
        size = sizes[min(len(out), len(sizes) - 1)]
        out.append(engine.extend(sequence, ids[at : at + size]))
        at += size
    engine.free(sequence)
    return out


# ---- against the references


@pytest.mark.parametrize(("golden", "ranks", "isa"), CUTS)
def test_yuan_is_within_a_thousandth_of_the_published_code(
    shared: Path, converted: Converted, monkeypatch: pytest.MonkeyPatch, golden: str, ranks: int, isa: str
) -> None:
    monkeypatch.setenv("FOURFOLD_ISA", isa)
    source = shared / "golden" / golden
    expected = load_file(source / "logits.safetensors")
    ids = expected["tokens"].tolist()
    engine = Engine(converted(source, "f32"), ranks=ranks, rope_angles=GOLDENS[golden])
    assert engine.describe()["isa"] == isa
    assert np.abs(engine.logits(ids) - expected["prefill"]).max() <= 1e-3
    n_steps = 40 if isa == "scalar" else len(ids)  # the scalar kernels take their time
    steps = fed(engine, ids[:n_steps], [1])
    assert np.abs(np.stack(steps) - expected["decode"][:n_steps]).max() <= 1e-3


OF_MANY = [row for row in _core.attend_kernels() if row["m_min"] > min(1, row["m_max"])]  # emulated ones too


@pytest.mark.parametrize("row", OF_MANY, ids=lambda row: row["name"])
@pytest.mark.parametrize("golden", GOLDENS)
def test_attention_for_many_rows_is_as_near_to_the_published_code_as_that_by_definition(
    shared: Path, converted: Converted, golden: str, row: dict[str, Any]
) -> None:
    """The errors are the KV cache's own; rounding queries and weights as well adds less than a seventh."""
    if row["isa"] not in ISAS:
        pytest.skip(f"{row['name']} needs {row['isa']}")
    source = shared / "golden" / golden
    expected = load_file(source / "logits.safetensors")
    ids = expected["tokens"].tolist()

    def miss(kernel: str) -> float:
        engine = Engine(converted(source, "f32"), ranks=2, rope_angles=GOLDENS[golden], kv=row["kv"], attend=kernel)
        rows = engine.step([Feed(engine.new_sequence(), ids, len(ids))], tokens="many", outputs="many")
        return float(np.abs(rows - expected["prefill"]).mean())

    by_definition = miss(f"attend_{row['kv']}_scalar")
    assert 0 < miss(row["name"]) < by_definition * 8 / 7
    assert by_definition < 0.01 * expected["prefill"].std()


def test_the_precision_of_the_rotary_angles_matters(shared: Path, converted: Converted) -> None:
    source = shared / "golden" / "yuan-d128-bf16angles"
    expected = load_file(source / "logits.safetensors")
    logits = Engine(converted(source, "f32"), rope_angles="f32").logits(expected["tokens"].tolist())
    assert np.abs(logits - expected["prefill"]).max() > 1


@pytest.mark.parametrize(
    ("model", "ranks"),
    [("stories260K", 1), *(("stories15M", ranks) for ranks in (1, 2)), *(("smollm2", ranks) for ranks in (1, 2, 3, 4))],
)
def test_llama_thinks_as_its_reference_does(
    shared: Path, converted: Converted, request: pytest.FixtureRequest, model: str, ranks: int
) -> None:
    source = request.getfixturevalue("smollm2") if model == "smollm2" else shared / model
    engine = Engine(converted(source, "f32"), ranks=ranks)
    ids, expected = np.load(shared / model / "ref_ids.npy").tolist(), np.load(shared / model / "ref_logits.npy")
    logits = engine.logits(ids)
    assert (logits.argmax(axis=1) == expected.argmax(axis=1)).all()
    assert np.linalg.norm(logits - expected) <= 1e-4 * np.linalg.norm(expected)


# ---- what cannot be done


@pytest.fixture
def tiny(shared: Path, converted: Converted) -> Iterator[Engine]:
    engine = Engine(converted(shared / "stories260K", "f32"), context=100)
    yield engine
    engine.check_integrity()


def test_a_text_longer_than_the_context_is_refused_and_changes_nothing(tiny: Engine) -> None:
    sequence = tiny.new_sequence()
    last = tiny.extend(sequence, [1] * 100)
    for ids in ([1], [1] * 1000):
        with pytest.raises(UserError, match=f"{100 + len(ids)} tokens do not fit the context of 100"):
            tiny.extend(sequence, ids)
    assert sequence.length == 100
    assert (fed(tiny, [1] * 100, [100])[0] == last).all()
    with pytest.raises(UserError, match="101 tokens do not fit"):
        tiny.logits([1] * 101)


@pytest.mark.parametrize("ids", [[], [-1], [1, 512], [2**31 - 1], [2**40]])
def test_ids_that_are_not_the_models_are_refused(tiny: Engine, ids: list[int]) -> None:
    with pytest.raises(UserError, match="ids must be at least one, and all from 0 to 511"):
        tiny.logits(ids)


def test_one_text_too_many_is_refused_until_another_ends(tiny: Engine) -> None:
    sequences = [tiny.new_sequence() for _ in range(MAX_SEQUENCES)]
    for call in (tiny.new_sequence, lambda: tiny.logits([1])):
        with pytest.raises(ResourceError, match=f"{MAX_SEQUENCES} texts are under way already"):
            call()
    tiny.free(sequences[0])
    tiny.free(sequences[0])
    assert tiny.logits([1]).shape == (1, 512)


def test_memory_that_does_not_suffice_is_said_before_loading(
    shared: Path, converted: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = dataclasses.replace(fourfold.engine.read_machine(), available_bytes=50_000_000)
    monkeypatch.setattr(fourfold.engine, "read_machine", lambda: machine)
    directory = converted(shared / "stories15M", "f32")
    monkeypatch.setattr(_core, "Team", lambda *_: pytest.fail("threads were started"))
    with pytest.raises(
        ResourceError,
        match=r"needs 0\.08 GB \(0\.07 GB of weights, .* for one text of 256 positions\) and 0\.05 GB are free",
    ):
        Engine(directory)


def test_a_context_or_a_number_of_ranks_that_cannot_be_is_refused(shared: Path, converted: Converted) -> None:
    directory = converted(shared / "stories260K", "f32")
    for context in (0, 513):
        with pytest.raises(UserError, match=f"a context of {context} is not possible: .* 1 to 512 positions"):
            Engine(directory, context=context)
    with pytest.raises(UnsupportedError, match="use --ranks 1 or fewer"):
        Engine(directory, ranks=2)


def test_a_rank_that_stalls_is_a_failure_and_no_hang(shared: Path, converted: Converted) -> None:
    engine = Engine(converted(shared / "golden" / "yuan-d64", "f32"), ranks=2, timeout_seconds=0.5)
    engine.logits([1, 2, 3])
    engine._team.stall_next(1, 0, 2.5)
    with pytest.raises(RuntimeFailure, match="rank 1, thread 0 did not arrive"):
        engine.logits([1, 2, 3])
    with pytest.raises(RuntimeFailure, match="the team is broken"):
        engine.logits([1, 2, 3])
    engine.check_integrity()


def test_a_closed_engine_has_no_threads(tiny: Engine) -> None:
    n_before, n_ours = len(allowed_cpus()), sum(len(rank.cpus) for rank in tiny.plan)
    tiny.close()
    assert eventually(lambda: len(allowed_cpus()) <= n_before - n_ours)
    tiny.close()


# ---- texts in pieces


@pytest.fixture(scope="module")
def long_yuan(shared: Path, converted: Converted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first golden's weights with a context of 1500."""
    source, there = shared / "golden" / "yuan-d64", tmp_path_factory.mktemp("yuan") / "long-yuan"
    there.mkdir()
    fields = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 1500}
    (there / "config.json").write_text(json.dumps(fields))
    (there / "model.safetensors").symlink_to(source / "model.safetensors")
    return converted(there, "f32")


@pytest.fixture(scope="module")
def long_text(shared: Path, long_yuan: Path) -> tuple[list[int], NDArray[np.float64]]:
    """1100 ids, more than two steps' worth, and their logits by the float64 reference."""
    ids = np.random.default_rng(0).integers(0, 512, 1100).tolist()
    tensors = load_file(shared / "golden" / "yuan-d64" / "model.safetensors")
    return ids, reference.forward(open_directory(long_yuan).config, tensors, ids)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_text_longer_than_a_step_is_the_same_text(long_yuan: Path, long_text: Any, ranks: int) -> None:
    ids, expected = long_text
    engine = Engine(long_yuan, ranks=ranks)
    assert np.abs(engine.logits(ids) - expected).max() <= 1e-3
    (last,) = fed(engine, ids, [len(ids)])
    assert np.abs(last - expected[-1]).max() <= 1e-3


@pytest.mark.parametrize("sizes", [[1], [2, 3], [63, 2, 64, 65], [511, 1, 513], [7, 600, 1]])
def test_a_text_in_pieces_of_any_size_is_the_same_text(long_yuan: Path, long_text: Any, sizes: list[int]) -> None:
    """The filter over time reaches back over the edge of a piece, and attention over the edge of a page."""
    ids, expected = long_text
    n = 150 if max(sizes) < 10 else len(ids)
    out = fed(Engine(long_yuan, ranks=2), ids[:n], sizes)
    ends = np.cumsum(sizes + [sizes[-1]] * len(out))[: len(out)].clip(max=n)
    assert np.abs(np.stack(out) - expected[ends - 1]).max() <= 1e-3


def test_texts_under_way_together_do_not_touch_each_other(long_yuan: Path, long_text: Any) -> None:
    ids, expected = long_text
    engine = Engine(long_yuan, ranks=2)
    sequences = [engine.new_sequence() for _ in range(MAX_SEQUENCES)]
    for size in (100, 1, 30, 1, 1):
        for offset, sequence in enumerate(sequences):  # each a step further into the same text
            last = engine.extend(sequence, ids[sequence.length : sequence.length + size + offset])
            assert np.abs(last - expected[sequence.length - 1]).max() <= 1e-3
    engine.check_integrity()
    engine.free(sequences[1])
    engine.free(sequences[2])
    fresh = engine.new_sequence()  # in a used slot and used pages: it begins from nothing
    assert np.abs(engine.extend(fresh, ids[:77]) - expected[76]).max() <= 1e-3
    engine.check_integrity()


def test_the_same_text_gives_the_same_bits(long_yuan: Path, long_text: Any) -> None:
    ids, _ = long_text
    engine = Engine(long_yuan, ranks=2)
    first = engine.logits(ids[:200])
    assert (engine.logits(ids[:200]) == first).all()
    assert (Engine(long_yuan, ranks=2).logits(ids[:200]) == first).all()
