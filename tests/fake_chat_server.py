"""A server for tests of the page: its files as fourfold serves them, and answers that a test writes out in advance."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fourfold.server.page import HEADERS, TYPES

STATIC = Path(__file__).parents[1] / "src" / "fourfold" / "server" / "static"
IDLE = {"tokens_per_second": 0.0, "prompt_tokens_per_second": 0.0, "bandwidth_share": 0.0, "running": 0, "waiting": 0}


@dataclass(frozen=True)
class Refusal:
    """Instead of an answer."""

    status: int
    message: str = "said by the server"
    headers: dict[str, str] = field(default_factory=dict)


class Cut:
    """In an answer: the connection breaks here."""


class End:
    """In an answer: the stream ends here, as one whole, but without the answer's end."""


# What an answer is made of: text, seconds to wait, an event to wait for, an error, or an end that should not be.
Step = str | float | threading.Event | Refusal | type[Cut] | type[End]


class FakeChat:
    """`answers` are taken one a request, the last one again and again; `requests` are (headers, body) as they came."""

    def __init__(self, answers: Iterable[list[Step] | Refusal] = (["Hello."],)) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.models: list[str] = ["smollm2-135m"]
        self.stats: dict[str, Any] = dict(IDLE)
        self.key: str | None = None  # what must be sent, where one must
        self.hung_up = threading.Event()  # a client left before its answer's end
        self.connections: set[socket.socket] = set()  # that are open
        self.port = 0
        self.start()

    def start(self) -> None:
        """Also again, after `stop`, at the same port."""
        chat = self

        class Handler(_Handler):
            server_of = chat

        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def __enter__(self) -> FakeChat:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    server_of: FakeChat
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server_of.connections.add(self.connection)

    def finish(self) -> None:
        self.server_of.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        with suppress(ConnectionResetError, BrokenPipeError):
            super().handle_one_request()
            return
        self.close_connection = True

    def do_GET(self) -> None:
        chat = self.server_of
        if self.path in ("/v1/models", "/stats"):
            if self._refuses_key():
                return
            models = {"object": "list", "data": [{"id": name, "object": "model"} for name in chat.models]}
            self._send(
                200, json.dumps(models if self.path == "/v1/models" else chat.stats).encode(), "application/json"
            )
            return
        name = "index.html" if self.path == "/" else self.path.removeprefix("/static/")
        file = STATIC / name
        if "/" in name or not file.is_file():
            self._send(404, b"{}", "application/json")
        else:
            self._send(200, file.read_bytes(), TYPES[file.suffix], dict(HEADERS))

    def do_POST(self) -> None:
        chat = self.server_of
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refuses_key():
            return
        chat.requests.append((dict(self.headers), body))
        answer = chat.answers[0] if len(chat.answers) == 1 else chat.answers.pop(0)
        if isinstance(answer, Refusal):
            self._refuse(answer)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._stream(answer)
        except (BrokenPipeError, ConnectionResetError):
            chat.hung_up.set()
            self.close_connection = True

    def _stream(self, answer: list[Step]) -> None:
        pieces = 0
        for step in answer:
            if isinstance(step, str):
                pieces += 1
                self._event({"choices": [{"index": 0, "delta": {"content": step}, "finish_reason": None}]})
            elif isinstance(step, float):
                time.sleep(step)
            elif isinstance(step, threading.Event):
                while not step.wait(0.02):
                    self._chunk(b": still there\n\n")  # notices a client that left
            elif isinstance(step, Refusal):
                self._event({"error": {"message": step.message}})
                self._chunk(b"")
                return
            elif step is Cut:
                self.close_connection = True
                return
            else:
                self._chunk(b"")
                return
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        self._event(
            {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": pieces, "total_tokens": 9 + pieces}}
        )
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, value: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _refuses_key(self) -> bool:
        key = self.server_of.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self._refuse(Refusal(401, "no key"))
        return True

    def _refuse(self, refusal: Refusal) -> None:
        body = json.dumps({"error": {"message": refusal.message}}).encode()
        self._send(refusal.status, body, "application/json", refusal.headers)

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
