"""Norm, rotary embedding, gated activation, sums and attention on every instruction set, against float64.

Tolerances are computed: float32 rounds each of the operations that lead to a result once.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import fourfold._core as _core

EPS = 2.0**-24  # of float32, to nearest
BF16 = 2.0**-9  # of bfloat16, to nearest
E_87 = 1.7e-38  # exp() stops here: what is smaller need not be
SIZES = (1, 7, 15, 16, 17, 48, 64, 100, 576)
HEAD_DIMS = (8, 16, 48, 64, 80, 128)

Floats = NDArray[np.float32]
by_isa = pytest.mark.parametrize("isa", [isa for isa in _core.read_machine().isas() if isa != "amx"])


def numbers(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def close(got: Any, expected: Any, allowed: Any) -> None:
    """Within `allowed`, element by element; the worst is shown."""
    got, expected, allowed = (np.broadcast_to(x, np.shape(expected)) for x in (got, expected, allowed))
    assert np.isfinite(got).all()
    excess = np.abs(got - expected) - allowed
    i = np.unravel_index(excess.argmax(), excess.shape)
    assert excess[i] <= 0, f"at {i}: {got[i]:.9g}, not {expected[i]:.9g} within {allowed[i]:.3g}"


@by_isa
@pytest.mark.parametrize("n", SIZES)
def test_rms_norm(isa: str, n: int) -> None:
    w = numbers(n, seed=1)
    for x in (numbers(n), numbers(n) * np.float32(1e-4), numbers(n) * np.float32(1e15), np.zeros(n, np.float32)):
        y = np.empty(n, np.float32)
        _core.rms_norm(isa, x, w, 1e-5, y)
        wide = x.astype(np.float64)
        expected = wide / np.sqrt((wide * wide).mean() + np.float32(1e-5)) * w
        close(y, expected, EPS * (n + 8) * np.abs(expected))


@by_isa
@pytest.mark.parametrize("d", [2 * n for n in SIZES])
def test_rotary_embedding(isa: str, d: int) -> None:
    x, angles = numbers(d), numbers(d // 2, seed=1) * 10
    c, s = np.cos(angles), np.sin(angles)
    y = x.copy()
    _core.rope(isa, y, c, s)
    a, b, c, s = (v.astype(np.float64) for v in (*np.split(x, 2), c, s))
    close(y[: d // 2], a * c - b * s, 2 * EPS * (abs(a * c) + abs(b * s)))
    close(y[d // 2 :], b * c + a * s, 2 * EPS * (abs(b * c) + abs(a * s)))


@by_isa
@pytest.mark.parametrize("n", SIZES)
def test_silu_gate(isa: str, n: int) -> None:
    b = numbers(n, seed=1)
    for a in (
        numbers(n) * 3,
        numbers(n) * 40,
        numbers(n) * np.float32(1e4),
        np.zeros(n, np.float32),
        -(numbers(n) ** 2),
    ):
        y = np.empty(n, np.float32)
        _core.gate_mul(isa, "silu", a, b, y)
        wide = a.astype(np.float64)
        expected = wide / (1 + np.exp(np.minimum(-wide, 700))) * b
        close(y, expected, 8 * EPS * abs(expected) + E_87 * (1 + abs(wide * b)))


@by_isa
@pytest.mark.parametrize("n", SIZES)
def test_gelu_gate(isa: str, n: int) -> None:
    """gelu(a) = a sigmoid(s): s is rounded some four times, and exp(-|s|) is off by |s| times as much, relatively."""
    b = numbers(n, seed=1)
    for a in (
        numbers(n) * 3,
        numbers(n) * 40,
        numbers(n) * np.float32(1e4),
        numbers(n) * np.float32(1e20),
        np.zeros(n, np.float32),
        -(numbers(n) ** 2),
    ):
        y = np.empty(n, np.float32)
        _core.gate_mul(isa, "gelu_tanh", a, b, y)
        wide = a.astype(np.float64)
        s = np.sqrt(8 / np.pi) * (wide + 0.044715 * wide**3)
        expected = wide / (1 + np.exp(np.minimum(-s, 700))) * b
        off = (8 + 4 * np.minimum(abs(s), 87)) * EPS
        close(y, expected, off * abs(expected) + E_87 * (1 + abs(wide * b)))
    with pytest.raises(ValueError, match="unknown gate: relu"):
        _core.gate_mul(isa, "relu", b, b, b)


@by_isa
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("n_parts", [0, 1, 2, 4, 7])
@pytest.mark.parametrize("has_bias", [False, True])
def test_sums_are_added_from_left_to_right_bit_by_bit(isa: str, n: int, n_parts: int, has_bias: bool) -> None:
    base, parts, bias = numbers(n), numbers(n_parts, n, seed=1) * 100, numbers(n, seed=2) if has_bias else None
    y = np.empty(n, np.float32)
    _core.add_parts(isa, base, parts, bias, y)
    expected = base
    for part in parts:
        expected = expected + part
    assert (y == (expected if bias is None else expected + bias)).all()
    _core.add_parts(isa, base, parts, bias, base)  # in place
    assert (base == y).all()


def as_stored(x: Floats, kv: str) -> NDArray[np.float64]:
    """What a KV page gives back of vectors (T, D)."""
    if kv == "bf16":
        return x.astype(ml_dtypes.bfloat16).astype(np.float64)
    if kv == "int8":
        largest = np.abs(x).max(axis=1, keepdims=True)
        inverse = np.divide(127, largest, out=np.zeros_like(largest), where=largest > 0)
        return np.rint(x * inverse).astype(np.float64) * (largest / np.float32(127))
    return x.astype(np.float64)


def attend(
    isa: str,
    kv: str,
    q: Floats,
    k: Floats,
    v: Floats,
    seen: list[int],
    chunk: int = 128,
    first: list[int] | None = None,
) -> Floats:
    """Of queries that see positions first[i] .. seen[i] - 1; from the first on where there is no `first`."""
    begin = np.array(first or [0] * len(seen), np.int32)
    out = np.full(q.shape, np.nan, np.float32)
    _core.attend(isa, kv, q, k, v, begin, np.array(seen, np.int32), chunk, out)
    return out


def check_attention(
    isa: str, kv: str, q: Floats, k: Floats, v: Floats, seen: list[int], first: list[int] | None = None
) -> None:
    d, out = q.shape[1], attend(isa, kv, q, k, v, seen, first=first)
    for i, n in enumerate(seen):
        begin = first[i] if first else 0
        keys, values = as_stored(k, kv)[begin:n], as_stored(v, kv)[begin:n]
        query, scale = q[i].astype(np.float64), 1 / np.sqrt(d)
        rounding = BF16 if kv == "bf16" else 0  # of queries and of softmax weights
        scores = keys @ query * scale
        score_error = (EPS * (d + 8) + rounding) * (np.abs(keys) @ np.abs(query)).max() * scale
        p = np.exp(scores - scores.max())
        p /= p.sum()
        size = p @ np.abs(values)
        close(out[i], p @ values, size * (np.expm1(2 * score_error) + rounding + EPS * (n + 32)))


@by_isa
@pytest.mark.parametrize("kv", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_attention_at_every_length_to_200(isa: str, kv: str, d: int) -> None:
    k, v = numbers(200, d, seed=1), numbers(200, d, seed=2)
    for t in (*range(1, 20), 31, 33, *range(62, 67), 79, 80, 81, 127, 128, 129, 191, 192, 193, 200):
        check_attention(isa, kv, numbers(1, d, seed=t), k[:t], v[:t], [t])


@by_isa
@given(st.data())
@settings(max_examples=60)
def test_queries_that_share_keys_each_see_their_own_positions(isa: str, data: st.DataObject) -> None:
    kv, d = data.draw(st.sampled_from(["f32", "bf16", "int8"])), data.draw(st.sampled_from(HEAD_DIMS))
    t = data.draw(st.integers(1, 200))
    seen = sorted(data.draw(st.lists(st.integers(1, t), min_size=1, max_size=16)))
    check_attention(isa, kv, numbers(len(seen), d), numbers(t, d, seed=1), numbers(t, d, seed=2), seen)


@by_isa
@given(st.data())
@settings(max_examples=60)
def test_queries_with_a_window_each_see_the_end_of_what_is_before_them(isa: str, data: st.DataObject) -> None:
    kv, d = data.draw(st.sampled_from(["f32", "bf16", "int8"])), data.draw(st.sampled_from(HEAD_DIMS))
    t, window = data.draw(st.integers(1, 400)), data.draw(st.integers(1, 200))
    seen = sorted(data.draw(st.lists(st.integers(1, t), min_size=1, max_size=16)))
    first = [max(0, n - window) for n in seen]
    q, k, v = numbers(len(seen), d), numbers(t, d, seed=1), numbers(t, d, seed=2)
    check_attention(isa, kv, q, k, v, seen, first)
    together = attend(isa, kv, q, k, v, seen, first=first)
    for i, n in enumerate(seen):  # the same bits alone
        assert (attend(isa, kv, q[i : i + 1], k, v, [n], first=[first[i]]) == together[i]).all()


@by_isa
@pytest.mark.parametrize("kv", ["f32", "bf16", "int8"])
def test_what_lies_outside_a_window_is_not_even_read(isa: str, kv: str) -> None:
    q, k, v, seen, first = (
        numbers(3, 64),
        numbers(700, 64, seed=1),
        numbers(700, 64, seed=2),
        [500, 501, 600],
        [460] * 3,
    )
    whole = attend(isa, kv, q, k, v, seen, first=first)
    k[:448], v[:448], k[640:] = np.nan, np.nan, np.nan  # whole pages: one not-a-number read would be in every answer
    assert (attend(isa, kv, q, k, v, seen, first=first) == whole).all()


@by_isa
@pytest.mark.parametrize("kv", ["f32", "bf16", "int8"])
def test_a_query_among_others_has_the_same_answer_whoever_they_are(isa: str, kv: str) -> None:
    q, k, v = numbers(4, 64), numbers(150, 64, seed=1), numbers(150, 64, seed=2)
    together = attend(isa, kv, q, k, v, [20, 64, 65, 150])
    others = attend(isa, kv, np.stack([q[0], *numbers(3, 64, seed=9)]), k, v, [20, 100, 120, 130])
    assert (together[0] == others[0]).all()


@by_isa
@pytest.mark.parametrize("kv", ["f32", "bf16", "int8"])
def test_chunks_only_change_the_order_of_sums(isa: str, kv: str) -> None:
    q, k, v, seen = numbers(6, 64), numbers(700, 64, seed=1), numbers(700, 64, seed=2), [1, 64, 65, 300, 511, 700]
    for chunk in (64, 192, 256, 704):
        out = attend(isa, kv, q, k, v, seen, chunk)
        close(out, attend(isa, kv, q, k, v, seen, 1024), 2000 * EPS * np.abs(v).max())


@by_isa
@pytest.mark.parametrize("kv", ["f32", "bf16", "int8"])
def test_extreme_scores_neither_overflow_nor_lose_the_answer(isa: str, kv: str) -> None:
    q, k, v = np.zeros((2, 64), np.float32), np.zeros((130, 64), np.float32), numbers(130, 64)
    q[:, 0] = 1e10
    close(attend(isa, kv, q, k, v, [1, 130])[1], as_stored(v, kv).mean(axis=0), 200 * EPS * np.abs(v).mean(axis=0))
    for size in (1e4, 1e10, 1e20):
        k[:, 0] = -size  # every score far below zero, and one above it
        k[77, 0] = size
        first, second = attend(isa, kv, q, k, v, [70, 130])
        close(second, as_stored(v, kv)[77], 4 * EPS * np.abs(v[77]))
        close(first, as_stored(v[:70], kv).mean(axis=0), 200 * EPS * np.abs(v[:70]).mean(axis=0))
    k[:, 0] = np.linspace(-1e4, 1e4, 130)  # each page's largest beyond the last
    close(attend(isa, kv, q, k, v, [50, 130]), as_stored(v, kv)[[49, 129]], 4 * EPS * np.abs(v[[49, 129]]))
    k[:, 0] = k[::-1, 0].copy()  # the largest first
    close(attend(isa, kv, q, k, v, [50, 130]), as_stored(v, kv)[[0, 0]], 4 * EPS * np.abs(v[[0, 0]]))
