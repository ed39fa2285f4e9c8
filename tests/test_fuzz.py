"""A quarter of a minute of benchmarks/fuzz.py, which runs as long as one likes; and that it notices what is wrong."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fourfold.errors import RuntimeFailure
from fuzzing import acts, holdings
from fuzzing.bodies import CHAT, Bodies
from fuzzing.wire import Outcome, exchange
from serving import MODEL, served

FUZZ = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"


def test_a_server_among_rude_clients(tmp_path: Path, smollm2: Path) -> None:
    words = [sys.executable, str(FUZZ), "--seconds=8", "--seed=5", "--growth=100", f"--log={tmp_path / 'log'}"]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=400, check=False)
    assert ran.returncode == 0, ran.stderr
    kinds = Counter(line.split(" | ")[0].removeprefix("| ") for line in ran.stdout.splitlines())
    assert {"valid", "nearly valid", "no HTTP", "leaving", "other routes"} <= kinds.keys()
    assert "| valid | 200 |" in ran.stdout


def test_valid_bodies_are_valid() -> None:
    with served("Paris.<eos>", context=2000) as server:
        bodies = Bodies(Random(1), MODEL, 300)
        for _ in range(60):
            path, body = bodies.valid()
            body.pop("stream", None), body.pop("stream_options", None)
            reply = server.http.post(path, json=body)
            assert reply.status_code == 200, (body, reply.text)
            assert acts._wrong_answer(body, reply.content) is None
            cut = json.loads(reply.content)
            cut["choices"].pop()
            assert acts._wrong_answer(body, json.dumps(cut).encode()) is not None
        server.until_empty()


@pytest.mark.parametrize(
    ("said", "ended", "status"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "whole", 200),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "cut", 200),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", "cut", 200),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", "whole", 500),
        (b"not HTTP\r\n\r\n", "garbled", None),
        (b"", "cut", None),
    ],
)
def test_what_comes_back_is_called_by_its_name(said: bytes, ended: str, status: int | None) -> None:
    async def ask() -> Outcome:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.write(said)
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port: int = server.sockets[0].getsockname()[1]
            return await exchange(("127.0.0.1", port), [b"POST / HTTP/1.1\r\n\r\n"])

    outcome = asyncio.run(ask())
    assert (outcome.ended, outcome.status) == (ended, status)
    wrong = acts._complaint(outcome, b"", must_answer=True)
    assert (wrong is None) is (outcome.label == "200")


def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    import fuzz

    counts = Counter({("valid", "500"): 1})
    with pytest.raises(RuntimeFailure, match="1 things must not be, such as oh"):
        fuzz._report((counts, ["oh"]))
    assert "| valid | 500 | 1 |" in capsys.readouterr().out
    error = b'data: {"error": {"message": "oh", "type": "server_error"}}\n\n'
    assert acts._complaint(Outcome("whole", 200, error), b"") is not None
    assert holdings.growth_mb([100.0] * 50 + [100.0] * 40 + [180.0] * 10) == 80


def test_what_is_still_held_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import fuzz

    monkeypatch.setattr(fuzz, "QUIET_SECONDS", 0.0)
    with served("x" * 900) as server:
        assert fuzz._held(server.address, None, None) == []
        server.engine.seconds = 0.02
        ask: Any = asyncio.new_event_loop()
        work = exchange(
            ("127.0.0.1", server.http.base_url.port or 0),
            [acts._post(CHAT, json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x"}]}).encode())],
            patience=2.0,
        )

        async def both() -> list[str]:
            asked = asyncio.create_task(work)
            await asyncio.to_thread(server.until, lambda: server.service.worker.stats.running == 1)
            held: list[str] = await asyncio.to_thread(fuzz._held, server.address, None, None)
            await asked
            return held

        held = ask.run_until_complete(both())
        ask.close()
        assert held[0] == "afterwards it holds 1 more running"
        server.until_empty()
