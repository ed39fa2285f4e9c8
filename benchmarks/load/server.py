"""A server of its own for the benchmark, and what it holds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from fourfold.errors import RuntimeFailure

START_SECONDS, END_SECONDS = 300.0, 60.0


@dataclass(frozen=True)
class Server:
    """`fourfold serve`, ready."""

    url: str
    process: subprocess.Popen[str]

    def stats(self) -> dict[str, Any]:
        """What /stats says."""
        with urlopen(f"{self.url}/stats") as response:
            said: dict[str, Any] = json.load(response)
            return said

    def open_files(self) -> int:
        """Descriptors of the process."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def leaks(self, files_before: int) -> list[str]:
        """What it still holds though nobody asks for anything, after a moment to let go of it."""
        for _ in range(50):
            stats = self.stats()
            held = {
                "texts under way": stats["running"] + stats["waiting"],
                "pages": stats["pages"]["held"],
                "open files": max(0, self.open_files() - files_before),
            }
            if not any(held.values()):
                return []
            time.sleep(0.1)
        return [f"{count} {what}" for what, count in held.items() if count]


@contextmanager
def serving(model: str, options: list[str], log: Path) -> Iterator[Server]:
    """Serves a model on a free port, and ends it. Raises RuntimeFailure where it does not start, or end, well."""
    command = [
        str(Path(sys.executable).with_name("fourfold")),
        "serve",
        model,
        "--port",
        "0",
        "--log-format",
        "json",
        *options,
    ]
    with log.open("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True)
        try:
            yield Server(_address(process, log), process)
            process.send_signal(signal.SIGTERM)
            if status := process.wait(END_SECONDS):
                raise RuntimeFailure(f"the server ended with status {status}; see {log}")
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[str], log: Path) -> str:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        for line in log.read_text().splitlines():
            if '"address"' in line:
                url = str(json.loads(line)["address"]).rstrip("/")
                try:
                    with urlopen(f"{url}/ready"):
                        return url
                except URLError:  # not yet
                    pass
        time.sleep(0.1)
    raise RuntimeFailure(f"the server did not start; see {log}")
