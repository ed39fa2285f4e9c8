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
    """Norms and gates whose only reader is a linear op become its input, and with one rank sums become its output.

    A linear op that makes gate and up for the next one, and for nobody else, is told so.
    """
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
    fused = [op for op in fused if op is not _NOTHING]
    return [replace(op, is_for_next=_is_for_next(fused, i)) for i, op in enumerate(fused)]


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
            is_for_next = op.is_for_next and len(at) == len(op.weights)
            parted.append(replace(op, weights=weights, writes=writes, vectors=vectors, is_for_next=is_for_next))
    return parted


_NOTHING = Op("select", (), ())


def _with_input(linear: Op, made: Op) -> Op:
    if made.kind == "gated":
        return replace(linear, reads=made.reads, gate=made.gate)
    return replace(linear, reads=made.reads, norm=made.vectors[0])


def _with_sum(linear: Op, reduce: Op) -> Op:
    return replace(
        linear,
        reads=(*linear.reads, reduce.reads[1]),
        writes=reduce.writes,
        sums=True,
        sum_bias=reduce.vectors[0],
    )


def _is_for_next(ops: Sequence[Op], i: int) -> bool:
    op, after = ops[i], ops[i + 1 : i + 2]
    if op.kind != "linear" or not after or not after[0].gate or after[0].kind != "linear":
        return False
    others = [*ops[: i + 1], *ops[i + 2 :]]
    return op.writes == after[0].reads[:2] and not any(_touches(other.reads, a) for other in others for a in op.writes)


def _touches(some: Sequence[Activation], activation: Activation) -> bool:
    return any(a.index == activation.index for a in some)


def _unchanged(ops: Sequence[Op], activations: Sequence[Activation]) -> bool:
    """Whether none of the ops writes one of these."""
    return not any(_touches(op.writes, a) for op in ops for a in activations)
