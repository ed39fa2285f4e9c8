"""A peer for tests, run as a worker: `fake_peer.py HOW WORKERS` behaves as HOW says. WORKERS is where `serve` lies."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

HOW = sys.argv[1]
sys.path.insert(0, sys.argv[2])

from orders import serve  # noqa: E402


class Fake:
    """Says that a unit takes as many seconds as the load names, or fails in its own way."""

    def facts(self) -> dict[str, Any]:
        return {"bytes": 0 if HOW == "claims nothing" else 1000, "version": "1", "path": "nothing"}

    def turn(self, load: Mapping[str, Any]) -> float:
        print("what a library prints goes elsewhere")
        os.write(1, b"and so does what it writes past Python\n")
        if HOW == "dies":
            print("Error: out of luck", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if HOW == "hangs":
            time.sleep(3600)
        if HOW == "raises":
            raise ValueError("not with\nme")
        return -1.0 if HOW == "lies" else float(load["seconds"]) * (2 if HOW == "slow" else 1)


def load(subject: Mapping[str, Any]) -> Fake:
    if HOW == "cannot load":
        raise MemoryError("too large")
    return Fake()


serve(load)
