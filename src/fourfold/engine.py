"""One loaded model and its step: the only place where policy meets arithmetic. Knows ids, not text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ids
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import RLock
from time import perf_counter_ns, sleep
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold import models
from fourfold.checkpoint.fourfold_dir import FourfoldDirectory, open_directory
from fourfold.checkpoint.source import MappedFile
from fourfold.config import KVFormat, ModelConfig, RopeAngles
from fourfold.disk import WeightDisk
from fourfold.errors import RuntimeFailure, UserError
from fourfold.footprint import PAGE, footprint, resident_bytes
from fourfold.fusion import fuse
from fourfold.kvcache import PagePool, Sequence
from fourfold.machine import RankPlan, choose_isa, plan_ranks, read_machine
from fourfold.placement import by_rank, start_team
from fourfold.profile import MARK, Profile, StepFacts, Work, op_facts
from fourfold.program import Cut, Op, ProgramBuilder, assign_buffers, cut_heads
from fourfold.residency import Residency, Weights, check_address_space, choose_residency
from fourfold.rotary import rotary_tables

MAX_STEP_TOKENS = 512  # rows a step: longer prompts are fed in pieces
MAX_SEQUENCES = 4  # under way at a time
DEFAULT_CONTEXT = 8192  # where the model allows more; ask for it with `context`

Vector = NDArray[np.float32]
Report = Callable[[int, int], None]  # bytes done, bytes in all


class Engine:
    """A fourfold directory in memory, cut over ranks, ready to step. Threads may share it: their steps take turns.

    Raises ResourceError before loading where memory would not suffice for the weights and one text of full length (the
    pages of further texts are taken as they grow), UnsupportedError where the model cannot be cut, and UserError for a
    kernel that none of its weights could use.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        ranks: int | None = None,
        threads: int | None = None,
        context: int | None = None,
        kv: str | None = None,
        rope_angles: str | None = None,
        weights: Weights = "auto",
        kernel: str = "",
        timeout_seconds: float = 60.0,
        report: Report | None = None,
    ) -> None:
        """`weights`: in "memory"; on "disk", read at every step; "auto": on disk what does not fit in memory.

        `kernel` forces a linear kernel by name; `report(done, total)` is called with the bytes loaded so far.
        """
        stored = open_directory(directory)
        self.config: ModelConfig = stored.config
        self.format = stored.format
        self.kv = cast(KVFormat, kv or ("f32" if stored.format == "f32" else "bf16"))
        self.context = usable_context(self.config, context)
        self.isa = choose_isa()
        machine = read_machine()
        _check_kernel(kernel, machine.isas[: machine.isas.index(self.isa) + 1], stored)
        if ranks:
            cut_heads(self.config, ranks)  # what the model refuses is not asked of the machine
        self.plan: list[RankPlan] = plan_ranks(machine, ranks, threads)
        builder = ProgramBuilder(self.config, len(self.plan))
        models.architecture(self.config.model_type).describe(self.config, builder)
        builder.ops = fuse(builder.ops, len(self.plan))
        formats = {name: weight.format for name, weight in stored.weights.items()}
        self._footprint = footprint(
            builder,
            formats,
            kv=self.kv,
            context=self.context,
            max_tokens=MAX_STEP_TOKENS,
            threads=[len(rank.cpus) for rank in self.plan],
        )
        self.weight_bytes = sum(self._footprint.weights)
        n_pages = MAX_SEQUENCES * -(-self.context // PAGE)
        self._residency = choose_residency(self._footprint, weights, self.context, machine, self.plan)
        check_address_space(self._footprint, n_pages * PAGE, self.plan, stored.weights_path)
        self._lock = RLock()  # again and again in one thread: a dropped stream is freed wherever it is collected
        self._pool = PagePool(n_pages, MAX_SEQUENCES, PAGE)

        self._team = start_team(machine, self.plan, timeout_seconds)
        self._program = _core.make_program(
            self._team,
            max_tokens=MAX_STEP_TOKENS,
            n_slots=MAX_SEQUENCES,
            context=self.context,
            n_pages=n_pages,
            head_dim=self.config.head_dim,
            kv=self.kv,
            isa=self.isa,
            kernel=kernel,
        )
        angles = cast(RopeAngles, rope_angles or "f32")
        self._program.set_rope(*rotary_tables(self.config, self.context, angles))
        self._disk: WeightDisk | None = None
        try:
            if self._residency.uses_disk:
                self._program.read_from(str(stored.weights_path), timeout_seconds)
            _Assembly(self._program, self._team, builder, stored, self._residency, report).run()
            if self._residency.uses_disk:
                self._disk = WeightDisk(stored, self._residency)
            self._program.finish()
        except _core.StallError as error:
            raise RuntimeFailure(str(error)) from None
        self._logits_width = -(-self.config.vocab_size // 16) * 16
        self._op_facts = op_facts(builder, formats, self._kv_bytes_per_token() // self.config.n_layers)
        self._profile: Profile | None = None

    def new_sequence(self) -> Sequence:
        """An empty text. Raises ResourceError where too many are under way."""
        with self._lock:
            return self._pool.new_sequence()

    def free(self, sequence: Sequence) -> None:
        """Give a sequence's pages back; a second time does nothing."""
        with self._lock:
            self._pool.free(sequence)

    def extend(self, sequence: Sequence, ids: Ids[int]) -> Vector:
        """Feeds ids and returns the logits after the last of them, float32 (vocab,)."""
        last: Vector = self._feed(sequence, ids, every=False)[-1]
        return last

    def logits(self, ids: Ids[int]) -> Vector:
        """Logits after each id of a text of its own, float32 (T, vocab)."""
        sequence = self.new_sequence()
        try:
            return self._feed(sequence, ids, every=True)
        finally:
            self.free(sequence)

    def _feed(self, sequence: Sequence, ids: Ids[int], *, every: bool) -> Vector:
        """Logits of every id, or of the last alone."""
        with self._lock:
            return self._feed_locked(sequence, ids, every=every)

    def _feed_locked(self, sequence: Sequence, ids: Ids[int], *, every: bool) -> Vector:
        if sequence.length + len(ids) > self.context:
            raise UserError(
                f"{sequence.length + len(ids)} tokens do not fit the context of {self.context}: "
                "shorten the text or ask for a larger context"
            )
        if len(ids) == 0 or min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise UserError(f"ids must be at least one, and all from 0 to {self.config.vocab_size - 1}")
        program = self._running()
        tokens = np.asarray(ids, np.int32)
        self._pool.reserve(sequence, sequence.length + len(tokens))
        pages = np.asarray([sequence.pages], np.int32)
        pieces = []
        for begin in range(0, len(tokens), MAX_STEP_TOKENS):
            piece = tokens[begin : begin + MAX_STEP_TOKENS]
            last = begin + len(piece) == len(tokens)
            wanted = np.arange(len(piece)) if every else np.arange(len(piece) - last, len(piece))
            out = np.empty((len(wanted), self._logits_width), np.float32)
            rows = np.array([[sequence.slot, sequence.length, 0, len(piece)]], np.int32)
            try:
                called = perf_counter_ns()
                with self._disk.counted(program) if self._disk else nullcontext():
                    program.step(piece, rows, pages, wanted.astype(np.int32), out)
                returned = perf_counter_ns()
            except _core.StallError as error:
                raise RuntimeFailure(str(error)) from None
            if self._profile is not None:
                self._record(self._profile, called, returned, len(piece), len(wanted), sequence.length)
            sequence.length += len(piece)
            pieces.append(out[:, : self.config.vocab_size])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Records what every thread does in the steps of the block. Raises UserError within another profile."""
        with self._lock:
            if self._profile is not None:
                raise UserError("a profile is under way already; end it before another")
            self._running().record(True)
            profile = self._profile = Profile(self._op_facts, self.plan)
        try:
            yield profile
        finally:
            with self._lock:
                profile.close()
                self._profile = None
                if "_program" in self.__dict__:
                    self._program.record(False)

    def _record(self, profile: Profile, called: int, returned: int, tokens: int, outputs: int, start: int) -> None:
        program = self._running()
        marks = tuple(np.frombuffer(program.marks(*thread), MARK) for thread in profile.threads)
        kernels = {rows: self.kernels(rows) for rows in {tokens, outputs}}
        profile.add(StepFacts(called, returned, Work.of_step(tokens, outputs, start), kernels, marks))

    def kernels(self, n_tokens: int) -> dict[str, str]:
        """The linear kernel that a step of so many tokens runs, by weight format."""
        return dict(self._running().kernels(n_tokens))

    @property
    def slowness(self) -> str | None:
        """A sentence for whoever waits: that weights are read from disk at every step; None where they are not."""
        return self._disk.slowness() if self._disk else None

    def describe(self) -> dict[str, Any]:
        """What runs and how, JSON-ready."""
        return {
            "model_type": self.config.model_type,
            "format": self.format,
            "kv": self.kv,
            "isa": self.isa,
            "ranks": len(self.plan),
            "threads": sum(len(r.cpus) for r in self.plan),
            "context": self.context,
            "memory_bound": bool(_core.memory_is_bound()),  # False where the system refused to bind memory to a node
            "memory": by_rank(self._running().memory_map(), [rank.node for rank in self.plan]),
            "weight_bytes": self.weight_bytes,
            "resident_bytes": resident_bytes(),
            "disk": self._disk.describe() if self._disk else None,
            "kv_bytes_per_token": self._kv_bytes_per_token(),
            "bytes_per_token": self.bytes_per_token(),
            "kernels_decode": self.kernels(1),
            "kernels_prefill": self.kernels(MAX_STEP_TOKENS),
        }

    def bytes_per_token(self, position: int = 0) -> int:
        """Bytes that one decoding step must read: every weight once (an untied embedding not), and the KV cache."""
        return self._read_bytes + self._kv_bytes_per_token() * position

    def measure_disk(self) -> float | None:
        """Bytes/s that the weights' disk gives in order, measured now; None where all weights are in memory.

        Raises RuntimeFailure where it gives nothing.
        """
        if self._disk is None:
            return None
        with self._lock:  # what is read ahead of the next step comes first
            before = -1
            while before != (before := self._running().disk_bytes_read):
                sleep(0.05)
            try:
                return self._disk.measure()
            except _core.StallError as error:
                raise RuntimeFailure(str(error)) from None

    def disk_bytes_read(self) -> int:
        """Bytes of weights read from disk so far."""
        return int(self._running().disk_bytes_read)

    def check_integrity(self) -> None:
        """No page or slot is lost. Raises AssertionError otherwise."""
        with self._lock:
            self._pool.check_integrity()

    def close(self) -> None:
        """Threads end and memory goes back; the engine is of no use afterwards."""
        with self._lock:  # not amid another thread's step
            self.__dict__.pop("_program", None)
            self.__dict__.pop("_team", None)

    def _running(self) -> Any:
        """The program. Raises UserError after `close`."""
        if "_program" not in self.__dict__:
            raise UserError("the model has been closed; load it again")
        return self._program

    def _kv_bytes_per_token(self) -> int:
        return self._footprint.kv(PAGE) // PAGE

    @property
    def _read_bytes(self) -> int:
        return self.weight_bytes if self.config.tie_embeddings else self.weight_bytes - self._embed_bytes

    @property
    def _embed_bytes(self) -> int:
        return int(_core.slice_bytes(self.format, [(0, self.config.vocab_size)], [(0, self.config.dim)]))


class _Assembly:
    """Turns a builder's ops into the native program's, creating and loading each weight once."""

    def __init__(
        self,
        program: Any,
        team: Any,
        builder: ProgramBuilder,
        stored: FourfoldDirectory,
        residency: Residency,
        report: Report | None,
    ) -> None:
        self._program, self._team, self._builder, self._stored = program, team, builder, stored
        self._in_memory = residency.in_memory
        self._report, self._loaded = report, 0
        self._to_load = sum(stored.weights[name].data_bytes for name in residency.in_memory)
        self._place, buffers = assign_buffers(builder.ops, builder.activations)
        self._buffers: list[int] = [program.add_buffer(b.cut.widths, b.of_outputs) for b in buffers]
        self._weights: dict[str, int] = {}
        self._file = MappedFile(stored.weights_path)

    def run(self) -> None:
        for op in self._builder.ops:
            getattr(self, f"_{op.kind}")(op)

    def _buffer(self, op: Op, i: int, *, write: bool = False) -> int:
        activation = (op.writes if write else op.reads)[i]
        return self._buffers[self._place[activation.index]]

    def _weight(self, name: str, outputs: Cut, inputs: Cut) -> int:
        if name not in self._weights:
            w = self._stored.weights[name]
            plans = list(zip(map(list, outputs.ranges), map(list, inputs.ranges), strict=True))
            n_panels, is_in_memory = -(-w.shape[0] // 16), name in self._in_memory
            native = _core.make_weight(w.format, *w.shape, plans, self._team, None if is_in_memory else w.data_offset)
            panels = scales = None
            if is_in_memory:
                panels = self._file.read(w.data_offset, w.data_offset + w.data_bytes).reshape(n_panels, -1)
            if w.scale_offset is not None:
                raw = self._file.read(w.scale_offset, w.scale_offset + 4 * n_panels)
                scales = np.frombuffer(raw.tobytes(), np.float32)
            native.load(self._team, panels, scales)
            self._file.forget(self._file.take_reads())  # or the file would be in memory beside the copy
            if is_in_memory:
                self._loaded += w.data_bytes
                if self._report:
                    self._report(self._loaded, self._to_load)
            self._weights[name] = self._program.add_weight(native)
        return self._weights[name]

    def _vectors(self, entry: tuple[str, Cut] | None) -> list[Vector]:
        """Each rank's part of a vector, or nothing."""
        if entry is None:
            return []
        name, cut = entry
        values = self._stored.vectors[name]
        empty = [np.empty(0, np.float32)]
        return [np.concatenate(empty + [values[a:b] for a, b in rank]) for rank in cut.ranges]

    def _embed(self, op: Op) -> None:
        self._program.add_embed(self._weight(*op.weights[0]), self._buffer(op, 0, write=True))

    def _norm(self, op: Op) -> None:
        eps = self._builder.config.norm_eps
        self._program.add_norm(self._buffer(op, 0), self._vectors(op.vectors[0]), eps, self._buffer(op, 0, write=True))

    def _linear(self, op: Op) -> None:
        outs = [self._buffer(op, i, write=True) for i in range(len(op.writes))] or [_core.Program.LOGITS]
        *reads, base = [self._buffer(op, i) for i in range(len(op.reads))] + [_core.Program.NONE] * (not op.sums)
        parts = [
            (self._weight(*weight), out, self._vectors(bias))
            for weight, out, bias in zip(op.weights, outs[: len(op.weights)], op.vectors, strict=True)
        ]
        self._program.add_linear(
            reads[0],
            parts,
            norm=self._vectors(op.norm),
            eps=self._builder.config.norm_eps,
            up=reads[1] if op.gated else _core.Program.NONE,
            base=base,
            sum=outs[-1] if op.sums else _core.Program.NONE,
            sum_bias=self._vectors(op.sum_bias),
        )

    def _reduce(self, op: Op) -> None:
        partial, base = self._buffer(op, 0), self._buffer(op, 1)
        self._program.add_reduce(partial, base, self._vectors(op.vectors[0]), self._buffer(op, 0, write=True))

    def _cache(self, op: Op) -> None:
        self._program.add_cache(op.layer, *(self._buffer(op, i) for i in range(3)))

    def _attend(self, op: Op) -> None:
        heads = self._builder.kv_of_head()
        self._program.add_attend(op.layer, self._buffer(op, 0), heads, self._buffer(op, 0, write=True))

    def _gated(self, op: Op) -> None:
        self._program.add_gated(self._buffer(op, 0), self._buffer(op, 1), self._buffer(op, 0, write=True))

    def _with_previous(self, op: Op) -> None:
        self._program.add_with_previous(self._buffer(op, 0), self._buffer(op, 0, write=True))

    def _select(self, op: Op) -> None:
        self._program.add_select(self._buffer(op, 0), self._buffer(op, 0, write=True))


def usable_context(config: ModelConfig, asked: int | None) -> int:
    """Positions to make room for. Raises UserError where the model was not trained for as many as are asked."""
    if asked is None:
        return min(config.max_context, DEFAULT_CONTEXT)
    if not 1 <= asked <= config.max_context:
        raise UserError(
            f"a context of {asked} is not possible: the model was trained for 1 to {config.max_context} positions"
        )
    return asked


def _check_kernel(name: str, isas: list[str], stored: FourfoldDirectory) -> None:
    """Raises UserError where a kernel is forced that does not exist, or that could not run or would not be used."""
    if not name:
        return
    rows = {row["name"]: row for row in _core.linear_kernels()}
    if name not in rows:
        raise UserError(f"there is no kernel {name!r}; the table has {', '.join(rows)}")
    isa, fmt = rows[name]["isa"], rows[name]["format"]
    if isa not in isas:
        raise UserError(
            f"{name} needs {isa}, and this machine or FOURFOLD_ISA goes up to {isas[-1]}; name another kernel"
        )
    formats = sorted({weight.format for weight in stored.weights.values()})
    if fmt not in formats:
        raise UserError(f"{name} reads {fmt}, and this model's weights are {', '.join(formats)}; name another kernel")
