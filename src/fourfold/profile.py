"""Where the time of steps goes: what every thread did, op by op, summed over all steps and kept whole for some.

A thread's time between two instants is divided among phases without gaps (csrc/timeline.h), so the sums add up: to the
time in steps, and with the time between them to the time of the whole profile. Times are int64 nanoseconds of the
monotonic clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from time import perf_counter_ns
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold.config import ModelConfig, WeightFormat
from fourfold.machine import RankPlan
from fourfold.program import Op, ProgramBuilder

MARK = np.dtype([("ns", "<i8"), ("op", "<i4"), ("phase", "<i4")])  # as csrc/timeline.h has it
PHASES: list[str] = _core.PHASES
WORK, PACK, WAIT, END = (PHASES.index(phase) for phase in ("work", "pack", "wait", "end"))
MAX_SPANS = 200_000  # of the steps that are kept whole: what a trace viewer shows with ease

Marks = NDArray[np.void]  # of MARK
StepKind = Literal["decode", "prefill"]


@dataclass(frozen=True)
class OpFacts:
    """What an op is, and what it must read and multiply; all ranks together."""

    kind: str
    label: str  # short, the same in every layer: "q k v"
    layer: int | None
    weights: tuple[str, ...] = ()
    format: WeightFormat | None = None  # of its weights
    of_outputs: bool = False  # its rows are the step's output rows, not its tokens
    step_bytes: int = 0  # read once a step
    row_bytes: int = 0  # read for each row
    position_bytes: int = 0  # read for each position of the text
    row_flop: int = 0
    seen_flop: int = 0  # for each row and each position that it sees
    is_local: bool = False  # rows see a window of the positions


@dataclass(frozen=True)
class Work:
    """What a step of one text had to do, in numbers that add up over steps."""

    steps: int
    tokens: int
    output_steps: int  # steps that wanted logits
    outputs: int  # rows whose logits were wanted
    positions: int  # of the text, after the step
    seen: int  # for each row, the positions up to its own
    local_positions: int  # the same in layers with a window
    local_seen: int

    @classmethod
    def of_step(cls, tokens: int, outputs: int, start: int, window: int | None = None) -> Work:
        """Rows at positions start, start + 1, ...; `window`: positions that they see in local layers."""
        end = start + tokens
        whole = window or end  # a window that holds everything
        n_growing = min(max(whole - start, 0), tokens)  # rows that see all before them
        local = n_growing * start + n_growing * (n_growing + 1) // 2 + (tokens - n_growing) * whole
        return cls(
            1, tokens, int(outputs > 0), outputs,
            positions=end,
            seen=tokens * start + tokens * (tokens + 1) // 2,
            local_positions=end - max(0, start + 1 - whole),
            local_seen=local,
        )  # fmt: skip

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def rows(self, op: OpFacts) -> int:
        """That the op computes."""
        return self.outputs if op.of_outputs else self.tokens

    def bytes_read(self, op: OpFacts) -> int:
        """What the op must read of weights and caches; activations, which stay in the processor's caches, left out."""
        steps = self.output_steps if op.of_outputs else self.steps
        positions = self.local_positions if op.is_local else self.positions
        return op.step_bytes * steps + op.row_bytes * self.rows(op) + op.position_bytes * positions

    def flop(self, op: OpFacts) -> int:
        """Multiplications and additions of matrices and of attention."""
        return op.row_flop * self.rows(op) + op.seen_flop * (self.local_seen if op.is_local else self.seen)


@dataclass(frozen=True)
class StepFacts:
    """One step of one text."""

    begin: int  # the call, seen from outside: ns
    end: int
    work: Work
    kernels: Mapping[int, Mapping[str, str]]  # for each number of rows in it, by weight format or "attention"
    marks: tuple[Marks, ...]  # of each thread, all ranks' one after another

    @property
    def kind(self) -> StepKind:
        return "decode" if self.work.tokens == 1 else "prefill"

    def kernel(self, op: OpFacts) -> str | None:
        """The kernel of a linear or of attention that the op ran; None for an op that ran none."""
        rows = self.work.rows(op)
        of = op.format if op.kind == "linear" else op.label if op.kind == "attend" else None
        return self.kernels[rows][of] if of is not None and rows else None


