"""A model as a program: the list of ops that a model file writes down, before it knows about memory or machines.

Activations and weights are named by handles; `Cut` says how a dimension is divided over ranks. `engine.py` turns the
list into the native program. Nothing here holds numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from fourfold.config import Gate, ModelConfig
from fourfold.errors import UnsupportedError

TILE_N, TILE_K = 16, 64  # outputs and inputs of a tile: where weights may be cut

Range = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """One dimension divided over ranks: the ranges of each, in order. Two ranks may hold the same range (KV heads)."""

    size: int
    ranges: tuple[tuple[Range, ...], ...]

    @property
    def widths(self) -> list[int]:
        """What each rank holds."""
        return [sum(end - begin for begin, end in rank) for rank in self.ranges]

    def repeated(self, taps: int) -> Cut:
        """The cut of `taps` copies of the dimension side by side, each cut alike."""
        if all(rank == ((0, self.size),) for rank in self.ranges):
            return whole(taps * self.size, len(self.ranges))
        ranges = tuple(
            tuple((t * self.size + begin, t * self.size + end) for t in range(taps) for begin, end in rank)
            for rank in self.ranges
        )
        return Cut(taps * self.size, ranges)


def whole(size: int, n_ranks: int) -> Cut:
    """Every rank holds all."""
    return Cut(size, (((0, size),),) * n_ranks)


def even_shares(n_units: int, n_ranks: int) -> list[Range]:
    """Units divided as evenly as can be, the first ranks holding one more; some may hold none."""
    base, more = divmod(n_units, n_ranks)
    bounds = [0]
    for rank in range(n_ranks):
        bounds.append(bounds[-1] + base + (rank < more))
    return list(pairwise(bounds))


def split(size: int, n_ranks: int, unit: int) -> Cut:
    """A dimension cut at multiples of `unit`; the last piece may be ragged."""
    shares = even_shares(-(-size // unit), n_ranks)
    return Cut(size, tuple(((a * unit, min(b * unit, size)),) if b > a else () for a, b in shares))


@dataclass(frozen=True)
class HeadCut:
    """Attention heads over ranks: the query heads of each, and the KV heads they read (shared ones held twice)."""

    q: Cut
    kv: Cut
    kv_of_head: list[list[int]]  # per rank, for each of its query heads the local KV head


def cut_heads(config: ModelConfig, n_ranks: int) -> HeadCut:
    """Query heads in units that fill whole tiles of inputs. Raises UnsupportedError where a rank would have none."""
    d, group = config.head_dim, config.n_heads // config.n_kv_heads
    unit = 1
    while unit * d % TILE_K and unit < config.n_heads:
        unit += 1
    n_units = -(-config.n_heads // unit)
    if n_ranks > n_units:
        raise UnsupportedError(
            f"{n_ranks} ranks are more than this model can be cut for: its {config.n_heads} attention heads of {d} "
            f"make {n_units} piece{'s' if n_units > 1 else ''}; use --ranks {n_units} or fewer"
        )
    q, kv, kv_of_head = [], [], []
    for a, b in even_shares(n_units, n_ranks):
        first, last = a * unit, min(b * unit, config.n_heads)
        kv_first, kv_last = first // group, (last - 1) // group + 1
        q.append(((first * d, last * d),))
        kv.append(((kv_first * d, kv_last * d),))
        kv_of_head.append([h // group - kv_first for h in range(first, last)])
    if d % TILE_N and n_ranks > 1:
        raise UnsupportedError(f"heads of {d} cannot be cut over ranks; use --ranks 1")
    return HeadCut(Cut(config.n_heads * d, tuple(q)), Cut(config.n_kv_heads * d, tuple(kv)), kv_of_head)


Vector = tuple[str, Cut]
OpKind = Literal["embed", "norm", "normed", "linear", "reduce", "cache", "attend", "gated", "with_previous", "select"]


@dataclass(frozen=True)
class Activation:
    """A named intermediate: rows of the step's tokens (or of its output rows) × the width of each rank."""

    index: int
    cut: Cut
    of_outputs: bool = False
    is_partial: bool = False  # sums over one rank's inputs, to be reduced


