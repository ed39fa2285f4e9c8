"""What a model takes of memory, rank by rank, known before any of it is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import fourfold._core as _core
from fourfold.config import KVFormat, WeightFormat
from fourfold.program import TILE_K, Cut, ProgramBuilder, assign_buffers

PAGE: int = _core.PAGE  # positions of a KV page
F32 = 4  # bytes
SMALL_PAGE, HUGE_PAGE = 4096, 2 << 20


@dataclass(frozen=True)
class Footprint:
    """Bytes of each rank. Vectors (norms, biases) and the filter's last rows are left out, being small."""

    weights: tuple[int, ...]  # slices; what two ranks hold counts on both
    room: tuple[int, ...]  # for those slices: whole pages of memory
    kv_page: tuple[int, ...]  # PAGE positions of one text, in all layers; KV heads that two ranks hold count on both
    work: tuple[int, ...]  # a step's activations, plain and packed, and the threads' scratch
    rope: int  # tables, on no node in particular

    def kv(self, n_positions: int) -> int:
        """KV cache of one text, in whole pages, on all ranks."""
        return sum(self.kv_page) * -(-n_positions // PAGE)

    def rank(self, n_positions: int) -> tuple[int, ...]:
        """Each rank's bytes where one text has so many positions."""
        pages = -(-n_positions // PAGE)
        return tuple(r + pages * k + a for r, k, a in zip(self.room, self.kv_page, self.work, strict=True))

    def total(self, n_positions: int) -> int:
        """All bytes where one text has so many positions."""
        return sum(self.rank(n_positions)) + self.rope


def slice_bytes(format: WeightFormat, outputs: Cut, inputs: Cut) -> list[int]:
    """What each rank holds, and reads in a step, of a weight that is cut so."""
    return [_core.slice_bytes(format, list(n), list(k)) for n, k in zip(outputs.ranges, inputs.ranges, strict=True)]


def _room(n_bytes: int) -> int:
    """What NodeMemory (csrc/memory.cpp) maps."""
    return -(-n_bytes // SMALL_PAGE) * SMALL_PAGE


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
    weights, room, kv_page, work = [], [], [], []
    _, buffers = assign_buffers(builder.ops, builder.activations)
    head_dim = builder.config.head_dim
    page = _core.kv_page_bytes(kv, head_dim) * sum(op.kind == "cache" for op in builder.ops)
    widest = max(inputs.size for _, inputs in cuts.values())
    packed = max(-(-width // TILE_K) * TILE_K for _, inputs in cuts.values() for width in inputs.widths)
    held = [slice_bytes(formats[name], *cut) for name, cut in cuts.items()]  # (weights, ranks)
    for rank, slices in enumerate(zip(*held, strict=True)):
        weights.append(sum(slices))
        room.append(sum(map(_room, slices)))
        kv_page.append(page * (builder.kv_heads().widths[rank] // head_dim))
        rows = [packed, *(-(-buffer.cut.widths[rank] // 16) * 16 for buffer in buffers)]
        scratch = threads[rank] * _room(_core.scratch_bytes(widest, context, head_dim))
        partials = _room(_core.attend_shared_bytes(threads[rank], context, head_dim))
        work.append(sum(_room(max_tokens * width * F32) for width in rows) + scratch + partials)
    rope = context * head_dim * F32
    return Footprint(tuple(weights), tuple(room), tuple(kv_page), tuple(work), rope)
