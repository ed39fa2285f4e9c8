"""Small native programs whose time shows one thing each. Weights are random; what they compute is of no interest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold.config import KVFormat, WeightFormat
from fourfold.errors import RuntimeFailure
from fourfold.footprint import PAGE
from fourfold.format import SCALED, TILE_N, n_panels, panel_bytes
from fourfold.machine import RankPlan, read_machine
from fourfold.placement import start_team
from fourfold.program import TILE_K, HeadCut, split

NARROW = 64  # width of activations that are there only to begin with
NO_SEQUENCES, NO_PAGES = np.empty((0, 4), np.int32), np.empty((0, 0), np.int32)
FILL_TEXTS = 8  # fed at once, each a page long


@dataclass(frozen=True)
class Bench:
    """Where probes run: threads placed as the model's will be, and the kernels chosen as for it."""

    plan: Sequence[RankPlan]
    team: Any
    isa: str
    format: WeightFormat
    kv: KVFormat

    @classmethod
    def of(cls, plan: Sequence[RankPlan], isa: str, format: WeightFormat, kv: KVFormat) -> Bench:
        return cls(plan, start_team(read_machine(), plan), isa, format, kv)

    @property
    def n_ranks(self) -> int:
        return len(self.plan)

    def program(self, *, max_tokens: int = 1, head_dim: int = TILE_K, n_pages: int = 1, n_slots: int = 1) -> Any:
        return _core.make_program(
            self.team,
            max_tokens=max_tokens,
            n_slots=n_slots,
            context=n_pages * PAGE,
            n_pages=n_pages,
            head_dim=head_dim,
            kv=self.kv,
            isa=self.isa,
        )

    def weight(self, n: int, k: int, panels: NDArray[np.uint8], scales: NDArray[np.float32] | None) -> Any:
        """A matrix (N, K), cut by its outputs."""
        cut = [(list(outputs), [(0, k)] if outputs else []) for outputs in split(n, self.n_ranks, TILE_N).ranges]
        weight = _core.make_weight(self.format, n, k, cut, self.team)
        weight.load(self.team, panels, scales)
        return weight

    def panels(self, n: int, k: int) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
        """A random matrix, one panel of which repeats."""
        one = np.empty((1, panel_bytes(self.format, k)), np.uint8)
        scale = np.empty(1, np.float32) if self.format in SCALED else None
        rows = np.random.default_rng(0).standard_normal((TILE_N, k), dtype=np.float32)
        _core.pack(rows, self.format, one, scale, threads=1)
        return np.repeat(one, n_panels(n), 0), None if scale is None else np.repeat(scale, n_panels(n))

    def embed(self, program: Any, width: int) -> int:
        """A buffer that each step begins by writing."""
        buffer = int(program.add_buffer([width] * self.n_ranks, False))
        program.add_embed(program.add_weight(self.weight(TILE_N, width, *self.panels(TILE_N, width))), 1.0, buffer)
        return buffer


class Probe:
    """A program, run again and again."""

    def __init__(
        self,
        program: Any,
        n_ops: int,
        *,
        tokens: int = 1,
        sequences: NDArray[np.int32] = NO_SEQUENCES,
        pages: NDArray[np.int32] = NO_PAGES,
    ) -> None:
        self._program, self._n_ops, self._sequences, self._pages = program, n_ops, sequences, pages
        self._tokens = np.zeros(tokens, np.int32)
        self._rows, self._out = np.zeros(1, np.int32), np.empty((1, TILE_N), np.float32)

    def step(self) -> float:
        """Seconds of one."""
        start = perf_counter()
        try:
            self._program.step(self._tokens, self._sequences, self._pages, self._rows, self._out)
        except _core.StallError as error:
            raise RuntimeFailure(str(error)) from None
        return perf_counter() - start

    def us_per_op(self, repeats: int) -> float:
        """Microseconds, the whole step divided by the ops that it is for; the mean of so many steps, as of tokens."""
        return mean(self.step() for _ in range(repeats)) * 1e6 / self._n_ops