@dataclass(frozen=True)
class Op:
    """One op. `weights` and vectors name weights; their cuts say what each rank holds.

    A linear op reads its input, or the gate and what it gates, then the base of its sum if it has one; it writes an
    activation for each weight, the head none, and where it has a sum that alone.
    """

    kind: OpKind
    reads: tuple[Activation, ...]
    writes: tuple[Activation, ...]
    weights: tuple[tuple[str, Cut, Cut], ...] = ()  # (name, outputs, inputs)
    vectors: tuple[Vector | None, ...] = ()
    layer: int = 0
    norm: Vector | None = None  # of a linear op: its input is normed with it
    gate: Gate | None = None  # of a gated op, or of a linear op: its input is gate(first) · second
    sums: bool = False  # of a linear op: base + its outputs (+ bias) is what is written
    sum_bias: Vector | None = None
    is_for_next: bool = False  # of a linear op: the next one, its only reader, gates its outputs


@dataclass
class ProgramBuilder:
    """What `models.*.describe` writes on."""

    config: ModelConfig
    n_ranks: int
    ops: list[Op] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._heads = cut_heads(self.config, self.n_ranks)

    def heads(self) -> Cut:
        """The outputs of q, and the inputs of the attention's output projection."""
        return self._heads.q

    def kv_heads(self) -> Cut:
        """The outputs of k and v."""
        return self._heads.kv

    def kv_of_head(self) -> list[list[int]]:
        """Per rank, the local KV head of each local query head."""
        return self._heads.kv_of_head

    def split(self, size: int) -> Cut:
        """A hidden dimension: outputs of one matrix and inputs of the next."""
        return split(size, self.n_ranks, TILE_K)

    def _whole(self, size: int) -> Cut:
        return whole(size, self.n_ranks)

    def _new(self, cut: Cut, *, of_outputs: bool = False, is_partial: bool = False) -> Activation:
        self.activations.append(Activation(len(self.activations), cut, of_outputs, is_partial))
        return self.activations[-1]

    def embed(self, weight: str) -> Activation:
        """Rows of the embedding, times the config's scale: (M, dim)."""
        dim = self.config.dim
        x = self._new(self._whole(dim))
        outputs = split(self.config.vocab_size, self.n_ranks, TILE_N)
        self.ops.append(Op("embed", (), (x,), weights=((weight, outputs, self._whole(dim)),)))
        return x

    def norm(self, x: Activation, weight: str) -> Activation:
        """RMS norm with the model's epsilon."""
        y = self._new(x.cut, of_outputs=x.of_outputs)
        self.ops.append(Op("norm", (x,), (y,), vectors=((weight, x.cut),)))
        return y

    def linear(
        self, x: Activation, weights: list[str], rows: list[Cut], biases: list[str | None] | None = None
    ) -> list[Activation]:
        """Matrices that read the same x, each cut by its outputs."""
        outs = [self._new(cut, of_outputs=x.of_outputs) for cut in rows]
        cuts = tuple((w, cut, self._whole(x.cut.size)) for w, cut in zip(weights, rows, strict=True))
        vectors = tuple((b, cut) if b else None for b, cut in zip(biases or [None] * len(rows), rows, strict=True))
        self.ops.append(Op("linear", (x,), tuple(outs), weights=cuts, vectors=vectors))
        return outs

    def sum_linear(
        self, base: Activation, x: Activation, weight: str, *, inputs: Cut, taps: int = 1, bias: str | None = None
    ) -> Activation:
        """base + W x (+ bias), W cut by its inputs and its partial sums added over the ranks: a new activation."""
        if taps > 1 and self.n_ranks > 1 and inputs.size % TILE_K:
            raise UnsupportedError(
                f"{weight}: {inputs.size} inputs, {taps} times, cannot be cut at multiples of {TILE_K}; use --ranks 1"
            )
        y = self._new(base.cut)
        self._reduce(base, x, weight, inputs.repeated(taps), bias, y)
        return y

    def add_linear(self, base: Activation, x: Activation, weight: str, *, inputs: Cut) -> None:
        """base += W x, W cut by its inputs."""
        self._reduce(base, x, weight, inputs, None, base)

    def _reduce(
        self, base: Activation, x: Activation, weight: str, inputs: Cut, bias: str | None, y: Activation
    ) -> None:
        partial = self._new(base.cut, is_partial=True)
        self.ops.append(Op("linear", (x,), (partial,), weights=((weight, base.cut, inputs),), vectors=(None,)))
        self.ops.append(Op("reduce", (partial, base), (y,), vectors=((bias, base.cut) if bias else None,)))

    def add_normed_linear(self, base: Activation, x: Activation, weight: str, *, inputs: Cut, norm: str) -> None:
        """base += norm(W x), W cut by its inputs: all ranks' sums come before the norm."""
        y = self._new(base.cut, is_partial=self.n_ranks > 1)
        self.ops.append(Op("linear", (x,), (y,), weights=((weight, base.cut, inputs),), vectors=(None,)))
        if y.is_partial:
            partial, y = y, self._new(base.cut)
            self.ops.append(Op("reduce", (partial,), (y,), vectors=(None,)))
        self.ops.append(Op("normed", (base, y), (base,), vectors=((norm, base.cut),)))

    def attend(
        self,
        q: Activation,
        k: Activation,
        v: Activation,
        *,
        layer: int,
        head_norms: tuple[str, str] | None = None,
    ) -> Activation:
        """Rotary embedding, the KV cache of the layer, softmax attention; angles, window and scale are the config's.

        `head_norms`: vectors (head_dim) that every head of q, and of k, is normed with before it is rotated.
        """
        y = self._new(q.cut)
        norms = tuple((name, self._whole(self.config.head_dim)) for name in head_norms or ())
        self.ops.append(Op("cache", (q, k, v), (q, k), vectors=norms, layer=layer))
        self.ops.append(Op("attend", (q,), (y,), layer=layer))
        return y

    def gated(self, gate: Activation, up: Activation, through: Gate = "silu") -> Activation:
        """through(gate) · up."""
        y = self._new(gate.cut)
        self.ops.append(Op("gated", (gate, up), (y,), gate=through))
        return y

    def with_previous(self, x: Activation) -> Activation:
        """[x of the token before | x]: what a convolution over time with kernel 2 reads."""
        y = self._new(x.cut.repeated(2))
        self.ops.append(Op("with_previous", (x,), (y,)))
        return y

    def head(self, x: Activation, norm: str, weight: str) -> None:
        """Final norm and logits of the step's output rows."""
        rows = self._new(x.cut, of_outputs=True)
        self.ops.append(Op("select", (x,), (rows,)))
        h = self.norm(rows, norm)
        outputs = split(self.config.vocab_size, self.n_ranks, TILE_N)
        cuts = ((weight, outputs, self._whole(x.cut.size)),)
        self.ops.append(Op("linear", (h,), (), weights=cuts, vectors=(None,)))


