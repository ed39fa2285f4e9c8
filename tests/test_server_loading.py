"""While the model loads: the server lives, is not ready, says why, and ends when it is told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

LOADING = {"status": "starting", "reason": "the model is loading"}
SLOW = """
import sys, time
from fourfold.errors import RuntimeFailure, UserError
from fourfold.server import start
def load(*_, **__):
    for _ in range(600):
        time.sleep(0.1)
        with open(sys.argv[1]) as file:
            if said := file.read():
                raise {"user": UserError, "machine": RuntimeFailure, "bug": KeyError}[said]("the model is " + said)
start.LLM = load
"""
MAIN = "import sys\nfrom fourfold.cli import main\nmain(['serve', *sys.argv[2:]])"


@contextmanager
def starting(script: str, fate: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server that begins to load its model, and a client of it."""
    fate.touch()
    words = ["smollm2", "--port=0", "--context=128", "--no-measure", "--log-format=json"]
    popen = subprocess.Popen(
        [sys.executable, "-c", script, str(fate), *words], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert popen.stderr is not None
    try:
        address: Any = json.loads(next(line for line in popen.stderr if '"address"' in line))["address"]
        with httpx.Client(base_url=address, timeout=60) as client:
            while True:
                try:
                    client.get("/health")
                    break
                except httpx.ConnectError:
                    time.sleep(0.01)
            yield popen, client
    finally:
        popen.kill()
        popen.wait()
        popen.stderr.close()


@pytest.mark.parametrize(
    ("fate", "status", "says"),
    [("user", 2, "the model is user"), ("machine", 1, "the model is machine"), ("bug", 1, "the model is bug")],
)
def test_a_load_that_fails_ends_the_process_with_its_sentence(
    fate: str, status: int, says: str, tmp_path: Path
) -> None:
    with starting(SLOW + MAIN, tmp_path / "fate") as (process, client):
        assert client.get("/health").json() == {"status": "ok"}
        reply = client.get("/ready")
        assert (reply.status_code, reply.json()) == (503, LOADING)
        reply = client.post("/v1/completions", json={"model": "smollm2", "prompt": "x"})
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert reply.json()["error"]["message"] == "the model is loading; try again later"
        (tmp_path / "fate").write_text(fate)
        assert process.wait(60) == status
        assert process.stderr is not None
        assert says in process.stderr.read().splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads_ends_it_at_once(number: int, tmp_path: Path) -> None:
    with starting(SLOW + MAIN, tmp_path / "fate") as (process, client):
        assert client.get("/ready").status_code == 503
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(60) == 0
        assert time.monotonic() - began < 30  # it would load for 60 s


def test_a_real_model_loads_behind_a_server_that_answers(tmp_path: Path, smollm2: Path) -> None:
    with starting(MAIN, tmp_path / "fate") as (process, client):
        seen, end = [], time.monotonic() + 100
        while not seen or seen[-1] != {"status": "ok"}:
            assert time.monotonic() < end
            assert client.get("/health").status_code == 200
            seen.append(client.get("/ready").json())
            time.sleep(0.01)
        assert seen[0] == LOADING
        assert {**LOADING, "reason": "the model is warming up"} in seen
        reply = client.post("/v1/completions", json={"model": "smollm2", "prompt": "x", "max_tokens": 1})
        assert reply.status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
