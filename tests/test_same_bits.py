"""A token's logits are the same bits alone or in any company: what sharing a step, drafting and preemption rest on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fourfold._core as _core
import tiny
from fourfold.engine import MOST_BACK, Engine, Feed, RowClass
from fourfold.errors import UserError
from fourfold.kvcache import Sequence, page_keys
from goldens import models

ISAS = _core.read_machine().isas()
Converted = Callable[[Path, str], Path]
IDS = np.random.default_rng(0).integers(0, 96, 300).tolist()
OTHERS = np.random.default_rng(1).integers(0, 96, (9, 300)).tolist()


FORMATS = ("nf4", "uint4", "bf16", "f32")
SOURCES = ("yuan", "gemma3")
# Every format in every way that kernels are chosen, every source in every one of these ways.
PIECES = [
    (SOURCES[(i + j + k) % 2], fmt, isa, rows)
    for i, fmt in enumerate(FORMATS)
    for j, isa in enumerate(ISAS)
    for k, rows in enumerate(("few", "many"))
]
ENGINES = [(source, fmt, 1 + (i + j) % 2) for i, source in enumerate(SOURCES) for j, fmt in enumerate(FORMATS)]


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of 20 positions, some of which lie on two pages."""
    folder = tmp_path_factory.mktemp("same-bits") / "gemma3"
    return tiny.write_huggingface(folder, models.CONFIGS["gemma3"], models.weights("gemma3"))


@pytest.fixture
def source_of(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """One of SOURCES -> where it is."""

    def source(name: str) -> Path:
        if name == "gemma3":
            return Path(request.getfixturevalue("gemma3"))
        return Path(request.getfixturevalue("shared")) / "golden" / "yuan-d64"

    return source


@pytest.fixture(params=ENGINES, ids=lambda engine: "-".join(map(str, engine)))
def engine(source_of: Callable[[str], Path], converted: Converted, request: pytest.FixtureRequest) -> Engine:
    source, fmt, ranks = request.param
    return Engine(converted(source_of(source), fmt), ranks=ranks)


def fed(
    engine: Engine, sizes: list[int], rows: RowClass, company: list[Sequence] | None = None
) -> tuple[Sequence, Any]:
    """IDS in pieces of these sizes, each step with pieces of other texts before and behind; all logits."""
    sequence, out = engine.new_sequence(), []
    for turn, size in enumerate(sizes):
        feeds = [Feed(sequence, IDS[sequence.length : sequence.length + size], size)]
        for i, other in enumerate(company or []):
            n = 1 + (turn + 3 * i) % 5
            feed = Feed(other, OTHERS[i][other.length : other.length + n], n)
            feeds.insert(0, feed) if i % 2 else feeds.append(feed)
        at = sum(feed.n_logits for feed in feeds[: [feed.sequence for feed in feeds].index(sequence)])
        out.append(engine.step(feeds, tokens=rows, outputs=rows)[at : at + size].copy())
    return sequence, np.concatenate(out)


@pytest.mark.parametrize(("source", "fmt", "isa", "rows"), PIECES)
def test_pieces_and_company_change_no_bit(
    source: str,
    fmt: str,
    isa: str,
    rows: RowClass,
    source_of: Callable[[str], Path],
    converted: Converted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FOURFOLD_ISA", isa)
    check_company(Engine(converted(source_of(source), fmt), ranks=2), rows, 20 if isa == "scalar" else 150)


def check_company(engine: Engine, rows: RowClass, n: int) -> None:
    """The first n ids' logits: one by one, in pieces, and among other texts."""
    sizes = [[1] * n, [n], [n // 2, 1, 2, n - n // 2 - 3], [3, 5, 8, n - 16]]
    _, alone = fed(engine, sizes[0], rows)
    for pieces in sizes[1:]:
        _, together = fed(engine, pieces, rows)
        assert (together == alone).all()
    company = [engine.new_sequence() for _ in OTHERS]
    for pieces in (sizes[3], sizes[0][:20]):
        _, together = fed(engine, pieces, rows, company)
        assert (together == alone[: sum(pieces)]).all()


OF_MANY = [row for row in _core.attend_kernels() if row["m_min"] > min(1, row["m_max"])]  # emulated ones too


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("row", OF_MANY, ids=lambda row: row["name"])
def test_company_changes_no_bit_of_attention_for_many_rows(
    source: str, row: dict[str, Any], source_of: Callable[[str], Path], converted: Converted
) -> None:
    """Over more than one chunk, where pieces decide which rows share a tile, and where a window's pages begin."""
    if row["isa"] not in ISAS:
        pytest.skip(f"{row['name']} needs {row['isa']}")
    engine = Engine(converted(source_of(source), "f32"), ranks=2, kv=row["kv"], attend=row["name"])
    assert engine.kernels(1)["attention"] == row["name"]
    check_company(engine, "many", 290 if source == "yuan" else 250)


def test_going_back_leaves_no_trace(engine: Engine) -> None:
    """Over the edges of pages too, where the filter's state belongs to the page."""
    _, straight = fed(engine, [1] * 140, "few")
    sequence, wrong = engine.new_sequence(), [7] * MOST_BACK
    while sequence.length < 130:
        here = sequence.length
        right = 1 + here % 5  # of the drafted ids
        drafted = [*IDS[here : here + right], *wrong[right - 1 :]]
        rows = engine.step([Feed(sequence, drafted, len(drafted))], tokens="few", outputs="few")
        assert (rows[:right] == straight[here : here + right]).all()
        engine.rewind(sequence, here + right)
    for length in (sequence.length, sequence.length + 1, sequence.length - MOST_BACK - 1, 0):
        with pytest.raises(UserError, match="cannot go back"):
            engine.rewind(sequence, length)


def test_going_on_from_anothers_pages_is_as_having_computed_them(engine: Engine) -> None:
    first, straight = fed(engine, [200], "many")
    keys = page_keys(IDS[:200], 64)
    engine.pool.keep(first, keys)
    for n_pages in (1, 2, 3):
        second = engine.new_sequence()
        engine.pool.adopt(second, keys[:n_pages])
        assert second.length == 64 * n_pages
        here = second.length
        rows = engine.step([Feed(second, IDS[here:200], 200 - here)], tokens="many", outputs="many")
        assert (rows == straight[here:200]).all()
        engine.free(second)
    engine.free(first)
    third = engine.new_sequence()  # from pages that nobody holds any more
    engine.pool.adopt(third, keys[:2])
    rows = engine.step([Feed(third, IDS[128:130], 2)], tokens="many", outputs="many")
    assert (rows == straight[128:130]).all()
    engine.check_integrity()


def test_a_step_takes_what_it_can(engine: Engine) -> None:
    sequence = engine.new_sequence()
    with pytest.raises(UserError, match="a step takes 1 to 512 ids, not 513"):
        engine.step([Feed(engine.new_sequence(), [1] * 257), Feed(sequence, [1] * 256)])
    with pytest.raises(UserError, match="ids must be at least one"):
        engine.step([Feed(sequence, [])])
