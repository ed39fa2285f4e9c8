"""What a model takes of memory, rank by rank, known before any of it is taken."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fourfold._core as _core
from fourfold.config import KVFormat, WeightFormat
from fourfold.format import panel_bytes
from fourfold.program import TILE_N, Cut, ProgramBuilder, assign_buffers
from fourfold.rotary import table_bytes

PAGE: int = _core.PAGE  # positions of a KV page
F32 = 4  # bytes
SMALL_PAGE, HUGE_PAGE = 4096, 2 << 20


@dataclass(frozen=True)
class Footprint:
    """Bytes of each rank. Vectors (norms, biases) are left out, being small."""

    weights: tuple[int, ...]  # slices; what two ranks hold counts on both
    slices: Mapping[str, tuple[int, ...]]  # by name, in the walk's order: whole pages of memory
    kv_page: tuple[int, ...]  # PAGE positions of one text, in all layers; KV heads that two ranks hold count on both
    state_page: tuple[int, ...]  # what filters over time keep with each page: its last row in every layer
    state_text: tuple[int, ...]  # what they keep of each text besides: its last rows
    work: tuple[int, ...]  # a step's activations, plain and packed, and the threads' scratch
    rope: int  # tables, on no node in particular
    looked_up: frozenset[str]  # weights that are read by rows alone: an embedding that is no head
    on_disk: tuple[int, ...]  # what a rank takes besides where weights are not in memory: scales, a panel a thread

    @property
    def room(self) -> tuple[int, ...]:
        """Bytes of memory that all weights take, rank by rank."""
        return tuple(map(sum, zip(*self.slices.values(), strict=True)))

    def kv(self, n_positions: int) -> int:
        """KV cache of one text, in whole pages, on all ranks."""
        return sum(self.kv_page) * -(-n_positions // PAGE)

    def rank(self, n_positions: int) -> tuple[int, ...]:
        """Each rank's bytes where one text has so many positions."""
        return tuple(r + rest for r, rest in zip(self.room, self.besides_weights(n_positions), strict=True))

    def besides_weights(self, n_positions: int) -> tuple[int, ...]:
        """The same without any weight."""
        pages = -(-n_positions // PAGE)
        return tuple(
            pages * page + state + work for page, state, work in zip(self.page, self.state_text, self.work, strict=True)
        )

    @property
    def page(self) -> tuple[int, ...]:
        """Each rank's bytes of a page and all that goes with it."""
        return tuple(kv + state for kv, state in zip(self.kv_page, self.state_page, strict=True))

    def total(self, n_positions: int) -> int:
        """All bytes where one text has so many positions."""
        return sum(self.rank(n_positions)) + self.rope


def slice_bytes(format: WeightFormat, outputs: Cut, inputs: Cut) -> list[int]:
    """What each rank holds, and reads in a step, of a weight that is cut so."""
    return [_core.slice_bytes(format, list(n), list(k)) for n, k in zip(outputs.ranges, inputs.ranges, strict=True)]


def _room(n_bytes: int) -> int:
    """What NodeMemory (csrc/memory.cpp) maps."""
    return -(-n_bytes // SMALL_PAGE) * SMALL_PAGE


def resident_bytes() -> int:
    """What this process holds of memory now, pages of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def footprint(
    builder: ProgramBuilder,
    formats: Mapping[str, WeightFormat],
    *,
    kv: KVFormat,
    context: int,
    max_tokens: int,
    threads: Sequence[int],
) -> Footprint:
    """Of the program that was written on `builder`; `formats` are the weights', `threads` each rank's."""
    cuts = {name: (outputs, inputs) for op in builder.ops for name, outputs, inputs in op.weights}
    weights, rooms, kv_page, state_page, state_text, work, on_disk = [], [], [], [], [], [], []
    multiplied = {name for op in builder.ops if op.kind == "linear" for name, _, _ in op.weights}
    panel = max(panel_bytes(formats[name], inputs.size) for name, (_, inputs) in cuts.items())
    _, buffers = assign_buffers(builder.ops, builder.activations)
    head_dim = builder.config.head_dim
    page = _core.kv_page_bytes(kv, head_dim) * sum(op.kind == "cache" for op in builder.ops)
    widest = max(inputs.size for _, inputs in cuts.values())
    packed = max(
        _core.packed_bytes(formats[name], max_tokens, width)
        for name, (_, inputs) in cuts.items()
        for width in inputs.widths
    )
    n_packed = 2 if any(op.is_for_next for op in builder.ops) else 1
    held = [slice_bytes(formats[name], *cut) for name, cut in cuts.items()]  # (weights, ranks)
    for rank, slices in enumerate(zip(*held, strict=True)):
        weights.append(sum(slices))
        rooms.append([_room(n_bytes) for n_bytes in slices])
        n_panels = sum(-(-outputs.widths[rank] // TILE_N) for outputs, _ in cuts.values())
        on_disk.append(n_panels * F32 + len(cuts) * SMALL_PAGE + threads[rank] * _room(panel))
        kv_page.append(page * (builder.kv_heads().widths[rank] // head_dim))
        rows = [-(-buffer.cut.widths[rank] // 16) * 16 for buffer in buffers]
        scratch = threads[rank] * _room(_core.scratch_bytes(widest, context, head_dim))
        partials = _room(_core.attend_shared_bytes(threads[rank], context, head_dim))
        filters = [op.reads[0].cut.widths[rank] for op in builder.ops if op.kind == "with_previous"]
        state_page.append(sum(filters) * F32)
        state_text.append(_core.Program.KEPT_ROWS * state_page[-1])
        activations = n_packed * _room(packed) + sum(_room(max_tokens * width * F32) for width in rows)
        work.append(activations + scratch + partials)
    rope = table_bytes(builder.config, context)
    by_name = dict(zip(cuts, zip(*rooms, strict=True), strict=True))
    looked_up = frozenset(cuts) - multiplied
    return Footprint(
        weights=tuple(weights),
        slices=by_name,
        kv_page=tuple(kv_page),
        state_page=tuple(state_page),
        state_text=tuple(state_text),
        work=tuple(work),
        rope=rope,
        looked_up=looked_up,
        on_disk=tuple(on_disk),
    )
