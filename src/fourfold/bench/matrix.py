"""One matrix, for one token and for many: how near its kernels come to the memory and to the multipliers.

Copies of one random matrix are multiplied one after another, enough of them for a few tokens that none is found in a
cache again. Many tokens, whose time is not that of reading, take fewer: every row says over how many bytes it went.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold.bench.limits import Limits, check_counts, forced_isa, spread, uses_amx
from fourfold.config import FORMATS, WeightFormat
from fourfold.errors import ResourceError, RuntimeFailure, UserError
from fourfold.format import SCALED, TILE_K, n_panels, panel_bytes, stored_bytes
from fourfold.keep import DEFAULT_FORMAT
from fourfold.machine import RankPlan, choose_isa, plan_ranks, read_machine
from fourfold.placement import start_team
from fourfold.program import TILE_N, split
from fourfold.progress import bar

TOKENS = (1, 4, 16, 512)
STEPS = 3  # in one repetition, for each number of tokens; the median counts
TOKENS_OVER_ALL = 16  # up to these a step takes every copy; beyond, programs share the copies out and take turns
MAX_PROGRAMS = 8  # each has its own share of the copies, and its own activations
PANELS_AT_ONCE = 32  # unpacked to float64 together
# A block's scale is at most this many times its largest stored value: the packer tries scales up to two steps of E4M3
# above the block's largest weight, and the coarsest codebook (fp4) has 4/6 below its 1.
SCALE_OVER_LARGEST = 1.5
INCLUDES = "Time includes packing the activations for the kernel, the threads' barriers and the call itself."


def linear(
    *,
    k: int = 8192,
    n: int = 8192,
    tokens: str | int | Sequence[int] = TOKENS,
    format: str | None = None,
    gigabytes: float = 2.0,
    threads: int | None = None,
    ranks: int = 1,
    repeats: int = 5,
    isa: str | None = None,
    kernel: str | None = None,
) -> dict[str, Any]:
    """Time, bytes and FLOP of y = x W^T, W (N, K), for each number of tokens; `kernel` forces a row of the table.

    Raises UserError for what cannot be asked, ResourceError where memory is short, and RuntimeFailure, giving no
    figures, where the product is wrong.
    """
    counts = whole_numbers("tokens", tokens)
    check_counts(k=k, n=n, repeats=repeats, ranks=ranks, threads=threads, tokens=min(counts))
    if not gigabytes > 0:
        raise UserError(f"gigabytes must be more than 0, not {gigabytes}")
    chosen = _format(format, kernel)
    machine = read_machine()
    plan = plan_ranks(machine, ranks, threads)
    n_copies = max(2, int(np.ceil(gigabytes * 1e9 / stored_bytes(chosen, (n, k)))))
    limits = Limits(machine, plan, read=True, peak=True)
    needed = n_copies * stored_bytes(chosen, (n, k)) + max(limits.n_bytes, 8 * n * k)  # the second: before packing
    needed += sum(m * (4 * n + MAX_PROGRAMS * 8 * k) for m in counts)  # activations, plain and packed
    if needed > machine.available_bytes:
        raise ResourceError(
            f"weights and activations need {needed / 1e9:.1f} GB and {machine.available_bytes / 1e9:.1f} GB are free: "
            "use fewer --gigabytes or --tokens"
        )
    with forced_isa(isa):
        copies = Copies(chosen, n, k, n_copies, plan, choose_isa(), kernel or "")
        runs = [Run(copies, m, repeats * STEPS) for m in counts]

    def repetition() -> list[float]:
        return [median(run.step() for _ in range(STEPS)) for run in runs]

    seconds = np.array(limits.interleave(repeats, repetition))  # (repeats, runs)
    rows = [_row(run, seconds[:, i], limits, copies) for i, run in enumerate(runs)]
    if 1 in counts:
        for i, row in enumerate(rows):
            row["time_over_1_token"] = spread((seconds[:, i] / seconds[:, counts.index(1)]).tolist())
    return {
        "bench": "linear",
        "format": chosen,
        "k": k,
        "n": n,
        "copies": n_copies,
        "rotating_bytes": n_copies * copies.n_bytes,
        "isa": copies.isa,
        "amx": uses_amx([row["kernel"] for row in rows]),
        "ranks": len(plan),
        "threads": sum(len(rank.cpus) for rank in plan),
        "repeats": repeats,
        "limits": limits.describe(),
        "rows": rows,
        "notes": [INCLUDES, *limits.cache_notes(n_copies * copies.n_bytes)],
    }


def _row(run: Run, seconds: NDArray[np.float64], limits: Limits, copies: Copies) -> dict[str, Any]:
    bytes_per_s, flop_per_s = copies.n_bytes / seconds, 2.0 * run.m * copies.n * copies.k / seconds
    return {
        "tokens": run.m,
        "kernel": run.kernel["name"],
        "ms": spread((seconds * 1e3).tolist()),
        "gb_s": spread((bytes_per_s / 1e9).tolist()),
        "of_read": limits.fractions_of_read(bytes_per_s.tolist()),
        "gflop_s": spread((flop_per_s / 1e9).tolist()),
        "of_peak": limits.fractions_of_peak(flop_per_s.tolist()),
    }


class Copies:
    """One random matrix (N, K), packed once and loaded into many weights."""

    def __init__(
        self, format: WeightFormat, n: int, k: int, n_copies: int, plan: Sequence[RankPlan], isa: str, kernel: str
    ) -> None:
        self.format, self.n, self.k, self.isa, self.kernel = format, n, k, isa, kernel
        self.n_ranks = len(plan)
        self.team = start_team(read_machine(), plan)
        panels = np.empty((n_panels(n), panel_bytes(format, k)), np.uint8)
        scales = np.empty(n_panels(n), np.float32) if format in SCALED else None
        rows = np.random.default_rng(0).standard_normal((n, k), dtype=np.float32)
        _core.pack(rows, format, panels, scales, threads=sum(len(rank.cpus) for rank in plan))
        del rows
        self.truth = _Truth.of(panels, scales, format, n, k)
        inputs = [(0, k)]
        cut = [(list(outputs), inputs if outputs else []) for outputs in split(n, self.n_ranks, TILE_N).ranges]
        self.n_bytes = sum(_core.slice_bytes(format, *slice_) for slice_ in cut)
        self.weights = [_core.make_weight(format, n, k, cut, self.team) for _ in range(n_copies)]
        with bar("loading copies") as report:
            for done, weight in enumerate(self.weights, 1):
                weight.load(self.team, panels, scales)
                report(done * self.n_bytes, n_copies * self.n_bytes)

    def program(self, max_tokens: int, first: int, count: int) -> Any:
        """Multiplies `count` copies, from `first` on, by rows of the first of them: token i is row i."""
        try:
            program = _core.make_program(
                self.team,
                max_tokens=max_tokens,
                n_slots=1,
                context=1,
                n_pages=1,
                head_dim=TILE_K,
                kv="f32",
                isa=self.isa,
                kernel=self.kernel,
            )
        except ValueError as error:  # a kernel that this instruction set lacks
            raise UserError(str(error)) from None
        x = program.add_buffer([self.k] * self.n_ranks, False)
        places = [program.add_weight(self.weights[(first + i) % len(self.weights)]) for i in range(count)]
        program.add_embed(places[0], 1.0, x)
        for place in places:
            program.add_linear(x, [(place, _core.Program.LOGITS, [])])
        program.finish()
        return program


class Run:
    """Timed steps for M tokens, each over the next copies."""

    def __init__(self, copies: Copies, m: int, n_steps: int) -> None:
        self._copies, self.m = copies, m
        n_copies = len(copies.weights)
        n_programs = 1 if m <= TOKENS_OVER_ALL else min(n_steps, MAX_PROGRAMS, n_copies)
        self._per_step = -(-n_copies // n_programs)
        self._programs = [copies.program(m, i * self._per_step, self._per_step) for i in range(n_programs)]
        name = self._programs[0].kernels(m)[copies.format]
        self.kernel = next(row for row in _core.linear_kernels() if row["name"] == name)
        self._tokens = (np.arange(m, dtype=np.int32)[::-1] % copies.n).astype(np.int32)  # the last is token 0
        self._y = np.empty((m, -(-copies.n // TILE_N) * TILE_N), np.float32)
        for _ in self._programs:  # pages, caches and clock rates settle
            self.step()

    def step(self) -> float:
        """Seconds a matrix. Raises RuntimeFailure where the last output row is not what it must be."""
        program = self._programs[0]
        self._programs.append(self._programs.pop(0))
        sequences, pages = np.empty((0, 4), np.int32), np.empty((0, 0), np.int32)
        rows = np.arange(self.m, dtype=np.int32)
        self._y[-1] = np.nan
        start = perf_counter()
        try:
            program.step(self._tokens, sequences, pages, rows, self._y)
        except _core.StallError as error:
            raise RuntimeFailure(str(error)) from None
        seconds = perf_counter() - start
        self._copies.truth.check(self._y[-1, : self._copies.n], self.kernel)
        return seconds / self._per_step


@dataclass(frozen=True)
class _Truth:
    """y = W x for x = row 0 of W, in float64 from unpacked weights, and what a kernel's error is measured by: (N) each.

    The names of the sums are those of the kernel contract (csrc/kernels/kernels.h).
    """

    y: NDArray[np.float64]
    s: NDArray[np.float64]
    c: NDArray[np.float64]  # an upper bound
    b: NDArray[np.float64]
    k: int

    @classmethod
    def of(
        cls, panels: NDArray[np.uint8], scales: NDArray[np.float32] | None, format: WeightFormat, n: int, k: int
    ) -> _Truth:
        def rows(first: int, n_rows: int) -> NDArray[np.float64]:
            out = np.empty((n_rows, k), np.float32)
            part = slice(first // TILE_N, -(-(first + n_rows) // TILE_N))
            _core.unpack(panels[part], None if scales is None else scales[part], format, out)
            return out.astype(np.float64)

        x, blocks, at_once = rows(0, 1)[0], np.arange(0, k, TILE_K), PANELS_AT_ONCE * TILE_N
        sums = []
        for first in range(0, n, at_once):
            w = rows(first, min(at_once, n - first))
            size = np.abs(w)
            largest = np.maximum.reduceat(size, blocks, axis=1)
            scale = SCALE_OVER_LARGEST * largest
            sums_c = scale @ np.add.reduceat(np.abs(x), blocks)
            sums_b = np.add.reduceat(size, blocks, axis=1) @ np.maximum.reduceat(np.abs(x), blocks)
            sums.append((w @ x, size @ np.abs(x), sums_c, sums_b))
        y, s, c, b = (np.concatenate(part) for part in zip(*sums, strict=True))
        return cls(y, s, c, b, k)

    def check(self, y: NDArray[np.float32], kernel: dict[str, Any]) -> None:
        """Raises RuntimeFailure where the kernel's own bound, or that of adding K float32 products, is broken."""
        rounding = kernel["weight_rel"] + kernel["x_rel"] + self.k * 2.0**-24
        bound = rounding * self.s + kernel["weight_abs"] * self.c + kernel["x_abs"] * self.b
        error = np.abs(y - self.y)
        if not bool(np.all(error <= bound)):
            worst = int(np.nanargmax(np.where(np.isnan(error), np.inf, error / np.maximum(bound, 1e-300))))
            raise RuntimeFailure(
                f"{kernel['name']} gave {y[worst]:.6g} for output {worst}, which is {self.y[worst]:.6g} "
                f"± {bound[worst]:.2g}: no figures of a wrong result"
            )


