"""What an administrator reads: a line an event, as JSON for machines or plain for a terminal, with the request's id."""

from __future__ import annotations

import logging
import re
import sys
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from time import perf_counter
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fourfold.json_text import json_text
from fourfold.server.auth import route_path
from fourfold.server.errors import ApiError
from fourfold.server.replies import send_error

LogFormat = Literal["auto", "json", "text"]
request_id: ContextVar[str] = ContextVar("request_id", default="")
_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_QUIET = ("/health", "/ready", "/metrics", "/stats")  # asked every few seconds: not worth a line each
_log = logging.getLogger(__name__)


class JsonLines(logging.Formatter):
    """One JSON object a line; fields passed as `extra={"fields": {...}}` become its own."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if current := request_id.get():
            entry["request_id"] = current
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json_text(entry, default=str)


class PlainLines(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        fields = "".join(f" {name}={value}" for name, value in getattr(record, "fields", {}).items())
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        current = f" [{request_id.get()}]" if request_id.get() else ""
        trace = "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        return f"{time} {level}{_in_one_line(record.getMessage())}{fields}{current}{trace}"


def _in_one_line(text: str) -> str:
    """Whatever a client put in a path: it neither forges lines nor steers a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def is_plain(form: LogFormat) -> bool:
    """Whether people read stderr; `auto`: where it is a terminal."""
    return form == "text" or (form == "auto" and sys.stderr.isatty())


def start_logging(form: LogFormat, level: str) -> None:
    """All logs of this process on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainLines() if is_plain(form) else JsonLines())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # bad HTTP is worth no line


class RequestLog:
    """Gives each request its id, a line in the log when it ends, and a count by outcome."""

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]) -> None:
        """`count(path, status)`; status 499 where the client hung up before an answer."""
        self._app, self._count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"x-request-id", b"")
        current = sent.decode() if _SANE_ID.fullmatch(sent) else f"req-{uuid.uuid4().hex}"
        token = request_id.set(current)
        status, started = 499, perf_counter()
        hung_up = has_begun = False

        async def receive_noting() -> Message:
            nonlocal hung_up
            message = await receive()
            hung_up = hung_up or message["type"] == "http.disconnect"
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
                message["headers"] = [*message.get("headers", []), (b"x-request-id", current.encode())]
            await send(message)

        try:
            await self._app(scope, receive_noting, send_with_id)
        except Exception as error:
            _log.error("unexpected %s", type(error).__name__, exc_info=error)
            if not has_begun:
                failure = ApiError(500, "the server failed at this request; its log says more")
                await send_error(scope, receive_noting, send_with_id, failure)
        finally:
            path = route_path(scope)
            status = 499 if hung_up else status
            self._count(path, status)
            level = logging.DEBUG if path in _QUIET else logging.WARNING if status >= 500 else logging.INFO
            fields = {"status": status, "seconds": round(perf_counter() - started, 4)}
            _log.log(level, "%s %s", scope["method"], scope["path"], extra={"fields": fields})
            request_id.reset(token)
