"""A whole model: token by token, which reads every weight for each, and a prompt at once, which multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fourfold.bench.limits import Limits, check_counts, forced_isa, spread, uses_amx
from fourfold.checkpoint.fourfold_dir import FourfoldDirectory, open_directory
from fourfold.config import KV_FORMATS, ModelConfig
from fourfold.engine import MAX_STEP_TOKENS, Engine, Feed
from fourfold.errors import RuntimeFailure, UserError
from fourfold.locate import fourfold_directory
from fourfold.machine import read_machine
from fourfold.progress import bar, warn
from fourfold.residency import WEIGHTS, Weights


def decode(
    *,
    model: str = "smollm2",
    format: str | None = None,
    threads: int | None = None,
    ranks: int | None = None,
    context: int = 0,
    kv: str | None = None,
    weights: Weights = "auto",
    tokens: int = 64,
    batch: int = 1,
    repeats: int = 5,
    isa: str | None = None,
    attend: str | None = None,
) -> dict[str, Any]:
    """Time steps of a token for each of `batch` texts, `tokens` steps one after another, all texts from position
    `context` on, and the bytes that each step must read: the weights once and every text's KV cache.
    """
    check_counts(tokens=tokens, batch=batch, repeats=repeats, ranks=ranks, threads=threads)
    with loaded(model, format, threads, ranks, context, kv, weights, tokens, isa, batch, attend) as run:
        limits = Limits(read_machine(), run.engine.plan, read=True, disk=run.engine.measure_disk)
        seconds = run.times(repeats, limits, run.feed_one_by_one) / tokens
        weight_bytes = run.engine.bytes_per_token()
        kv_bytes = np.mean([run.engine.bytes_per_token(context + i) - weight_bytes for i in range(tokens)])
        n_bytes = weight_bytes + batch * kv_bytes
        rates = (n_bytes / seconds).tolist()
        return {
            "bench": "decode",
            **run.describe(),
            "tokens": tokens,
            "batch": batch,
            "repeats": repeats,
            **run.kernels(batch),
            "limits": limits.describe(),
            "ms_per_step": spread((seconds * 1e3).tolist()),
            "tokens_per_s": spread((batch / seconds).tolist()),
            "bytes_per_step": int(n_bytes),
            "gb_s": spread([rate / 1e9 for rate in rates]),
            "of_read": limits.fractions_of_read(rates),
            **run.disk(limits, seconds * tokens),
            "notes": limits.cache_notes(int(n_bytes)),
        }


def prefill(
    *,
    model: str = "smollm2",
    format: str | None = None,
    threads: int | None = None,
    ranks: int | None = None,
    context: int = 0,
    kv: str | None = None,
    weights: Weights = "auto",
    tokens: int = 512,
    repeats: int = 5,
    isa: str | None = None,
    attend: str | None = None,
) -> dict[str, Any]:
    """Time of a prompt of `tokens` after `context` others, and the multiplications it must do."""
    check_counts(tokens=tokens, repeats=repeats, ranks=ranks, threads=threads)
    with loaded(model, format, threads, ranks, context, kv, weights, tokens, isa, attend=attend) as run:
        limits = Limits(read_machine(), run.engine.plan, peak=True, disk=run.engine.measure_disk)
        seconds = run.times(repeats, limits, run.feed_at_once)
        matrix_flop = prompt_flop(run.stored, tokens)
        steps = [min(tokens - fed, MAX_STEP_TOKENS) for fed in range(0, tokens, MAX_STEP_TOKENS)]
        rates = (matrix_flop / seconds).tolist()
        return {
            "bench": "prefill",
            **run.describe(),
            "tokens": tokens,
            "repeats": repeats,
            **run.kernels(*steps, head=1),
            "limits": limits.describe(),
            "seconds": spread(seconds.tolist()),
            "tokens_per_s": spread((tokens / seconds).tolist()),
            "matrix_gflop": matrix_flop / 1e9,
            "attention_gflop": _attention_flop(run.stored.config, context, tokens) / 1e9,
            "gflop_s": spread([rate / 1e9 for rate in rates]),
            "of_peak": limits.fractions_of_peak(rates),
            **run.disk(limits, seconds),
            "notes": ["FLOP/s and its ratio count the matrices alone; the time includes everything."],
        }


class Interleaving(Protocol):
    """Something that is measured between repetitions."""

    def interleave(self, repeats: int, repetition: Callable[[], float]) -> list[float]: ...


class Run:
    """A loaded model with `batch` texts of `start` random tokens in its cache, and the ids to feed after them."""

    def __init__(
        self, engine: Engine, stored: FourfoldDirectory, name: str, start: int, n_tokens: int, batch: int
    ) -> None:
        self.engine, self.stored = engine, stored
        self._name, self._start = name, start
        self._disk_bytes: list[int] = []  # of each repetition
        ids = np.random.default_rng(0).integers(0, stored.config.vocab_size, start + n_tokens).tolist()
        self.ids: list[int] = ids[start:]  # at least one
        self._sequences = [engine.new_sequence() for _ in range(batch)]
        for sequence in self._sequences if start else ():
            engine.extend(sequence, ids[:start])

    def feed_at_once(self) -> NDArray[np.float32]:
        """Logits after the last of the ids, of the only text."""
        (sequence,) = self._sequences
        return self.engine.extend(sequence, self.ids)

    def feed_one_by_one(self) -> NDArray[np.float32]:
        """Logits of all texts after the last of the ids, a step for each; every text begins with another of them."""
        for i in range(len(self.ids)):
            ids = (self.ids[(i + text) % len(self.ids)] for text in range(len(self._sequences)))
            logits = self.engine.step([Feed(s, [id]) for s, id in zip(self._sequences, ids, strict=True)])
        return logits.copy()  # the engine's own are good until its next step

    def times(self, repeats: int, limits: Interleaving, work: Callable[[], NDArray[np.float32]]) -> NDArray[np.float64]:
        """Seconds of each repetition, all from the same position; (repeats). One more goes before, uncounted.

        Raises RuntimeFailure where logits are not numbers, or not the same bits every time.
        """
        logits: list[NDArray[np.float32]] = []

        def repetition() -> float:
            for sequence in self._sequences:
                sequence.length = self._start  # what the cache holds from there on is written again
            begin, n_bytes = perf_counter(), self.engine.disk_bytes_read()
            logits.append(work())
            seconds = perf_counter() - begin
            self._disk_bytes.append(self.engine.disk_bytes_read() - n_bytes)
            return seconds

        # The first also leaves behind the state that every later one begins with.
        repetition()
        seconds = np.array(limits.interleave(repeats, repetition))
        last = logits[-1]
        if not (np.isfinite(last).all() and all(np.array_equal(last, one) for one in logits[1:])):
            raise RuntimeFailure("the same tokens gave different logits, or no numbers: no figures of a wrong result")
        return seconds

    def disk(self, limits: Limits, seconds: NDArray[np.float64]) -> dict[str, Any]:
        """What each repetition read from disk a second; nothing where all weights are in memory."""
        if not any(self._disk_bytes):
            return {}
        rates = (np.array(self._disk_bytes[1:]) / seconds).tolist()
        return {
            "resident_bytes": self.engine.describe()["resident_bytes"],
            "disk_gb_s": spread([rate / 1e9 for rate in rates]),
            "of_disk": limits.fractions_of_disk(rates),
        }

    def kernels(self, *rows: int, head: int = 0) -> dict[str, Any]:
        """Kernels for so many rows at a time, by weight format or "attention", and whether they use AMX.

        `head`: rows that the head multiplies by itself, without attention; 0 where it takes all.
        """
        by_rows = {str(m): dict(self.engine.kernels(m)) for m in rows}
        if head:
            linears = {of: name for of, name in self.engine.kernels(head).items() if of != "attention"}
            by_rows.setdefault(str(head), linears)
        names = [name for kernels in by_rows.values() for name in kernels.values()]
        return {"kernels": by_rows, "amx": uses_amx(names)}

    def describe(self) -> dict[str, Any]:
        facts = self.engine.describe()
        return {
            "model": self._name,
            **{name: facts[name] for name in ("model_type", "format", "kv", "isa", "ranks", "threads")},
            "context": self._start,
        }


@contextmanager
def loaded(
    model: str,
    format: str | None,
    threads: int | None,
    ranks: int | None,
    start: int,
    kv: str | None,
    weights: Weights,
    n_tokens: int,
    isa: str | None,
    batch: int = 1,
    attend: str | None = None,
) -> Iterator[Run]:
    """A model for measuring, `start` tokens of each text in its cache and room for n_tokens more; closed at the end."""
    if start < 0:
        raise UserError(f"context must be at least 0, not {start}")
    if kv is not None and kv not in KV_FORMATS:
        raise UserError(f"kv must be one of {', '.join(KV_FORMATS)}, not {kv!r}")
    if weights not in WEIGHTS:
        raise UserError(f"weights must be one of {', '.join(WEIGHTS)}, not {weights!r}")
    with bar(f"converting {model}") as report:
        directory = fourfold_directory(model, format, threads=threads, report=report)
    with forced_isa(isa), bar(f"loading {directory.name}") as report:
        engine = Engine(
            directory,
            ranks=ranks,
            threads=threads,
            context=start + n_tokens,
            kv=kv,
            weights=weights,
            sequences=batch,
            attend=attend or "",
            report=report,
        )
    if engine.slowness:
        warn(engine.slowness)
    run = Run(engine, open_directory(directory), model, start, n_tokens, batch)
    try:
        yield run
    finally:
        engine.close()


def prompt_flop(stored: FourfoldDirectory, n_tokens: int) -> float:
    """Two for each weight and row: every token is a row, but for the head, which sees the last token alone."""
    sizes = {name: float(np.prod(weight.shape)) for name, weight in stored.weights.items()}
    embed = sizes.pop("embed")  # looked up, not multiplied with
    head = embed if stored.config.tie_embeddings else sizes.pop("head")
    return 2 * (n_tokens * sum(sizes.values()) + head)


def _attention_flop(config: ModelConfig, start: int, n_tokens: int) -> float:
    """Queries with keys, and weights with values: two for each element of each position that a token may see."""
    positions = range(start, start + n_tokens)
    n_seen = sum(config.seen(layer, position) + 1 for layer in range(config.n_layers) for position in positions)
    return 4.0 * config.n_heads * config.head_dim * n_seen
