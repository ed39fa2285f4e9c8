"""The smallest program that multiplies by a weight which is cut over ranks:

embed -> outputs of `first` cut over ranks -> inputs of `second` cut alike -> sum over ranks -> identity -> logits
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold import format as tiles

Floats = NDArray[np.float32]
Ranges = list[tuple[int, int]]


def make_team(n_ranks: int, n_threads: int = 1, timeout: float = 60.0) -> Any:
    """Virtual ranks of `n_threads` each, on this machine's CPUs in turn."""
    cpus = sorted(cpu for node in _core.read_machine().usable_cpus() for cpu in node)
    plan = [[cpus[(rank * n_threads + i) % len(cpus)] for i in range(n_threads)] for rank in range(n_ranks)]
    return _core.Team([(-1, cpus) for cpus in plan], timeout)


def pack(weights: Floats, fmt: Any) -> tuple[NDArray[np.uint8], Floats | None]:
    n, k = weights.shape
    panels = np.empty((tiles.n_panels(n), tiles.panel_bytes(fmt, k)), np.uint8)
    scales = np.empty(len(panels), np.float32) if fmt in tiles.SCALED else None
    _core.pack(weights, fmt, panels, scales, 1, _core.read_machine().isas()[-1])
    return panels, scales


class Chain:
    """Rows `x` in, x firstᵀ secondᵀ out. `cut`: for each rank its ranges of the dimension between the two."""

    def __init__(
        self,
        team: Any,
        x: Floats,
        first: Floats,
        second: Floats,
        cut: list[Ranges],
        *,
        formats: tuple[str, str] = ("f32", "f32"),
        logits_cut: list[Ranges] | None = None,
        kernel: str = "",
    ) -> None:
        self.n_rows, self.n_out, n_ranks = len(x), len(second), team.n_ranks
        self.team = team
        self.program = _core.make_program(
            team, max_tokens=len(x), n_slots=1, context=len(x), n_pages=1, head_dim=16, kv="f32",
            isa=_core.read_machine().isas()[-1], kernel=kernel,
        )  # fmt: skip

        def whole(size: int) -> list[Ranges]:
            return [[(0, size)]] * n_ranks

        def buffer(cut: list[Ranges], of_outputs: bool = False) -> int:
            return self.program.add_buffer([sum(b - a for a, b in rank) for rank in cut], of_outputs)

        k, n = whole(x.shape[1]), whole(self.n_out)
        rows, hidden, partial, nothing, total = (buffer(c) for c in (k, cut, n, n, n))
        chosen = buffer(n, of_outputs=True)
        self.program.add_embed(self._weight(x, "f32", whole(len(x)), k), 1.0, rows)
        self.program.add_linear(rows, [(self._weight(first, formats[0], cut, k), hidden, [])])
        self.program.add_linear(hidden, [(self._weight(second, formats[1], n, cut), partial, [])])
        self.program.add_reduce(partial, nothing, [], total)
        self.program.add_select(total, chosen)
        alone: list[Ranges] = [[(0, self.n_out)], *[[]] * (n_ranks - 1)]  # no two ranks write the same logits
        head = self._weight(np.eye(self.n_out, dtype=np.float32), "f32", logits_cut or alone, n)
        self.program.add_linear(chosen, [(head, _core.Program.LOGITS, [])])
        self.program.finish()

    def _weight(self, values: Floats, fmt: str, outputs: list[Ranges], inputs: list[Ranges]) -> int:
        weight = _core.make_weight(fmt, *values.shape, list(zip(outputs, inputs, strict=True)), self.team)
        weight.load(self.team, *pack(values, fmt))
        return int(self.program.add_weight(weight))

    def step(self) -> Floats:
        """All rows at once."""
        m = self.n_rows
        out = np.full((m, -(-self.n_out // 16) * 16), np.nan, np.float32)
        rows, sequence = np.arange(m, dtype=np.int32), np.array([[0, 0, 0, m]], np.int32)
        self.program.step(rows, sequence, np.zeros((1, 1), np.int32), rows, out)
        return out[:, : self.n_out]