def idle(bench: Bench) -> Probe:
    """Next to nothing: what a call costs."""
    program = bench.program()
    bench.embed(program, NARROW)
    program.finish()
    return Probe(program, 1)


def chain(bench: Bench, n: int, k: int, n_bytes: float, *, tokens: int = 1, min_ops: int = 1) -> Probe:
    """Matrices (N, K), cut by outputs, of so many bytes together, one after another; at least min_ops, in rounds."""
    panels, scales = bench.panels(n, k)
    copies = max(1, round(n_bytes / panels.nbytes))
    program = bench.program(max_tokens=tokens)
    x = bench.embed(program, k)
    y = program.add_buffer(split(n, bench.n_ranks, TILE_N).widths, False)
    places = [program.add_weight(bench.weight(n, k, panels, scales)) for _ in range(copies)]
    n_ops = copies * -(-min_ops // copies)
    for i in range(n_ops):
        program.add_linear(x, [(places[i % copies], y, [])])
    program.finish()
    return Probe(program, n_ops, tokens=tokens)


def norms(bench: Bench, width: int, n_ops: int) -> Probe:
    program = bench.program()
    x, y = bench.embed(program, width), program.add_buffer([width] * bench.n_ranks, False)
    for i in range(n_ops):
        source, target = (x, y) if i % 2 == 0 else (y, x)
        program.add_norm(source, [np.ones(width, np.float32)] * bench.n_ranks, 1e-5, target)
    program.finish()
    return Probe(program, n_ops)


def gates(bench: Bench, width: int, n_ops: int) -> Probe:
    """Gated activations, `width` on each rank."""
    program = bench.program()
    x = bench.embed(program, width)
    y, z = (program.add_buffer([width] * bench.n_ranks, False) for _ in range(2))
    for _ in range(n_ops):
        program.add_gated(x, y, z)
    program.finish()
    return Probe(program, n_ops)


class Attention:
    """Layers of attention alone, with their cache filled: one token that sees many, and many that see each other."""

    def __init__(
        self, bench: Bench, heads: HeadCut, head_dim: int, n_layers: int, n_positions: int, tokens: int
    ) -> None:
        """n_positions and tokens are multiples of FILL_TEXTS · PAGE."""
        n_pages = n_positions // PAGE
        program = bench.program(max_tokens=tokens, head_dim=head_dim, n_pages=n_pages, n_slots=FILL_TEXTS)
        bench.embed(program, NARROW)
        program.add_rotary(*(np.full((n_positions, head_dim // 2), value, np.float32) for value in (1.0, 0.0)))
        q, y = (program.add_buffer(heads.q.widths, False) for _ in range(2))
        k, v = (program.add_buffer(heads.kv.widths, False) for _ in range(2))
        for layer in range(n_layers):
            program.add_cache(layer, q, k, v, rotary=0)
            program.add_attend(layer, q, heads.kv_of_head, y, scale=head_dim**-0.5)
        program.finish()
        everything = np.arange(n_pages, dtype=np.int32)[None]

        def one_text(start: int, rows: int) -> Probe:
            sequence = np.array([[0, start, 0, rows]], np.int32)
            return Probe(program, n_layers, tokens=rows, sequences=sequence, pages=everything)

        for first in range(0, n_pages, FILL_TEXTS):  # texts of one page each: filling it costs no long attention
            texts = np.array([[i, 0, i * PAGE, PAGE] for i in range(FILL_TEXTS)], np.int32)
            pages = np.arange(first, first + FILL_TEXTS, dtype=np.int32)[:, None]
            Probe(program, 1, tokens=FILL_TEXTS * PAGE, sequences=texts, pages=pages).step()
        self.first = one_text(0, 1)
        self.last = one_text(n_positions - 1, 1)
        self.prompt = one_text(0, tokens)
