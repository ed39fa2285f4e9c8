"""Bounds of connections: how many there are, how long a head may take, how long an answer may stay unread."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from time import monotonic
from typing import Any

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from fourfold.server.errors import ApiError, too_busy
from fourfold.server.limits import Limits

SWEEP_SECONDS = 0.5
MOST_PIPELINED_BYTES = 65_536  # of requests that a client sends before it has its answer


class Connection(H11Protocol):
    """uvicorn's, with bounds. `sweep` is to be called for all of them every SWEEP_SECONDS."""

    limits = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._seen: object = None  # the request that was the last one at the last sweep
        self._waits_since = monotonic()  # for the next request, or for the end
        self._stalled_since: float | None = None  # the client reads no more of its answer
        if len(self.connections) > self.limits.max_connections:
            self._refuse(too_busy("more connections are open than may be; try again later"))

    def data_received(self, data: bytes) -> None:
        """Reads on behind the request under way: else nobody would see that its client hangs up."""
        super().data_received(data)
        if self._is_busy and self.conn.their_state is h11.DONE:
            if len(self.conn.trailing_data[0]) > MOST_PIPELINED_BYTES:
                self.transport.abort()
            else:
                self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """In place of uvicorn's plain text, and of what the application says to a body that goes wrong."""
        if self._is_busy:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._refuse(ApiError(400, msg))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled_since = monotonic()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled_since = None

    def sweep(self) -> None:
        """Ends what has gone on for too long."""
        now = monotonic()
        if self._stalled_since is not None and now - self._stalled_since > self.limits.unread_seconds:
            self.transport.abort()
        if self._is_busy or self.cycle is not self._seen:
            self._seen, self._waits_since = self.cycle, now
        elif self.transport.is_closing():
            if now - self._waits_since > self.limits.unread_seconds:
                self.transport.abort()
        elif now - self._waits_since > self.limits.body_seconds:
            self._refuse(ApiError(408, "the request did not arrive in time"))

    @property
    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: ApiError) -> None:
        """The last word on this connection, where no answer has begun; not the application's."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            reply = JSONResponse(
                error.body(), error.status_code, headers={**(error.headers or {}), "Connection": "close"}
            )
            head = h11.Response(status_code=reply.status_code, headers=reply.raw_headers, reason=b"")
            for part in (head, h11.Data(data=bytes(reply.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part) or b"")
        self.transport.close()


def connection_class(limits: Limits) -> type[Connection]:
    """For uvicorn, which makes one for each connection."""
    return type("Connection", (Connection,), {"limits": limits})


def sweep(connections: Iterable[Any]) -> None:
    """All of a server's."""
    for connection in tuple(connections):
        if isinstance(connection, Connection):
            connection.sweep()
