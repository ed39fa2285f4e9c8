"""One loaded model and its step: the only place where policy meets arithmetic. Knows ids, not text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from collections.abc import Sequence as Ids
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from time import perf_counter_ns, sleep
from typing import Any, Literal, cast

import numpy as np

import fourfold._core as _core
from fourfold import models
from fourfold.assembly import Assembly, Report, Vector
from fourfold.checkpoint.fourfold_dir import open_directory
from fourfold.config import KVFormat, LongRope, ModelConfig, RopeAngles
from fourfold.disk import WeightDisk
from fourfold.errors import RuntimeFailure, UserError
from fourfold.footprint import PAGE, footprint, resident_bytes
from fourfold.fusion import fuse, one_format_each
from fourfold.kvcache import PagePool, Sequence
from fourfold.machine import RankPlan, choose_isa, plan_ranks, read_machine
from fourfold.patience import patiently
from fourfold.placement import by_rank, start_team
from fourfold.profile import MARK, Profile, StepFacts, Work, op_facts
from fourfold.program import ProgramBuilder, cut_heads
from fourfold.residency import Weights, check_address_space, choose_residency, kv_pages, may_grow
from fourfold.rotary import rotary_tables

MAX_STEP_TOKENS = 512  # rows a step: longer prompts are fed in pieces
KEPT_LOGITS = 64  # rows that every step uses again; more are allocated anew, and given back
MAX_SEQUENCES = 32  # under way at a time, unless asked for otherwise
DEFAULT_CONTEXT = 8192  # where the model allows more; ask for it with `context`

MOST_BACK: int = _core.Program.KEPT_ROWS - 1  # positions that a sequence may go back by

RowClass = Literal["best", "few", "many"]  # of linear kernels and attention's: csrc/kernels/kernels.h


@dataclass(frozen=True)
class Feed:
    """What a step does with one sequence: ids that follow, and after how many of the last ones logits are wanted."""

    sequence: Sequence
    ids: Ids[int]  # at least one
    n_logits: int = 1


class Engine:
    """A fourfold directory in memory, cut over ranks, ready to step. Threads may share it: their steps take turns.

    Raises ResourceError before loading where memory would not suffice for the weights and one text of full length (the
    pages of further texts are taken as they grow), UnsupportedError where the model cannot be cut, and UserError for a
    kernel that none of its weights, or its KV cache, could use.
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
        sequences: int = MAX_SEQUENCES,
        beside: Engine | None = None,
        kernel: str = "",
        attend: str = "",
        timeout_seconds: float = 60.0,
        report: Report | None = None,
    ) -> None:
        """`weights`: in "memory"; on "disk", read at every step; "auto": on disk what does not fit in memory.

        `sequences`: texts under way at a time; their KV cache shares what memory is left. `beside`: another engine,
        whose threads this one's steps run on. `kernel` and `attend` force a linear kernel and one of attention by name;
        `report(done, total)` is called with the bytes loaded so far, by the thread that loads. `timeout_seconds`: how
        long a thread of a step, or the disk, may be awaited; then, RuntimeFailure.
        """
        stored = open_directory(directory)
        self.config: ModelConfig = stored.config
        self.format, self._embed_format = stored.format, stored.weights["embed"].format
        self.identity = stored.identity
        self.kv = cast(KVFormat, kv or ("f32" if stored.format == "f32" else "bf16"))
        self.context = usable_context(self.config, context)
        self.isa = choose_isa()
        machine = read_machine()
        isas = machine.isas[: machine.isas.index(self.isa) + 1]
        formats = {name: weight.format for name, weight in stored.weights.items()}
        read_by = {row["name"]: row["format"] for row in _core.linear_kernels()}
        _check_kernel(kernel, read_by, isas, set(formats.values()), "weights")
        read_by = {row["name"]: row["kv"] for row in _core.attend_kernels()}
        _check_kernel(attend, read_by, isas, {self.kv}, "KV pages")
        if ranks:
            cut_heads(self.config, ranks)  # what the model refuses is not asked of the machine
        self.plan: list[RankPlan] = beside.plan if beside else plan_ranks(machine, ranks, threads)
        builder = ProgramBuilder(self.config, len(self.plan))
        models.architecture(self.config.model_type).describe(self.config, builder)
        builder.ops = one_format_each(fuse(builder.ops, len(self.plan)), formats)
        self._footprint = footprint(
            builder,
            formats,
            kv=self.kv,
            context=self.context,
            max_tokens=MAX_STEP_TOKENS,
            threads=[len(rank.cpus) for rank in self.plan],
        )
        self.weight_bytes = sum(self._footprint.weights)
        self._residency = choose_residency(self._footprint, weights, self.context, machine, self.plan)
        n_pages = kv_pages(self._footprint, self._residency, sequences, self.context, machine, self.plan)
        check_address_space(self._footprint, n_pages * PAGE, self.plan, stored.weights_path)
        self._lock = RLock()
        self.pool = PagePool(n_pages, sequences, PAGE, may_grow(self._footprint, machine, self.plan))

        self._team: Any = beside._team if beside else start_team(machine, self.plan, timeout_seconds)
        self._program = _core.make_program(
            self._team,
            max_tokens=MAX_STEP_TOKENS,
            n_slots=sequences,
            context=self.context,
            n_pages=n_pages,
            head_dim=self.config.head_dim,
            kv=self.kv,
            isa=self.isa,
            kernel=kernel,
            attend=attend,
        )
        self.rope_angles = cast(RopeAngles, rope_angles or "f32")
        for table in rotary_tables(self.config, self.context, self.rope_angles):
            self._program.add_rotary(*table)
        self._disk: WeightDisk | None = None
        try:
            if self._residency.uses_disk:
                self._program.read_from(str(stored.weights_path), timeout_seconds)
            file = _core.ReadFile(str(stored.weights_path))

            def load() -> None:
                Assembly(self._program, self._team, builder, stored, file, self._residency, report).run()
                if self._residency.uses_disk:
                    self._disk = WeightDisk(stored, self._residency)

            patiently(load, file, stored.weights_path, timeout_seconds)
            self._program.finish()
        except _core.StallError as error:
            raise RuntimeFailure(str(error)) from None
        self._logits_width = -(-self.config.vocab_size // 16) * 16
        self._logits = np.empty((KEPT_LOGITS, self._logits_width), np.float32)
        self._op_facts = op_facts(builder, formats, self._kv_bytes_per_token() // self.config.n_layers)
        self._profile: Profile | None = None

    def new_sequence(self) -> Sequence:
        """An empty text. Raises ResourceError where too many are under way."""
        return self.pool.new_sequence()

    def free(self, sequence: Sequence) -> None:
        """Give a sequence's pages back; a second time does nothing."""
        self.pool.free(sequence)

    def rewind(self, sequence: Sequence, length: int) -> None:
        """Forget all positions from `length` on, at most MOST_BACK of them."""
        if not 0 < sequence.length - length <= MOST_BACK or length < 1:
            raise UserError(f"a text of {sequence.length} tokens cannot go back to {length}: at most {MOST_BACK} back")
        sequence.length = length

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

    def step(self, feeds: Ids[Feed], *, tokens: RowClass = "best", outputs: RowClass = "best") -> Vector:
        """Feeds several sequences in one walk; the wanted logits in order, float32 (sum of n_logits, vocab).

        At most MAX_STEP_TOKENS ids in all. The logits are good until the next step. `tokens` and `outputs` say which
        kernels multiply: those of "few" or of "many" rows give each row the same bits in any company.
        """
        with self._lock:
            n_wanted = sum(feed.n_logits for feed in feeds)
            if n_wanted > KEPT_LOGITS:
                return self._step(feeds, tokens, outputs, np.empty((n_wanted, self._logits_width), np.float32))
            return self._step(feeds, tokens, outputs, self._logits[:n_wanted])

    def _feed(self, sequence: Sequence, ids: Ids[int], *, every: bool) -> Vector:
        """Logits of every id, or of the last alone."""
        with self._lock:
            return self._feed_locked(sequence, ids, every=every)

    def _feed_locked(self, sequence: Sequence, ids: Ids[int], *, every: bool) -> Vector:
        self._check_ids(sequence, ids)
        self.pool.reserve(sequence, sequence.length + len(ids))
        pieces = []
        for begin in range(0, len(ids), MAX_STEP_TOKENS):
            piece = ids[begin : begin + MAX_STEP_TOKENS]
            n_logits = len(piece) if every else int(begin + len(piece) == len(ids))
            out = np.empty((n_logits, self._logits_width), np.float32)
            pieces.append(self._step([Feed(sequence, piece, n_logits)], "best", "best", out))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _check_ids(self, sequence: Sequence, ids: Ids[int]) -> None:
        if sequence.length + len(ids) > self.context:
            raise UserError(
                f"{sequence.length + len(ids)} tokens do not fit the context of {self.context}: "
                "shorten the text or ask for a larger context"
            )
        if len(ids) == 0 or min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise UserError(f"ids must be at least one, and all from 0 to {self.config.vocab_size - 1}")

    def _step(self, feeds: Ids[Feed], tokens_class: RowClass, outputs_class: RowClass, out: Vector) -> Vector:
        program = self._running()
        rows = np.empty((len(feeds), 4), np.int32)
        tokens: list[int] = []
        wanted: list[int] = []
        for feed, row in zip(feeds, rows, strict=True):
            sequence = feed.sequence
            self._check_ids(sequence, feed.ids)
            self.pool.reserve(sequence, sequence.length + len(feed.ids))
            row[:] = sequence.slot, sequence.length, len(tokens), len(feed.ids)
            tokens += feed.ids
            wanted += range(len(tokens) - feed.n_logits, len(tokens))
        if not 0 < len(tokens) <= MAX_STEP_TOKENS:
            raise UserError(f"a step takes 1 to {MAX_STEP_TOKENS} ids, not {len(tokens)}")
        pages = np.zeros((len(feeds), max(len(feed.sequence.pages) for feed in feeds)), np.int32)
        for feed, table in zip(feeds, pages, strict=True):
            table[: len(feed.sequence.pages)] = feed.sequence.pages
        try:
            called = perf_counter_ns()
            with self._disk.counted(program) if self._disk else nullcontext():
                program.step(
                    np.array(tokens, np.int32),
                    rows,
                    pages,
                    np.array(wanted, np.int32),
                    out,
                    tokens_class=tokens_class,
                    outputs_class=outputs_class,
                )
            returned = perf_counter_ns()
        except _core.StallError as error:
            raise RuntimeFailure(str(error)) from None
        if self._profile is not None:
            rows_of = {len(wanted): outputs_class, len(tokens): tokens_class}
            kernels = {n: dict(program.kernels(n, of_class)) for n, of_class in rows_of.items() if n}
            marks = tuple(np.frombuffer(program.marks(*thread), MARK) for thread in self._profile.threads)
            work = Work.of_step(len(tokens), len(wanted), int(rows[0, 1]), self.config.sliding_window)
            self._profile.add(StepFacts(called, returned, work, kernels, marks))
        for feed in feeds:
            feed.sequence.length += len(feed.ids)
        return out[:, : self.config.vocab_size]

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

    def kernels(self, n_tokens: int) -> dict[str, str]:
        """The kernels that a step of so many tokens runs: linear ones by weight format, and that of "attention"."""
        return dict(self._running().kernels(n_tokens))

    @property
    def slowness(self) -> str | None:
        """A sentence for whoever waits: that weights are read from disk at every step; None where they are not."""
        return self._disk.slowness() if self._disk else None

    def describe(self) -> dict[str, Any]:
        """What runs and how, JSON-ready."""
        return {
            "model_type": self.config.model_type,
            "identity": self.identity,
            "format": self.format,
            "kv": self.kv,
            "rope_angles": self.rope_angles,
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
        seen = sum(self.config.seen(layer, position) for layer in range(self.config.n_layers))
        return self._read_bytes + self._kv_bytes_per_token() * seen // self.config.n_layers

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
        self.pool.check_integrity()

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
        return int(_core.slice_bytes(self._embed_format, [(0, self.config.vocab_size)], [(0, self.config.dim)]))


def usable_context(config: ModelConfig, asked: int | None) -> int:
    """Positions to make room for. Raises UserError where the model was not trained for as many as are asked.

    Of a model with one set of rotary factors for short texts and one for long ones, the first, unless more are asked.
    """
    if asked is None:
        long = config.rope_scaling
        return min(config.max_context, long.original_context if isinstance(long, LongRope) else DEFAULT_CONTEXT)
    if not 1 <= asked <= config.max_context:
        raise UserError(
            f"a context of {asked} is not possible: the model was trained for 1 to {config.max_context} positions"
        )
    return asked


def _check_kernel(name: str, table: Mapping[str, str], isas: list[str], formats: Set[str], what: str) -> None:
    """Raises UserError where a kernel is forced that does not exist, or that could not run or would not be used.

    `table`: what format each kernel reads; `formats`: those of this model's `what`.
    """
    if not name:
        return
    if name not in table:
        raise UserError(f"there is no kernel {name!r}; the table has {', '.join(table)}")
    if (isa := _core.isa_of_kernel(name)) not in isas:
        raise UserError(
            f"{name} needs {isa}, and this machine or FOURFOLD_ISA goes up to {isas[-1]}; name another kernel"
        )
    if table[name] not in formats:
        raise UserError(
            f"{name} reads {table[name]}, and this model's {what} are {', '.join(sorted(formats))}; name another kernel"
        )
