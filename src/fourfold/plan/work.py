"""What one step must do, counted on the program that the engine would run: bytes, panels, elements, heads, FLOP.

Nothing here knows how long anything takes. Every tuple has one entry a rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import fourfold._core as _core
from fourfold import models
from fourfold.config import KVFormat, ModelConfig, WeightFormat, seen
from fourfold.engine import MAX_STEP_TOKENS
from fourfold.footprint import HUGE_PAGE, PAGE, Footprint, footprint, slice_bytes
from fourfold.format import n_panels
from fourfold.program import Cut, Op, ProgramBuilder


@dataclass(frozen=True)
class LinearWork:
    """One linear op: matrices that are multiplied with one activation."""

    large: tuple[int, ...]  # bytes in slices that fill huge pages
    small: tuple[int, ...]  # bytes in other slices
    panels: tuple[int, ...]  # of 16 outputs, dealt over a rank's threads
    weights: tuple[int, ...]  # elements
    of_outputs: bool  # multiplies the step's output rows alone: the head


@dataclass(frozen=True)
class VectorWork:
    """One op over rows of an activation."""

    elements: tuple[int, ...]  # that a row has, or is summed from
    by_rows: bool  # threads divide rows, so that a single one has its row alone; else they divide columns
    is_reduce: bool


@dataclass(frozen=True)
class Work:
    """A whole step."""

    footprint: Footprint
    linears: Mapping[LinearWork, int]  # how many there are of each: layers are alike
    vectors: Mapping[VectorWork, int]
    windows: Mapping[int | None, int]  # how many layers see so many positions; None: all
    dim: int
    head_dim: int
    heads: tuple[int, ...]  # query heads
    kv_layer_bytes: tuple[float, ...]  # KV cache of a position in one layer
    attend_chunk: int  # positions that one thread attends to at a time, where heads are few

    @property
    def n_layers(self) -> int:
        return sum(self.windows.values())

    def seen(self, position: int) -> int:
        """Positions before this one that a token there sees, summed over the layers."""
        return sum(count * seen(window, position) for window, count in self.windows.items())

    @cached_property
    def read_bytes(self) -> tuple[int, ...]:
        """Of weights, that one token reads."""
        ranks = range(len(self.heads))
        return tuple(sum(count * (op.large[r] + op.small[r]) for op, count in self.linears.items()) for r in ranks)


def write_program(config: ModelConfig, n_ranks: int) -> ProgramBuilder:
    """The program of the model, before `fuse`: a norm within a linear op costs about what one of its own does.

    Raises UnsupportedError where the model cannot be cut so.
    """
    builder = ProgramBuilder(config, n_ranks)
    models.architecture(config.model_type).describe(config, builder)
    return builder


def count_work(
    config: ModelConfig,
    formats: Mapping[str, WeightFormat],
    *,
    kv: KVFormat,
    context: int,
    threads: Sequence[int],
) -> Work:
    """The step of a model cut over len(threads) ranks. Raises UnsupportedError where it cannot be cut so."""
    builder = write_program(config, len(threads))
    need = footprint(builder, formats, kv=kv, context=context, max_tokens=MAX_STEP_TOKENS, threads=threads)
    linears: Counter[LinearWork] = Counter()
    for matrices, count in Counter(_matrices(op, formats) for op in builder.ops if op.kind == "linear").items():
        linears[_linear(*matrices)] += count  # different matrices may be the same work
    vectors = (op for op in builder.ops if op.kind not in ("linear", "cache", "attend"))
    return Work(
        footprint=need,
        linears=linears,
        vectors=Counter(_vector(op, builder.n_ranks) for op in vectors),
        windows=Counter(config.window(layer) for layer in range(config.n_layers)),
        dim=config.dim,
        head_dim=config.head_dim,
        heads=tuple(width // config.head_dim for width in builder.heads().widths),
        kv_layer_bytes=tuple(page / PAGE / config.n_layers for page in need.kv_page),
        attend_chunk=_core.attend_chunk(context),
    )


_Matrices = tuple[tuple[WeightFormat, Cut, Cut], ...]  # format, outputs, inputs


def _matrices(op: Op, formats: Mapping[str, WeightFormat]) -> tuple[_Matrices, bool]:
    """What makes a linear like another, and whether it multiplies output rows alone."""
    return tuple((formats[name], outputs, inputs) for name, outputs, inputs in op.weights), op.reads[0].of_outputs


def _linear(matrices: _Matrices, of_outputs: bool) -> LinearWork:
    held = [slice_bytes(*matrix) for matrix in matrices]
    ranks = range(len(held[0]))
    return LinearWork(
        large=tuple(sum(part[r] for part in held if part[r] >= HUGE_PAGE) for r in ranks),
        small=tuple(sum(part[r] for part in held if part[r] < HUGE_PAGE) for r in ranks),
        panels=tuple(sum(_panels(outputs, r) for _, outputs, _ in matrices) for r in ranks),
        weights=tuple(sum(n.widths[r] * k.widths[r] for _, n, k in matrices) for r in ranks),
        of_outputs=of_outputs,
    )


def _panels(outputs: Cut, rank: int) -> int:
    return sum(n_panels(end - begin) for begin, end in outputs.ranges[rank])


def _vector(op: Op, n_ranks: int) -> VectorWork:
    widths = op.writes[0].cut.widths
    summed = n_ranks if op.kind == "reduce" else 1
    return VectorWork(
        elements=tuple(width * summed for width in widths),
        by_rows=op.kind in ("embed", "norm", "select"),
        is_reduce=op.kind == "reduce",
    )
