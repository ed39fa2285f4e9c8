"""Fewer ops, the same bits; and what may not be handed to a linear op stays an op."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fourfold._core as _core
import fourfold.engine
import tiny
from chain import make_team
from fourfold import models
from fourfold.checkpoint import open_source
from fourfold.config import WeightFormat
from fourfold.conversion import convert
from fourfold.engine import Engine
from fourfold.fusion import fuse, one_format_each
from fourfold.program import Op, ProgramBuilder
from test_program import config

CONFIGS = {
    "llama": tiny.CONFIG | {"hidden_size": 200, "num_attention_heads": 10, "num_key_value_heads": 5},  # ragged tiles
    "qwen2": tiny.QWEN2 | {"hidden_size": 256, "intermediate_size": 256},
    "ragged": tiny.QWEN2 | {"hidden_size": 256, "intermediate_size": 176},
    "yuan": tiny.YUAN,
    "wide": tiny.QWEN2 | {"hidden_size": 256, "intermediate_size": 1848, "max_position_embeddings": 2048},
}


def kinds(ops: list[Op]) -> list[str]:
    return [op.kind for op in ops]


def program(model_type: str, n_ranks: int) -> ProgramBuilder:
    model = config(model_type, n_layers=1, qkv_bias=model_type == "qwen2")
    builder = ProgramBuilder(model, n_ranks)
    models.architecture(model_type).describe(model, builder)
    return builder


def test_a_layer_of_llama_in_fewest_ops() -> None:
    ops = fuse(program("llama", 1).ops, 1)
    assert kinds(ops) == ["embed", "linear", "cache", "attend", "linear", "linear", "linear", "select", "linear"]
    qkv, o, gate_up, down, head = (op for op in ops if op.kind == "linear")
    assert [op.norm and op.norm[0] for op in (qkv, o, gate_up, down, head)] == [
        "layers.0.attention_norm", None, "layers.0.mlp_norm", None, "norm",
    ]  # fmt: skip
    assert [op.sums for op in (qkv, o, gate_up, down, head)] == [False, True, False, True, False]
    assert [op.gate for op in (qkv, o, gate_up, down, head)] == [None, None, None, "silu", None]


def test_gate_and_up_are_for_the_next_op_where_they_are_one_op() -> None:
    ops = fuse(program("llama", 1).ops, 1)
    assert [op.is_for_next for op in ops].count(True) == 1
    formats: dict[str, WeightFormat] = {name: "nf4" for op in ops for name, *_ in op.weights}
    assert [op.is_for_next for op in one_format_each(ops, formats)].count(True) == 1
    parted = one_format_each(ops, formats | {"layers.0.up": "int8"})
    assert kinds(parted).count("linear") == kinds(ops).count("linear") + 1
    assert not any(op.is_for_next for op in parted)


def test_over_ranks_the_sums_stay() -> None:
    ops = fuse(program("qwen2", 2).ops, 2)
    assert kinds(ops) == [
        *("embed", "linear", "cache", "attend", "linear", "reduce", "linear", "linear", "reduce", "select", "linear")
    ]
    assert not any(op.sums for op in ops)


def test_a_norm_that_several_ops_read_stays() -> None:
    ops = fuse(program("yuan", 1).ops, 1)
    (norm,) = (op for op in ops if op.kind == "norm")
    assert norm.vectors[0] is not None
    assert norm.vectors[0][0] == "layers.0.attention_norm"
    assert kinds(ops).count("with_previous") == 2
    (conv2,) = (op for op in ops if op.sum_bias is not None)
    assert (conv2.weights[0][0], conv2.sum_bias and conv2.sum_bias[0]) == ("layers.0.conv2", "layers.0.conv2_bias")


@pytest.mark.parametrize("changes_between", [False, True])
def test_a_norm_of_what_changes_before_it_is_multiplied_stays(changes_between: bool) -> None:
    builder = ProgramBuilder(config(), 1)
    x = builder.embed("embed")
    h = builder.norm(x, "early")
    if changes_between:
        (w,) = builder.linear(x, ["w"], [builder.split(320)])
        builder.add_linear(x, w, "v", inputs=builder.split(320))
    builder.linear(h, ["u"], [builder.split(320)])
    assert ("norm" in kinds(fuse(builder.ops, 1))) == changes_between


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    def directory(name: str, fmt: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        with open_source(
            tiny.write_huggingface(folder / "source", CONFIGS[name], tiny.tensors(CONFIGS[name]))
        ) as source:
            convert(source, folder / fmt, fmt)
        return folder / fmt

    return directory


def logits(path: Path, rows: tuple[int, ...] = (70, 1, 3, 1), **options: Any) -> list[Any]:
    engine = Engine(path, **options)
    sequence = engine.new_sequence()
    found = [engine.extend(sequence, [i % 40 + 1 for i in range(n)]) for n in rows]
    engine.close()
    return found


@pytest.mark.parametrize("fmt", ["nf4", "f32"])
@pytest.mark.parametrize(("name", "options"), [
    ("llama", {"ranks": 1}), ("llama", {"ranks": 1, "threads": 1}), ("qwen2", {"ranks": 2}),
    ("yuan", {"ranks": 1}), ("yuan", {"ranks": 3}), ("ragged", {"threads": 1}), ("ragged", {"ranks": 2}),
])  # fmt: skip
def test_fused_or_not_a_model_gives_the_same_bits(
    directory: Any, name: str, fmt: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory(name, fmt)
    fused = logits(path, **options)
    monkeypatch.setattr(fourfold.engine, "fuse", lambda ops, _: ops)
    for ours, theirs in zip(fused, logits(path, **options), strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_array_equal(ours, theirs)


def test_a_sum_over_ranks_is_not_a_linears_own() -> None:
    program = _core.make_program(
        make_team(2), max_tokens=1, n_slots=1, context=1, n_pages=1, head_dim=16, kv="f32", isa="scalar"
    )
    x, y, total = (program.add_buffer([width] * 2, False) for width in (64, 16, 16))
    weight = _core.make_weight("f32", 16, 128, [([(0, 16)], [(0, 64)]), ([(0, 16)], [(64, 128)])], make_team(2))
    with pytest.raises(ValueError, match="only where one rank has all inputs of one part"):
        program.add_linear(x, [(program.add_weight(weight), y, [])], base=total, sum=total)


@pytest.mark.parametrize("fmt", ["nf4", "bf16", "f32"])
@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 2}, {"ranks": 2}])
def test_more_rows_and_outputs_than_a_piece_has_give_the_same_bits(
    directory: Any, fmt: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fourfold.engine, "MAX_STEP_TOKENS", 1100)  # blocks of 512, 512 and 76 rows
    path = directory("wide", fmt)
    fused = logits(path, rows=(1100, 513), **options)
    monkeypatch.setattr(fourfold.engine, "fuse", lambda ops, _: ops)
    for ours, theirs in zip(fused, logits(path, rows=(1100, 513), **options), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def ops_that_pack(path: Path, **options: Any) -> list[bool]:
    """Of each linear op: whether it spent time on packing its input."""
    engine = Engine(path, **options)
    engine._program.record(True)
    engine.extend(engine.new_sequence(), [1, 2, 3])
    packed = set()
    for rank, plan in enumerate(engine.plan):
        for thread in range(len(plan.cpus)):
            marks = np.frombuffer(engine._program.marks(rank, thread), "<i8, <i4, <i4")
            packed |= {int(op) for _, op, phase in marks if _core.PHASES[phase] == "pack"}
    names = engine._program.op_names
    engine.close()
    return [i in packed for i, name in enumerate(names) if name == "linear"]


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 2}, {"ranks": 2}])
@pytest.mark.parametrize("name", ["qwen2", "ragged"])
def test_gate_and_up_are_packed_by_whoever_made_them(directory: Any, name: str, options: dict[str, Any]) -> None:
    layer = [True, True, True, False]  # q k v; o; gate and up; down
    packs = ops_that_pack(directory(name, "nf4"), **options)
    if name == "ragged" and options == {"threads": 2}:  # whole tiles would give one of a rank's threads more to do
        layer[-1] = True
    assert packs == layer * CONFIGS[name]["num_hidden_layers"] + [True]


def test_a_linear_for_the_next_op_is_held_to_it() -> None:
    """Whoever says so of one whose outputs another op reads, or nobody gates, would get wrong products."""
    program = _core.make_program(
        make_team(1), max_tokens=1, n_slots=1, context=1, n_pages=1, head_dim=16, kv="f32", isa="scalar"
    )
    x, gate, up, y = (program.add_buffer([64], False) for _ in range(4))
    weights = [
        program.add_weight(_core.make_weight("f32", 64, 64, [([(0, 64)], [(0, 64)])], make_team(1))) for _ in range(3)
    ]
    program.add_linear(x, [(weights[0], gate, []), (weights[1], up, [])], is_for_next=True)
    program.add_linear(gate, [(weights[2], y, [])], up=x)
    with pytest.raises(ValueError, match="gates its two outputs"):
        program.finish()
