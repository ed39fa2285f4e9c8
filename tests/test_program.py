"""A model's program: where its weights may be cut, which buffers it needs, and that a cut weight is the same weight."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fourfold._core as _core
from chain import Chain, make_team
from fourfold import format as tiles
from fourfold import models
from fourfold.config import ModelConfig
from fourfold.errors import UnsupportedError
from fourfold.fusion import fuse
from fourfold.program import Activation, Cut, Op, ProgramBuilder, assign_buffers, cut_heads, split, whole


def config(model_type: str = "llama", *, heads: int = 4, kv_heads: int = 4, d: int = 64, **fields: Any) -> ModelConfig:
    defaults = {"vocab_size": 300, "dim": heads * d, "n_layers": 2, "hidden_dim": 320, "norm_eps": 1e-6}
    defaults |= {"rope_theta": 1e4, "max_context": 512, "tie_embeddings": True} | fields
    return ModelConfig(model_type, n_heads=heads, n_kv_heads=kv_heads, head_dim=d, **defaults)


# ---- cuts


@given(size=st.integers(1, 5000), n_ranks=st.integers(1, 9), unit=st.sampled_from([16, 64]))
def test_split_covers_a_dimension_once_in_order_and_evenly(size: int, n_ranks: int, unit: int) -> None:
    cut = split(size, n_ranks, unit)
    ranges = [r for rank in cut.ranges for r in rank]
    assert [0, *(end for _, end in ranges)] == [*(begin for begin, _ in ranges), size]
    assert all(begin % unit == 0 for begin, _ in ranges)
    units = [-(-width // unit) for width in cut.widths]
    assert max(units) - min(units) <= 1
    assert units == sorted(units, reverse=True)


def test_split_by_example() -> None:
    assert split(320, 2, 64).ranges == (((0, 192),), ((192, 320),))
    assert split(100, 3, 64).ranges == (((0, 64),), ((64, 100),), ())
    assert whole(10, 2).ranges == (((0, 10),), ((0, 10),))


def test_a_repeated_cut_gives_each_rank_its_part_of_every_copy() -> None:
    assert split(256, 2, 64).repeated(2) == Cut(512, (((0, 128), (256, 384)), ((128, 256), (384, 512))))


@given(
    group=st.integers(1, 8), kv_heads=st.integers(1, 12), d=st.sampled_from([16, 48, 64, 80, 128]), n=st.integers(1, 8)
)
def test_every_query_head_lies_on_one_rank_beside_the_keys_it_reads(group: int, kv_heads: int, d: int, n: int) -> None:
    model = config(heads=group * kv_heads, kv_heads=kv_heads, d=d)
    try:
        cut = cut_heads(model, n)
    except UnsupportedError:
        return
    seen = []
    for rank in range(n):
        ((first, last),), ((kv_first, kv_last),) = cut.q.ranges[rank], cut.kv.ranges[rank]
        assert first % 64 == 0, "the output projection is cut here, at whole tiles of inputs"
        assert kv_first % 16 == 0
        heads = range(first // d, last // d)
        assert [kv_first // d + local for local in cut.kv_of_head[rank]] == [head // group for head in heads]
        assert max(cut.kv_of_head[rank]) == (kv_last - kv_first) // d - 1, "a rank holds no key head it does not read"
        seen += heads
    assert seen == list(range(model.n_heads))


def test_uneven_heads_go_to_the_first_ranks_and_a_shared_key_head_is_held_twice() -> None:
    cut = cut_heads(config(heads=9, kv_heads=3, d=64), 4)
    assert cut.q.widths == [192, 128, 128, 128]
    assert cut.kv.ranges == (((0, 64),), ((64, 128),), ((64, 192),), ((128, 192),))
    assert cut.kv_of_head == [[0, 0, 0], [0, 0], [0, 1], [0, 0]]
    assert cut_heads(config(heads=6, kv_heads=6, d=48), 2).q.widths == [192, 96]  # four heads fill three tiles


@pytest.mark.parametrize(
    ("heads", "d", "n_ranks", "message"),
    [
        (4, 64, 5, "5 ranks .* its 4 attention heads of 64 make 4 pieces; use --ranks 4 or fewer"),
        (6, 48, 3, "3 ranks .* its 6 attention heads of 48 make 2 pieces; use --ranks 2 or fewer"),
        (8, 8, 2, "2 ranks .* its 8 attention heads of 8 make 1 piece; use --ranks 1 or fewer"),
        (16, 8, 2, "heads of 8 cannot be cut over ranks; use --ranks 1"),
    ],
)
def test_more_ranks_than_can_be_cut_are_refused_in_a_sentence(heads: int, d: int, n_ranks: int, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        ProgramBuilder(config(heads=heads, kv_heads=heads, d=d), n_ranks)


# ---- buffers


def check_buffers(ops: list[Op], activations: list[Activation]) -> None:
    """Walks the ops as a machine with nothing but the buffers would."""
    place, buffers = assign_buffers(ops, activations)
    holds: dict[int, int] = {}
    partials: dict[int, int] = {}  # buffer -> when it was last written
    n_partials = 0
    for op in ops:
        for a in op.reads:
            assert holds[place[a.index]] == a.index, f"{op.kind} reads what another activation has overwritten"
        for a in op.writes:
            for other in (*op.reads, *op.writes):
                assert other.index == a.index or place[other.index] != place[a.index], f"{op.kind} overwrites its input"
            buffer = buffers[place[a.index]]
            assert (buffer.cut, buffer.of_outputs, buffer.is_partial) == (a.cut, a.of_outputs, a.is_partial)
            if a.is_partial:
                n_partials += 1
                assert partials.get(place[a.index], -2) < n_partials - 1, "another rank may still read these sums"
                partials[place[a.index]] = n_partials
            holds[place[a.index]] = a.index


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
@pytest.mark.parametrize("model_type", models.MODEL_TYPES)
def test_no_model_overwrites_what_it_still_needs(model_type: str, n_ranks: int) -> None:
    counts = []
    for n_layers in (2, 7):
        model = config(model_type, n_layers=n_layers, qkv_bias=model_type == "qwen2")
        builder = ProgramBuilder(model, n_ranks)
        models.architecture(model_type).describe(model, builder)
        check_buffers(builder.ops, builder.activations)
        check_buffers(fused := fuse(builder.ops, n_ranks), builder.activations)
        counts.append(len(assign_buffers(fused, builder.activations)[1]))
    assert counts[0] == counts[1], "buffers must not grow with the layers"


@given(st.data())
def test_no_program_overwrites_what_it_still_needs(data: st.DataObject) -> None:
    builder = ProgramBuilder(config(), data.draw(st.integers(1, 4)))
    x = builder.embed("embed")
    wide: list[Activation] = [x]  # whole on every rank
    hidden = builder.split(320)
    for i in range(data.draw(st.integers(1, 12))):
        kind = data.draw(st.sampled_from(["norm", "attend", "feed forward", "sum", "filter"]))
        source = data.draw(st.sampled_from(wide))
        base = data.draw(st.sampled_from(wide))
        if kind == "norm":
            wide.append(builder.norm(source, f"{i}"))
        elif kind == "attend":
            cuts = [builder.heads(), builder.kv_heads(), builder.kv_heads()]
            builder.add_linear(base, builder.attend(*builder.linear(source, ["q", "k", "v"], cuts), layer=i), "o",
                               inputs=builder.heads())  # fmt: skip
        elif kind == "feed forward":
            gate, up = builder.linear(source, ["gate", "up"], [hidden, hidden])
            builder.add_linear(base, builder.gated(gate, up), "down", inputs=hidden)
        elif kind == "sum":
            (h,) = builder.linear(source, ["w"], [hidden])
            wide.append(builder.sum_linear(base, h, "s", inputs=hidden, bias="b"))
        else:
            (h,) = builder.linear(builder.with_previous(source), ["w"], [hidden])
            wide.append(builder.sum_linear(base, builder.with_previous(h), "s", inputs=hidden, taps=2))
    builder.head(data.draw(st.sampled_from(wide)), "norm", "embed")
    check_buffers(builder.ops, builder.activations)
    check_buffers(fuse(builder.ops, builder.n_ranks), builder.activations)


# ---- weights


def ranges_of(owners: list[int], rank: int, unit: int, size: int) -> list[tuple[int, int]]:
    """The ranges that a rank owns where owners[i] has the i-th unit."""
    bounds = [0, *(i for i in range(1, len(owners)) if owners[i] != owners[i - 1]), len(owners)]
    return [(a * unit, min(b * unit, size)) for a, b in pairwise(bounds) if owners[a] == rank]


TEAMS: dict[int, Any] = {}


@pytest.mark.parametrize("fmt", tiles.CODE_BYTES)
@given(st.data())
@settings(max_examples=15)
def test_a_weight_cut_anywhere_multiplies_as_the_whole_one_does(fmt: str, data: st.DataObject) -> None:
    n_ranks = data.draw(st.integers(2, 4))
    n_tiles = data.draw(st.integers(1, 9))
    inner = 64 * n_tiles - data.draw(st.integers(0, 63))
    owners = data.draw(st.lists(st.integers(0, n_ranks - 1), min_size=n_tiles, max_size=n_tiles))
    cut = [ranges_of(owners, rank, 64, inner) for rank in range(n_ranks)]
    n_out = data.draw(st.integers(17, 100))
    ends = sorted(data.draw(st.lists(st.integers(0, n_out // 16), min_size=n_ranks - 1, max_size=n_ranks - 1)))
    bounds = [0, *(16 * end for end in ends), n_out]
    logits_cut = [[(a, b)] if a < b else [] for a, b in pairwise(bounds)]

    rng = np.random.default_rng(inner)
    x, first, second = (
        rng.standard_normal(shape, dtype=np.float32) for shape in ((9, 90), (inner, 90), (n_out, inner))
    )
    team = TEAMS.setdefault(n_ranks, make_team(n_ranks))
    one = TEAMS.setdefault(1, make_team(1))
    for formats in ((fmt, "f32"), ("f32", fmt)):
        sliced = Chain(team, x, first, second, cut, formats=formats, logits_cut=logits_cut).step()
        unsliced = Chain(one, x, first, second, [[(0, inner)]], formats=formats).step()
        # Inputs are rounded tile by tile, so that cutting changes nothing but the order of float32 sums.
        size = np.abs(x @ first.T) @ np.abs(second.T)
        assert (np.abs(sliced - unsliced) <= 2.0**-22 * (inner + 90) * size).all()


@example(fmt="nf4", n=40, k=200)
@given(fmt=st.sampled_from(list(tiles.CODE_BYTES)), n=st.integers(1, 300), k=st.integers(1, 700))
def test_a_slice_of_everything_takes_the_bytes_of_the_format(fmt: Any, n: int, k: int) -> None:
    assert _core.slice_bytes(fmt, [(0, n)], [(0, k)]) == tiles.stored_bytes(fmt, (n, k))


@pytest.mark.parametrize(
    ("outputs", "inputs", "message"),
    [
        ([(8, 32)], [(0, 200)], "multiples of 16 within 40, not at 8 to 32"),
        ([(0, 24)], [(0, 200)], "multiples of 16 within 40, not at 0 to 24"),
        ([(0, 48)], [(0, 200)], "multiples of 16 within 40, not at 0 to 48"),
        ([(16, 16)], [(0, 200)], "multiples of 16 within 40, not at 16 to 16"),
        ([(0, 40)], [(32, 200)], "multiples of 64 within 200, not at 32 to 200"),
        ([(0, 40)], [(0, 256)], "multiples of 64 within 200, not at 0 to 256"),
    ],
)
def test_a_slice_off_the_tile_grid_is_refused(outputs: Any, inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.make_weight("nf4", 40, 200, [(outputs, inputs)], make_team(1))


def test_panels_of_another_shape_are_refused() -> None:
    team = make_team(1)
    weight = _core.make_weight("nf4", 40, 200, [([(0, 40)], [(0, 200)])], team)
    panels, scales = np.zeros((3, tiles.panel_bytes("nf4", 200)), np.uint8), np.zeros(3, np.float32)
    weight.load(team, panels, scales)
    for wrong, message in (((panels[:2], scales[:2]), "weight's shape"), ((panels, None), "one scale for each panel")):
        with pytest.raises(ValueError, match=message):
            weight.load(team, *wrong)
