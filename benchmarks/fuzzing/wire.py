"""One connection: bytes out, whatever they are; answers in, as HTTP/1.1 demands; leaving at any point."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import h11

Ended = Literal["whole", "cut", "left", "late", "garbled", "refused"]
Leave = Literal["once sent", "amid the answer", "by a reset", "half"]  # half: closes its own direction, and reads on


@dataclass(frozen=True)
class Outcome:
    """What came back for one request."""

    ended: Ended  # whole; the server closed; this client did; the time was over; no HTTP; no connection
    status: int | None = None  # of the last answer
    body: bytes = b""

    @property
    def label(self) -> str:
        """Under which it is counted."""
        return str(self.status) if self.ended == "whole" else f"{self.ended}{f' in {self.status}' * bool(self.status)}"


async def exchange(
    address: tuple[str, int],
    pieces: Sequence[bytes | float],
    *,
    method: str = "POST",
    answers: int = 1,
    leave: Leave | None = None,
    leave_after: int = 0,
    patience: float = 300.0,
) -> Outcome:
    """Send the pieces (a number: seconds to wait), and read so many answers; the last one counts.

    `leave_after`: bytes of the answer that are read before leaving amid it, or by a reset.
    """
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(*address), patience)
    except (OSError, TimeoutError):
        return Outcome("refused")
    sending = asyncio.create_task(_send(writer, pieces, half_close=leave == "half"))
    try:
        async with asyncio.timeout(patience):
            if leave == "once sent":
                await sending
                return Outcome("left")
            most = leave_after if leave in ("amid the answer", "by a reset") else None
            outcome = await _answer(parser := h11.Connection(h11.CLIENT), reader, method, most)
            for _ in range(answers - 1):
                if outcome.ended != "whole" or parser.our_state is not h11.DONE or parser.their_state is not h11.DONE:
                    break
                parser.start_next_cycle()
                outcome = await _answer(parser, reader, method, most)
            if leave == "by a reset":
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return outcome
    except TimeoutError:
        return Outcome("late")
    finally:
        sending.cancel()
        writer.close()
        await asyncio.gather(sending, writer.wait_closed(), return_exceptions=True)


async def _send(writer: asyncio.StreamWriter, pieces: Sequence[bytes | float], half_close: bool) -> None:
    try:
        for piece in pieces:
            if isinstance(piece, bytes):
                writer.write(piece)
                await writer.drain()
            else:
                await asyncio.sleep(piece)
        if half_close:
            writer.write_eof()
    except OSError:  # the server has answered, and closed
        pass


async def _answer(parser: h11.Connection, reader: asyncio.StreamReader, method: str, most: int | None) -> Outcome:
    parser.send(h11.Request(method=method if method.isalpha() else "POST", target="/", headers=[("Host", "x")]))
    parser.send(h11.EndOfMessage())
    status, body, size = None, b"", 0
    try:
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                data = await reader.read(65_536)
                size += len(data)
                if most is not None and size > most:
                    return Outcome("left", status)
                if not data and parser.their_state is h11.SEND_RESPONSE:
                    return Outcome("cut")
                parser.receive_data(data)
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage | h11.PAUSED | h11.ConnectionClosed):
                return Outcome("whole", status, body)
    except h11.RemoteProtocolError:  # a body that was cut short looks like this as well
        return Outcome("garbled" if status is None else "cut", status, body)
    except OSError:
        return Outcome("cut", status, body)