def whole_numbers(name: str, numbers: str | int | Sequence[int]) -> list[int]:
    """ "1,4,16" or [1, 4, 16] as it stands, without what is there twice. Raises UserError for anything else."""
    parts = numbers.split(",") if isinstance(numbers, str) else [numbers] if isinstance(numbers, int) else numbers
    try:
        counts = list(dict.fromkeys(int(part) for part in parts))
    except ValueError:
        counts = []
    if not counts:
        raise UserError(f"{name} must be whole numbers with commas between them, such as 1,4,16, not {numbers!r}")
    return counts


def _format(format: str | None, kernel: str | None) -> WeightFormat:
    """The format asked for, else the forced kernel's own, else the default. Raises UserError where they differ."""
    if format is not None and format not in FORMATS:
        raise UserError(f"there is no format {format!r}; choose one of {', '.join(FORMATS)}")
    if kernel is None:
        return cast(WeightFormat, format or DEFAULT_FORMAT)
    formats = {row["name"]: row["format"] for row in _core.linear_kernels()}
    if kernel not in formats:
        raise UserError(f"there is no kernel {kernel!r}; the table has {', '.join(formats)}")
    if format not in (None, formats[kernel]):
        raise UserError(f"{kernel} reads {formats[kernel]}, not {format}; leave the format out")
    return cast(WeightFormat, formats[kernel])
