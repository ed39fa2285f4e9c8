"""How much a client may ask for. Bodies are measured while they are read, what is in them before it is worked on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fourfold.server.errors import ApiError, bad_request
from fourfold.server.replies import send_error


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many there may be. Each excess is refused with its number."""

    max_body_bytes: int = 4_000_000
    body_seconds: float = 30.0  # that a request's head may take to arrive, and then its body
    max_requests: int = 256  # HTTP requests under way; more get a 429
    max_connections: int = 1024  # open ones; more get a 429 and are closed
    unread_seconds: float = 60.0  # that a client may leave an answer unread
    max_texts: int = 128  # prompts times n of one request
    max_n: int = 16
    max_logprobs: int = 1_000_000  # of one request: of each token one, and one for each alternative
    max_messages: int = 2048
    max_stops: int = 16
    max_stop_chars: int = 256
    max_biases: int = 1024
    max_tools: int = 128
    max_schema_bytes: int = 65_536  # of all schemas of a request together, as JSON
    max_schema_depth: int = 32


class BodyLimit:
    """Reads each body whole before the application sees it: up to so many bytes, within so many seconds."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await self._read(scope, receive)
        except TimeoutError:
            await send_error(scope, receive, send, ApiError(408, "the body did not arrive in time"))
        except ApiError as error:
            await send_error(scope, receive, send, error)
        else:
            if body is not None:
                await self._app(scope, _replayed(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """None where the client has gone. Raises ApiError for too much."""
        limit = self._limits.max_body_bytes
        refusal = ApiError(413, f"the body has more than {limit} bytes; send less")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            raise refusal
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise refusal
            if not message.get("more_body", False):
                return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A receive whose first message is the whole body."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


def check_count(count: int, most: int, what: str, param: str) -> None:
    """Raises a 400 for more than `most`."""
    if count > most:
        raise bad_request(f"{count} {what} are more than the {most} that this server allows", param)


def check_stops(stops: Sequence[str], limits: Limits) -> None:
    """Raises a 400 for too many, too long or empty ones."""
    check_count(len(stops), limits.max_stops, "stop strings", "stop")
    for stop in stops:
        if not stop:
            raise bad_request("a stop string must have at least one character", "stop")
        if len(stop) > limits.max_stop_chars:
            raise bad_request(
                f"a stop string of {len(stop)} characters is longer than the {limits.max_stop_chars} allowed", "stop"
            )


def check_depth(value: object, most: int, param: str) -> None:
    """Raises a 400 where lists and objects are nested deeper than `most`."""
    level: list[object] = [value]
    for _ in range(most + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, Mapping | list)
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
        if not level:
            return
    raise bad_request(f"the schema is nested more than {most} deep", param)
