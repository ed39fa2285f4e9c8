"""The asking end of the conversation with a peer's worker; `workers/serve.py` is the answering one."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

from peers.install import ended, reason

MAX_REPLY = 1 << 20  # bytes of one line


class PeerFailed(Exception):
    """A worker died, went silent, or answered that it cannot; the message is the reason, in a line."""


class Worker:
    """A process that answers one request at a time, and is stopped (SIGSTOP) between them: no thread of it spins on.

    What it prints goes to `log`. It is killed when this is closed, and dies with this process whatever happens.
    """

    def __init__(self, command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, start_new_session=True, bufsize=0,
                env={**os.environ, **(variables or {})},
            )  # fmt: skip
        self._read, self._closed = b"", False

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The reply. Raises PeerFailed, and the worker is of no use afterwards, where none comes within `seconds`."""
        assert self._process.stdin
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise PeerFailed(self._how_it_ended()) from None
        line = self._line(monotonic() + seconds, seconds)
        self._signal(signal.SIGSTOP)
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise PeerFailed(f"it answered {line[:80]!r}, which is not a JSON object")
        if "error" in reply:
            raise PeerFailed(str(reply["error"]))
        return reply

    def close(self) -> None:
        """Ends the process and what it started; a second time does nothing."""
        if self._closed:
            return
        self._closed = True
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, deadline: float, seconds: float) -> bytes:
        stdout = self._process.stdout
        assert stdout
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._read:
                if not selector.select(max(0.0, deadline - monotonic())):
                    raise PeerFailed(f"it did not answer within {seconds:g} s")
                piece = os.read(stdout.fileno(), 1 << 16)
                if not piece:
                    raise PeerFailed(self._how_it_ended())
                self._read += piece
                if len(self._read) > MAX_REPLY:
                    raise PeerFailed("its answer does not end")
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it closed its end of the conversation"
        return f"{ended(code)}: {reason(self._log)}"

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
