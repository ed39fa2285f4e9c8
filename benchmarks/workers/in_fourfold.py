"""fourfold itself, through the classes that `fourfold bench` measures with."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final

from orders import Subject, pin, serve

THREADS = pin(sys.argv[1])
FORMAT: Final = "nf4"

import numpy as np  # noqa: E402
from matrices import ROWS, activations, block, copies_for, passes, product_error  # noqa: E402
from talk import CONTEXT, Talk  # noqa: E402

import fourfold  # noqa: E402
import fourfold._core as _core  # noqa: E402
from fourfold.bench.matrix import MAX_PROGRAMS, Copies, Run  # noqa: E402
from fourfold.engine import Engine  # noqa: E402
from fourfold.format import n_panels, panel_bytes, stored_bytes  # noqa: E402
from fourfold.machine import choose_isa, plan_ranks, read_machine  # noqa: E402


class Matrix:
    """Copies of one NF4 matrix; every step is checked against the kernel's own error bound."""

    def __init__(self, subject: Mapping[str, Any]) -> None:
        k, n = subject["k"], subject["n"]
        n_copies = copies_for(subject["rotating_bytes"], stored_bytes(FORMAT, (n, k)))
        plan = plan_ranks(read_machine(), 1, THREADS)
        self._copies = Copies(FORMAT, k, n, n_copies, plan, choose_isa(), "")
        self._runs = {m: Run(self._copies, m, MAX_PROGRAMS) for m in subject["tokens"]}
        self._errors = {str(m): _error(run.kernel, m, k) for m, run in self._runs.items()}

    def facts(self) -> dict[str, Any]:
        kernels = ", ".join(dict.fromkeys(run.kernel["name"] for run in self._runs.values()))
        return {
            "bytes": self._copies.n_bytes,
            "path": kernels,
            "version": fourfold.__version__,
            "errors": self._errors,
        }

    def turn(self, load: Mapping[str, Any]) -> float:
        run = self._runs[load["tokens"]]
        return median(run.step() for _ in range(passes(run.m)))


def _error(kernel: Mapping[str, Any], n_tokens: int, k: int) -> float:
    """Of the kernel's product with the rows that the other peers' matrices repeat."""
    rows, x = block(k), activations(n_tokens, k)
    panels, scales = np.empty((n_panels(ROWS), panel_bytes(FORMAT, k)), np.uint8), np.empty(n_panels(ROWS), np.float32)
    _core.pack(rows, FORMAT, panels, scales, threads=THREADS)
    y = np.empty((n_tokens, ROWS), np.float32)
    _core.linear(kernel["name"], kernel["isa"], panels, scales, x, y)
    return product_error(y, x)


class Whole:
    """A fourfold directory."""

    def __init__(self, subject: Mapping[str, Any]) -> None:
        self._engine = Engine(subject["fourfold"], ranks=1, threads=THREADS, context=subject["context"])
        self._sequence = self._engine.new_sequence()
        self.n_bytes = self._engine.bytes_per_token(CONTEXT)
        self.path, self.version = f"NF4, {self._engine.isa}", fourfold.__version__

    def begin(self, ids: Sequence[int]) -> int:
        self._engine.free(self._sequence)
        self._sequence = self._engine.new_sequence()
        return int(self._engine.extend(self._sequence, ids).argmax())

    def go_on(self, id: int) -> int:
        return int(self._engine.extend(self._sequence, [id]).argmax())


def load(subject: Mapping[str, Any]) -> Subject:
    return Matrix(subject) if "k" in subject else Talk(Whole(subject), subject)


serve(load)
