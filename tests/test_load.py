"""The load benchmark: its traffic, what it makes of what clients saw, and one short run against a real server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny
from load.clients import Record
from load.report import chart, markdown, summary
from load.traffic import FEWEST, LONGEST, MOST, SHORTEST, traffic

ROOT = Path(__file__).parents[1]


def test_traffic_is_the_same_for_the_same_seed_and_within_its_bounds() -> None:
    asks = traffic(500, 100, 0.5, 0.1, seed=3)
    assert asks == traffic(500, 100, 0.5, 0.1, seed=3)
    assert asks != traffic(500, 100, 0.5, 0.1, seed=4)
    lengths = [len(ask.prompt) for ask in asks]
    assert SHORTEST <= min(lengths) < 25
    assert 1800 < max(lengths) <= LONGEST
    assert {FEWEST, MOST} <= {ask.n_tokens for ask in asks} <= {*range(FEWEST, MOST + 1)}
    assert np.mean([ask.think_seconds for ask in asks]) == pytest.approx(0.5, rel=0.2)
    assert 20 < sum(ask.leaves_after is not None for ask in asks) < 90
    assert all(ask.leaves_after is None for ask in traffic(50, 100, 0.0, 0.0))


def results() -> dict[str, object]:
    records = [Record(100, first=0.1 * i, last=0.1 * i + 0.09, tokens=10) for i in range(1, 5)]
    records += [Record(50, first=0.2, last=0.25, tokens=3, left=True), Record(10, error="429: try again later")]
    level = {"clients": 8, **summary(records, 2.0)}
    share = {"clients": 8, "requests": 24, "rounds": 1, "served": 90.0, "offline": 100.0, "ratio": 0.9}
    return {"title": "a model", "levels": [level, {**level, "clients": 32}], "share": share}


def test_percentiles_and_rates_count_what_was_seen() -> None:
    level = results()["levels"][0]  # type: ignore[index]
    assert level["requests"] == 6
    assert (level["left"], level["errors"]) == (1, ["429: try again later"])
    assert level["first_token_ms"]["p50"] == pytest.approx(200)
    assert level["token_ms"]["p99"] == pytest.approx(10)  # of those who stayed
    assert level["tokens_per_s"] == pytest.approx(43 / 2)
    for language in ("en", "zh"):
        table = markdown(results(), "load.svg", language)
        assert "| 32 | 6 (1) | 200, 380, 396 | 10, 10, 10 | 22 | 230 | 1 |" in table
        assert "**0.90**" in table
        assert "](load.svg)" in table


def test_the_chart_is_a_picture(tmp_path: Path) -> None:
    chart(results(), tmp_path / "load.svg")
    assert "<svg" in (tmp_path / "load.svg").read_text()


def test_a_short_run_finds_nothing_held_afterwards(tmp_path: Path) -> None:
    config = tiny.CONFIG | {"vocab_size": 264, "max_position_embeddings": LONGEST + MOST}
    model = tiny.write_gguf(tmp_path / "model.gguf", config, tiny.tensors(config))
    docs = tmp_path / "docs"
    docs.mkdir()
    pages = [docs / "serving.md", docs / "serving.zh.md"]
    for page in pages:
        page.write_text("before\n<!-- load: begin -->\nold\n<!-- load: end -->\nafter\n")
    program = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), str(model)]
    options = ["--clients", "3", "--requests", "1", "--rounds", "1", "--share-at", "2"]
    places = ["--docs", str(docs), "--log", str(tmp_path / "log")]
    done = subprocess.run([*program, *options, *places], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    level = json.loads(done.stderr.splitlines()[0])
    assert level["requests"] == 12
    assert level["errors"] == []
    inserted = re.compile(r"before\n<!-- load: begin -->\n!\[.*\n\| 3 \| 12 .*<!-- load: end -->\nafter\n", re.DOTALL)
    assert all(inserted.fullmatch(page.read_text(encoding="utf-8")) for page in pages)
    assert (docs / "serving-load.svg").stat().st_size > 5000


def test_what_is_no_number_is_refused_in_a_sentence() -> None:
    program = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), "--clients", "many"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "serve: clients, requests and rounds are whole numbers from 1 on\n")
