"""The worker's end of the conversation: one JSON object a line, requests on stdin, replies on stdout.

    {"load": SUBJECT}   makes the subject ready: {"facts": {...}}
    {"turn": LOAD}      does that work once:     {"seconds": s}, of one unit of it
    anything that fails                          {"error": "one line"}

A worker runs in its peer's own environment, so this module needs Python alone. It ends with its parent, and with stdin.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

_PR_SET_PDEATHSIG = 1  # prctl(2)


class Subject(Protocol):
    """What is loaded and waits for turns."""

    def facts(self) -> dict[str, Any]:
        """`bytes` of weights that a unit of work reads, `version` of the peer, `path`: what computes."""

    def turn(self, load: Mapping[str, Any]) -> float:
        """Seconds of one unit of work: a matrix, a token, or a prompt. Raises where the result is wrong."""


def pin(cpus: str) -> int:
    """Keeps this process and all its threads to the CPUs of "0,1"; gives their number. To be called before imports."""
    chosen = [int(cpu) for cpu in cpus.split(",")]
    os.sched_setaffinity(0, chosen)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(len(chosen))
    return len(chosen)


def serve(load: Callable[[Mapping[str, Any]], Subject]) -> NoReturn:
    """Answers until stdin ends. What a library prints goes to stderr: stdout is the conversation's alone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    subject: Subject | None = None
    for line in sys.stdin:
        request = json.loads(line)
        reply: dict[str, Any]
        try:
            if "load" in request:
                subject = load(request["load"])
                reply = {"facts": {**subject.facts(), "resident_bytes": resident_bytes()}}
            elif subject is None:
                raise RuntimeError("a turn was asked for before anything was loaded")
            else:
                reply = {"seconds": subject.turn(request["turn"])}
        except Exception as error:  # whatever a peer raises is its result
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        replies.write(json.dumps(reply) + "\n")
    sys.exit(0)


def resident_bytes() -> int:
    """Of this process, in memory now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
