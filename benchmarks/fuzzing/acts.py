"""What a client does with one connection, by kind; each says what came of it, and what of that must not be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

from fuzzing.bodies import CHAT, COMPLETIONS, Bodies
from fuzzing.wire import Leave, Outcome, exchange

_LEAVING: tuple[Leave, ...] = ("once sent", "amid the answer", "by a reset", "half")
_PATHS = (
    *("/", "/static/index.html", "/static/../app.py", "/static/%2e%2e%2fapp.py", "/static/..%5capp.py", "/static/"),
    *("/v1/models", "/v1/models/x", "/health", "/ready", "/metrics", "/stats", "/openapi.json", "/v1/models/%00%ff"),
    *("/nothing", "//", "/v1//completions", "/?a=b", "/%", "*", "/" + "x" * 3000, "http://elsewhere.example/v1/models"),
)
BURST = 40
PATIENCE = 20.0  # seconds after which the answer to a spoilt body, which may ask for anything, is no longer waited for


class Acts:
    """Every kind of thing that a client does; the server's limits must be those of `SERVER_OPTIONS`."""

    def __init__(self, random: Random, address: tuple[str, int], model: str, context: int) -> None:
        self._random, self._address, self._model = random, address, model
        self._bodies = Bodies(random, model, context)
        self.kinds: dict[str, tuple[float, Callable[[], Awaitable[list[tuple[Outcome, str | None]]]]]] = {
            "valid": (5, self._valid),
            "other routes": (1, self._other_routes),
            "nearly valid": (8, self._nearly_valid),
            "no HTTP": (4, self._no_http),
            "slow": (0.5, self._slow),
            "pipelined": (0.5, self._pipelined),
            "leaving": (4, self._leaving),
            "a burst": (0.1, self.burst),
        }

    async def one(self) -> tuple[str, list[tuple[Outcome, str | None]]]:
        """A kind by chance: what came of each request, and a complaint where it must not be so."""
        weights = [weight for weight, _ in self.kinds.values()]
        kind = self._random.choices(list(self.kinds), weights)[0]
        return kind, await self.kinds[kind][1]()

    async def greedy(self, patience: float = 300.0) -> str:
        """The text behind a fixed prompt, which is always the same. Waits while the server is busy."""
        body = {"model": self._model, "prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}
        async with asyncio.timeout(patience):
            while (outcome := await self._ask(_post(COMPLETIONS, _json(body)))).status == 429:
                await asyncio.sleep(0.5)
        if outcome.status != 200:
            return f"({outcome.label}: {outcome.body[:200].decode(errors='replace')})"
        text: str = json.loads(outcome.body)["choices"][0]["text"]
        return text

    async def _ask(self, *pieces: bytes | float, **options: Any) -> Outcome:
        return await exchange(self._address, pieces, **options)

    async def _valid(self) -> list[tuple[Outcome, str | None]]:
        path, body = self._bodies.valid()
        outcome = await self._ask(_post(path, _json(body)))
        if outcome.label == "200":
            return [(outcome, _wrong_answer(body, outcome.body))]
        fine = outcome.label == "429"
        return [(outcome, None if fine else f"{outcome.label}: {outcome.body[:300]!r} for {json.dumps(body)[:2000]}")]

    async def _nearly_valid(self) -> list[tuple[Outcome, str | None]]:
        path, data = self._bodies.nearly_valid()
        kind = self._random.choice(("application/json",) * 9 + ("text/plain", "", "multipart/form-data", "a/b; c=\xff"))
        head = _post(path, data, f"Content-Type: {kind}\r\n")
        try:
            async with asyncio.timeout(PATIENCE):
                outcome = await self._ask(head)
        except TimeoutError:
            return [(Outcome("left"), None)]
        return [(outcome, _complaint(outcome, data))]

    async def _other_routes(self) -> list[tuple[Outcome, str | None]]:
        method = self._random.choice(
            ("GET", "GET", "GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "POST")
        )
        path = self._random.choice((*_PATHS, CHAT, COMPLETIONS))
        data = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
        outcome = await self._ask(data, method=method)
        return [(outcome, _complaint(outcome, data, must_answer=True))]

    async def _no_http(self) -> list[tuple[Outcome, str | None]]:
        path, body = self._bodies.valid()
        data = self._random.choice(_rude(path, _json(body), self._random))
        outcome = await self._ask(data, leave=self._random.choice(("half", None)))
        return [(outcome, _complaint(outcome, data))]

    async def _slow(self) -> list[tuple[Outcome, str | None]]:
        """A head or a body in pieces, some too slowly, some never whole."""
        random = self._random
        path, body = self._bodies.valid()
        data = _post(path, _json(body))
        cut = random.randrange(len(data))
        if random.random() < 0.5:
            data = data[: random.randrange(cut, len(data))]
        pause = random.choice((0.01, 0.5, 8.0))
        outcome = await self._ask(data[:cut], pause, data[cut:])
        return [(outcome, _complaint(outcome, data, must_answer=True))]

    async def _pipelined(self) -> list[tuple[Outcome, str | None]]:
        """Several requests at once on one connection, answered in turn."""
        many = self._random.randint(2, 5)
        asks = [_get("/v1/models") if self._random.random() < 0.5 else _post(*self._small()) for _ in range(many)]
        outcome = await self._ask(b"".join(asks), answers=many)
        return [(outcome, _complaint(outcome, b"", must_answer=True))]

    async def _leaving(self) -> list[tuple[Outcome, str | None]]:
        random = self._random
        path, body = self._bodies.valid()
        body |= {"stream": random.random() < 0.7, "max_tokens": 200}
        data = _post(path, _json(body))
        if random.random() < 0.2:
            data = data[: random.randrange(1, len(data))]
            outcome = await self._ask(data, random.choice((0.0, 0.05)), leave="once sent")
        else:
            outcome = await self._ask(
                data, random.choice((0.0, 0.2)), leave=random.choice(_LEAVING), leave_after=random.randrange(3000)
            )
        return [(outcome, _complaint(outcome, data))]

    async def burst(self) -> list[tuple[Outcome, str | None]]:
        """More at once than the queue takes."""
        outcomes = await asyncio.gather(*(self._ask(_post(*self._small())) for _ in range(BURST)))
        return [(outcome, _complaint(outcome, b"", must_answer=True)) for outcome in outcomes]

    def _small(self) -> tuple[str, bytes]:
        return COMPLETIONS, _json({"model": self._model, "prompt": self._bodies.text(5), "max_tokens": 4})


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def _post(path: str, body: bytes, headers: str = "Content-Type: application/json\r\n") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode("latin-1") + body


def _rude(path: str, body: bytes, random: Random) -> list[bytes]:
    """What no decent client sends."""
    half = body[: len(body) // 2]
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
    chunk = b"%x\r\n%b\r\n" % (len(half), half)
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    length = b"Content-Length: %d\r\n" % len(body)
    return [
        chunked + chunk,  # cut short between chunks, in a chunk, in a size
        chunked + b"%x\r\n%b" % (len(body), half),
        chunked + b"ff",
        chunked + b"-5\r\n" + body + b"\r\n0\r\n\r\n",
        chunked + b"fffffffffffffffffffff\r\n" + body,
        chunked + b"5;ext=" + b"x" * 70_000 + b"\r\n",
        chunked + chunk + b"0\r\nX-Trailer: " + b"x" * 70_000 + b"\r\n\r\n",
        head + b"Content-Length: 5\r\n\r\n" + body,  # what follows is no request
        head + b"Content-Length: %d\r\n\r\n" % (len(body) + 50) + body,
        head + b"Content-Length: -1\r\n\r\n" + body,
        head + b"Content-Length: 1e3\r\n\r\n" + body,
        head + b"Content-Length: 99999999999999999999\r\n\r\n" + body,
        head + b"Content-Length: \xb2\r\n\r\n" + body,
        head + length + b"Content-Length: 7\r\n\r\n" + body,
        head + length + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n",  # smuggling
        head + b"Transfer-Encoding: chunked, identity\r\n\r\n" + chunk + b"0\r\n\r\n",
        head + b"Transfer-Encoding : chunked\r\n" + length + b"\r\n" + body,
        head + length + b"X-Long: " + b"x" * 100_000 + b"\r\n\r\n" + body,
        head + length + b"".join(b"X-%d: y\r\n" % i for i in range(5000)) + b"\r\n" + body,
        head + length + b"X-Request-Id: a\r\n Set-Cookie: b\r\n\r\n" + body,
        head + length + b"X-Request-Id: a\rSet-Cookie: b\r\n\r\n" + body,
        head + length + b"X-\x00: a\r\n\r\n" + body,
        head + length + b"Expect: 100-continue\r\n\r\n" + body,
        head + length + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n" + body,
        head + length + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: \r\n\r\n" + body,
        head + length + b"Authorization: Bearer " + bytes(range(128, 256)) + b"\r\n\r\n" + body,
        head + length + b"Content-Encoding: gzip\r\n\r\n" + body,
        head.replace(b"Host: x\r\n", b"") + length + b"\r\n" + body,
        head.replace(b"Host: x\r\n", b"Host: a\r\nHost: b\r\n") + length + b"\r\n" + body,
        head.replace(b"HTTP/1.1", b"HTTP/1.0") + length + b"\r\n" + body,
        head.replace(b"HTTP/1.1", b"HTTP/9.9") + length + b"\r\n" + body,
        head.replace(b"POST", b"BREW") + length + b"\r\n" + body,
        head.replace(b"POST", b"P" * 20_000) + length + b"\r\n" + body,
        head.replace(b"\r\n", b"\n") + length + b"\n" + body,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + random.randbytes(30),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(200),  # TLS
        random.randbytes(random.randint(1, 5000)),
        b"\r\n" * 40_000,
        b"",
    ]


def _complaint(outcome: Outcome, sent: bytes, *, must_answer: bool = False) -> str | None:
    """What must not be, whatever was sent: a failure, silence, and, where the request was whole, no answer."""
    wrong = outcome.ended in ("late", "garbled", "refused") or (outcome.status or 0) >= 500
    error = outcome.body.rpartition(b"data: {")[2] if outcome.body.startswith(b"data: ") else b""
    if wrong or b'"server_error"' in error or (must_answer and outcome.ended != "whole"):
        return f"{outcome.label}: {outcome.body[-300:]!r} for {sent[:2000]!r}"
    return None


def _wrong_answer(body: dict[str, Any], said: bytes) -> str | None:
    """Why this is no answer to a body that is valid."""
    many = (len(body["prompt"]) if isinstance(body.get("prompt", ""), list) else 1) * body.get("n", 1)
    if isinstance(body.get("prompt"), list) and isinstance(body["prompt"][0], int):
        many = body.get("n", 1)
    try:
        if body.get("stream"):
            *events, done, rest = said.decode().split("\n\n")
            chunks = [json.loads(event.removeprefix("data: ")) for event in events]
            finishes = [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
            fine = (done, rest) == ("data: [DONE]", "") and len(finishes) == many
        else:
            choices = json.loads(said)["choices"]
            fine = [c["index"] for c in choices] == list(range(many)) and all(c["finish_reason"] for c in choices)
    except (ValueError, KeyError, TypeError) as error:
        return f"{error!r} in {said[-300:]!r} for {json.dumps(body)[:2000]}"
    return None if fine else f"{many} answers were wanted; {said[-300:]!r} for {json.dumps(body)[:2000]}"