class _Sums:
    """Steps of one kind, added up."""

    def __init__(self, n_threads: int, n_ops: int) -> None:
        self.spent = np.zeros((n_threads, n_ops, len(PHASES)), np.int64)  # ns
        self.entering = np.zeros(n_threads, np.int64)  # from the call to the thread's begin, and from its end on
        self.work = Work(0, 0, 0, 0, 0, 0, 0, 0)
        self.ns = 0  # from call to return
        self.kernels: list[set[str]] = [set() for _ in range(n_ops)]
        self._rows_seen: set[frozenset[int]] = set()

    def add(self, step: StepFacts, ops: Sequence[OpFacts]) -> None:
        for thread, marks in enumerate(step.marks):
            place = marks["op"][:-1] * len(PHASES) + marks["phase"][:-1]
            spent = np.bincount(place, np.diff(marks["ns"]), self.spent[thread].size)  # float64: exact below 2**53
            self.spent[thread] += spent.astype(np.int64).reshape(-1, len(PHASES))
            self.entering[thread] += step.end - step.begin - (marks["ns"][-1] - marks["ns"][0])
        self.work += step.work
        self.ns += step.end - step.begin
        if (rows := frozenset(step.kernels)) not in self._rows_seen:
            self._rows_seen.add(rows)
            for names, op in zip(self.kernels, ops, strict=True):
                names |= {name for name in [step.kernel(op)] if name is not None}


class Profile:
    """Collects steps; `engine.Engine.profile` feeds it. `summary` and `trace_file.write_trace` say what it found."""

    def __init__(self, ops: Sequence[OpFacts], plan: Sequence[RankPlan], max_spans: int = MAX_SPANS) -> None:
        self.ops, self.plan = tuple(ops), tuple(plan)
        self.threads = tuple((rank, thread) for rank, at in enumerate(plan) for thread in range(len(at.cpus)))
        self.kept: list[StepFacts] = []  # the first steps, with their marks
        self.n_dropped = 0  # steps after them, which are in the sums alone
        self.begin = self.end = perf_counter_ns()
        self._own = 0  # ns spent here
        self._room = max_spans
        self._sums: dict[StepKind, _Sums] = {}

    def add(self, step: StepFacts) -> None:
        """A step that has ended; from its end until now the time is the profile's own."""
        self._sums.setdefault(step.kind, _Sums(len(self.threads), len(self.ops))).add(step, self.ops)
        self._keep(step)
        self._own += perf_counter_ns() - step.end

    def _keep(self, step: StepFacts) -> None:
        n_spans = sum(len(marks) - 1 for marks in step.marks)
        if self.n_dropped or n_spans > self._room:
            self.n_dropped += 1
        else:
            self._room -= n_spans
            self.kept.append(step)

    def close(self) -> None:
        """What happens from now on is not part of it."""
        self.end = perf_counter_ns()

    def summary(self) -> dict[str, Any]:
        """JSON-ready. `wall_ms` = steps' `ms` + `profiling_ms` + `outside_ms`; a step's `ms` = rows' + `entering_ms`.

        Times of rows are means over the threads, each the sum of working, packing and waiting. A row is the ops of one
        label that ran the same kernels; `gb_s` and `gflop_s` divide by all of its time.
        """
        wall = self.end - self.begin
        outside = wall - self._own - sum(sums.ns for sums in self._sums.values())
        return {
            "wall_ms": wall / 1e6,
            "profiling_ms": self._own / 1e6,
            "outside_ms": outside / 1e6,
            "steps": {kind: self._step_summary(sums) for kind, sums in self._sums.items()},
            "threads": [self._thread_summary(i, outside) for i in range(len(self.threads))],
            "steps_without_trace": self.n_dropped,
        }

    def _step_summary(self, sums: _Sums) -> dict[str, Any]:
        groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for i, op in enumerate(self.ops):
            groups.setdefault((op.label, tuple(sorted(sums.kernels[i]))), []).append(i)
        rows = [self._row(sums, label, kernels, ops) for (label, kernels), ops in groups.items()]
        return {
            "steps": sums.work.steps,
            "tokens": sums.work.tokens,
            "ms": sums.ns / 1e6,
            "rows": rows,
            "entering_ms": float(sums.entering.mean()) / 1e6,
            "bytes": sum(sums.work.bytes_read(op) for op in self.ops),
            "gflop": sum(sums.work.flop(op) for op in self.ops) / 1e9,
        }

    def _row(self, sums: _Sums, label: str, kernels: tuple[str, ...], ops: list[int]) -> dict[str, Any]:
        by_phase = sums.spent[:, ops].sum(1).mean(0)
        ns, described = float(by_phase.sum()), [self.ops[i] for i in ops]
        n_bytes, n_flop = sum(map(sums.work.bytes_read, described)), sum(map(sums.work.flop, described))
        return {
            "op": label,
            "layers": sorted({op.layer for op in described if op.layer is not None}),
            "calls": sums.work.steps * len(ops),
            "ms": ns / 1e6,
            "pack_ms": float(by_phase[PACK]) / 1e6,
            "wait_ms": float(by_phase[WAIT]) / 1e6,
            "bytes": n_bytes,
            "gb_s": n_bytes / ns if ns else 0.0,
            "gflop": n_flop / 1e9,
            "gflop_s": n_flop / ns if ns else 0.0,
            "kernels": list(kernels),
            "amx": any(_core.isa_of_kernel(name) == "amx" for name in kernels),
        }

    def _thread_summary(self, i: int, outside: int) -> dict[str, Any]:
        spent = sum((sums.spent[i].sum(0) for sums in self._sums.values()), np.zeros(len(PHASES), np.int64))
        entering = sum(int(sums.entering[i]) for sums in self._sums.values())
        rank, thread = self.threads[i]
        phases = {f"{PHASES[phase]}_ms": int(spent[phase]) / 1e6 for phase in (WORK, PACK, WAIT)}
        return {
            "rank": rank,
            "thread": thread,
            **phases,
            "entering_ms": entering / 1e6,
            "outside_ms": (outside + self._own) / 1e6,
        }


