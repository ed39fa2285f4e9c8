"""The same program in fewer ops: what a linear op does on its way needs no pass over memory and no barrier of its own.

A model file writes norm, gate and sum as ops of their own. `fuse` hands them to the linear op beside them, with the
same results to the bit; what cannot be handed over stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from fourfold.config import WeightFormat
from fourfold.program import Activation, Op


def fuse(ops: Sequence[Op], n_ranks: int) -> list[Op]:
    """Norms and gates whose only reader is a linear op become its input, and with one rank sums become its output."""
    fused: list[Op] = list(ops)
    for i, op in enumerate(ops):
        if op.kind in ("norm", "gated"):
            readers = [j for j, other in enumerate(ops) if _touches(other.reads, op.writes[0])]
            if len(readers) == 1 and ops[readers[0]].kind == "linear" and _unchanged(ops[i + 1 : readers[0]], op.reads):
                fused[readers[0]] = _with_input(fused[readers[0]], op)
                fused[i] = _NOTHING
        elif op.kind == "reduce" and n_ranks == 1:
            fused[i - 1] = _with_sum(fused[i - 1], op)
            fused[i] = _NOTHING
    return [op for op in fused if op is not _NOTHING]


def one_format_each(ops: Sequence[Op], formats: Mapping[str, WeightFormat]) -> list[Op]:
    """Linear ops over matrices of several formats (by name) become several, since one op is one kernel."""
    parted: list[Op] = []
    for op in ops:
        if op.kind != "linear" or len(op.weights) == 1:
            parted.append(op)
            continue
        places = sorted(range(len(op.weights)), key=lambda i: formats[op.weights[i][0]])
        for _, same in groupby(places, key=lambda i: formats[op.weights[i][0]]):
            at = list(same)
            weights, writes = tuple(op.weights[i] for i in at), tuple(op.writes[i] for i in at)
            vectors = tuple(op.vectors[i] for i in at)
            parted.append(replace(op, weights=weights, writes=writes, vectors=vectors))
    return parted


_NOTHING = Op("select", (), ())


def _with_input(linear: Op, made: Op) -> Op:
    if made.kind == "gated":
        return replace(linear, reads=made.reads, gate=made.gate)
    return replace(linear, reads=made.reads, norm=made.vectors[0])


def _with_sum(linear: Op, reduce: Op) -> Op:
    """The linear op still leaves its products in an activation of their own: the base may be the sum."""
    return replace(
        linear,
        reads=(*linear.reads, reduce.reads[1]),
        writes=(*linear.writes, *reduce.writes),
        sums=True,
        sum_bias=reduce.vectors[0],
    )


def _touches(some: Sequence[Activation], activation: Activation) -> bool:
    return any(a.index == activation.index for a in some)


def _unchanged(ops: Sequence[Op], activations: Sequence[Activation]) -> bool:
    """Whether none of the ops writes one of these."""
    return not any(_touches(op.writes, a) for op in ops for a in activations)