def assign_buffers(ops: list[Op], activations: list[Activation]) -> tuple[list[int], list[Activation]]:
    """Physical buffers for activations: (buffer of each activation, an activation of each buffer's shape).

    An activation's buffer is free again after its last reader. Partial sums take turns between two buffers: a rank may
    still read one while another writes the next.
    """
    last_use = {a.index: i for i, op in enumerate(ops) for a in (*op.reads, *op.writes)}
    buffers: list[Activation] = []
    free: dict[tuple[Cut, bool], list[int]] = {}
    turns: dict[Cut, list[int]] = {}
    place = [-1] * len(activations)

    def fresh(a: Activation) -> int:
        buffers.append(a)
        return len(buffers) - 1

    n_partials: dict[Cut, int] = {}
    for i, op in enumerate(ops):
        for a in op.writes:
            if place[a.index] >= 0:
                continue
            if a.is_partial:
                pair = turns.setdefault(a.cut, [])
                turn = n_partials[a.cut] = n_partials.get(a.cut, -1) + 1
                if len(pair) < 2:
                    pair.append(fresh(a))
                place[a.index] = pair[turn % 2]
            else:
                spare = free.get((a.cut, a.of_outputs))
                place[a.index] = spare.pop() if spare else fresh(a)
        for a in {a.index: a for a in (*op.reads, *op.writes)}.values():
            if last_use[a.index] == i and not a.is_partial:
                free.setdefault((a.cut, a.of_outputs), []).append(place[a.index])
    return place, buffers