def op_facts(builder: ProgramBuilder, formats: Mapping[str, WeightFormat], kv_bytes: int) -> list[OpFacts]:
    """Of every op of a program; `kv_bytes` of one position in one layer, all ranks together."""
    return [_facts(op, builder.config, formats, kv_bytes) for op in builder.ops]


def _facts(op: Op, config: ModelConfig, formats: Mapping[str, WeightFormat], kv_bytes: int) -> OpFacts:
    names = tuple(name for name, _, _ in op.weights)
    vectors = [entry[0] for entry in op.vectors if entry is not None]
    named = [*names, *vectors]
    layer = int(named[0].split(".")[1]) if named and named[0].startswith("layers.") else None
    of_outputs = (*op.writes, *op.reads)[0].of_outputs
    if op.kind in ("cache", "attend"):
        layer = op.layer
    if op.kind == "attend":
        seen_flop = 4 * config.n_heads * config.head_dim
        is_local = config.window(op.layer) is not None
        return OpFacts(op.kind, "attention", layer, position_bytes=kv_bytes, seen_flop=seen_flop, is_local=is_local)
    if op.kind == "embed":
        ((name, outputs, inputs),) = op.weights
        row_bytes = int(_core.slice_bytes(formats[name], [(0, outputs.size)], [(0, inputs.size)])) // outputs.size
        return OpFacts(op.kind, op.kind, layer, names, formats[name], row_bytes=row_bytes)
    if op.kind != "linear":
        return OpFacts(op.kind, op.kind.replace("_", " "), layer, of_outputs=of_outputs)
    label = " ".join(name.rsplit(".", 1)[-1] for name in names) if op.writes else "head"
    step_bytes = sum(
        int(_core.slice_bytes(formats[name], list(n), list(k)))
        for name, outputs, inputs in op.weights
        for n, k in zip(outputs.ranges, inputs.ranges, strict=True)
    )
    row_flop = sum(2 * outputs.size * inputs.size for _, outputs, inputs in op.weights)
    return OpFacts(
        op.kind,
        label,
        layer,
        names,
        formats[names[0]],
        of_outputs,
        step_bytes=step_bytes,
        row_flop=row_flop,
    )
