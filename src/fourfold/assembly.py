"""From a builder's ops to the native program's, every weight created and loaded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold.checkpoint.fourfold_dir import FourfoldDirectory
from fourfold.program import Cut, Op, ProgramBuilder, assign_buffers
from fourfold.residency import Residency
from fourfold.rotary import table_of

Vector = NDArray[np.float32]
Report = Callable[[int, int], None]  # bytes done, bytes in all


class Assembly:
    """Turns a builder's ops into the native program's, creating and loading each weight once."""

    def __init__(
        self,
        program: Any,
        team: Any,
        builder: ProgramBuilder,
        stored: FourfoldDirectory,
        file: _core.ReadFile,
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
        self._file = file  # of the weights

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
            is_in_memory = name in self._in_memory
            native = _core.make_weight(w.format, *w.shape, plans, self._team, None if is_in_memory else w.data_offset)
            native.read(self._team, self._file, w.data_offset if is_in_memory else None, w.scale_offset)
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
        scale = self._builder.config.embed_scale
        self._program.add_embed(self._weight(*op.weights[0]), scale, self._buffer(op, 0, write=True))

    def _norm(self, op: Op) -> None:
        eps = self._builder.config.norm_eps
        self._program.add_norm(self._buffer(op, 0), self._vectors(op.vectors[0]), eps, self._buffer(op, 0, write=True))

    def _normed(self, op: Op) -> None:
        base, x, eps = self._buffer(op, 0), self._buffer(op, 1), self._builder.config.norm_eps
        self._program.add_normed(base, x, self._vectors(op.vectors[0]), eps, self._buffer(op, 0, write=True))

    def _linear(self, op: Op) -> None:
        none = _core.Program.NONE
        outs = [self._buffer(op, i, write=True) for i in range(len(op.writes))] or [_core.Program.LOGITS]
        *reads, base = [self._buffer(op, i) for i in range(len(op.reads))] + [none] * (not op.sums)
        parts = [
            (self._weight(*weight), none if op.sums else out, self._vectors(bias))
            for weight, out, bias in zip(op.weights, outs, op.vectors, strict=True)
        ]
        self._program.add_linear(
            reads[0],
            parts,
            norm=self._vectors(op.norm),
            eps=self._builder.config.norm_eps,
            up=reads[1] if op.gate else none,
            gate=op.gate or "silu",
            base=base,
            sum=outs[0] if op.sums else none,
            sum_bias=self._vectors(op.sum_bias),
            is_for_next=op.is_for_next,
        )

    def _reduce(self, op: Op) -> None:
        partial, base = self._buffer(op, 0), self._buffer(op, 1) if len(op.reads) > 1 else _core.Program.NONE
        self._program.add_reduce(partial, base, self._vectors(op.vectors[0]), self._buffer(op, 0, write=True))

    def _cache(self, op: Op) -> None:
        config = self._builder.config
        q_norm, k_norm = map(self._vectors, op.vectors or (None, None))
        self._program.add_cache(
            op.layer,
            *(self._buffer(op, i) for i in range(3)),
            rotary=table_of(config, op.layer),
            q_norm=q_norm,
            k_norm=k_norm,
            eps=config.norm_eps,
        )

    def _attend(self, op: Op) -> None:
        config, heads = self._builder.config, self._builder.kv_of_head()
        self._program.add_attend(
            op.layer,
            self._buffer(op, 0),
            heads,
            self._buffer(op, 0, write=True),
            scale=config.attention_scale or config.head_dim**-0.5,
            window=config.window(op.layer),
        )

    def _gated(self, op: Op) -> None:
        gate, up = self._buffer(op, 0), self._buffer(op, 1)
        self._program.add_gated(gate, up, self._buffer(op, 0, write=True), op.gate)

    def _with_previous(self, op: Op) -> None:
        self._program.add_with_previous(self._buffer(op, 0), self._buffer(op, 0, write=True))

    def _select(self, op: Op) -> None:
        self._program.add_select(self._buffer(op, 0), self._buffer(op, 0, write=True))
