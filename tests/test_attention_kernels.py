"""Every row of the table of attention kernels, against float64 over what their pages hold.

Tolerances are computed: float32 rounds each of the operations that lead to a result once, a row what it declares too.
Each call is checked for writes outside of what the kernel was given (csrc/bind_kernels.cpp).
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
from closeness import Floats, close, numbers

ROWS: dict[str, dict[str, Any]] = {row["name"]: row for row in _core.attend_kernels()}
ISAS = _core.read_machine().isas()
EPS = 2.0**-24  # of float32, to nearest
HEAD_DIMS = (8, 16, 48, 64, 80, 128)
ODD_DIMS = (1, 7, 31, 33, 40, 63, 65, 96, 112, 127, 192, 200, 255, 256)


@pytest.fixture(params=ROWS, scope="module")
def kernel(request: pytest.FixtureRequest) -> str:
    """The name of a row that this machine can run."""
    name: str = request.param
    if ROWS[name]["isa"] not in ISAS:
        pytest.skip(f"{name} needs {ROWS[name]['isa']}")
    return name


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
    kernel: str, q: Floats, k: Floats, v: Floats, seen: list[int], first: list[int] | None = None, chunk: int = 128
) -> Floats:
    """Of queries that see positions first[i] .. seen[i] - 1; from the first on where there is no `first`."""
    begin = np.array(first or [0] * len(seen), np.int32)
    out = np.full(q.shape, np.nan, np.float32)
    _core.attend(kernel, q, k, v, begin, np.array(seen, np.int32), chunk, out)
    return out


def check_attention(
    kernel: str, q: Floats, k: Floats, v: Floats, seen: list[int], first: list[int] | None = None, chunk: int = 128
) -> None:
    kv, rounding = ROWS[kernel]["kv"], ROWS[kernel]["rounding"]
    d, out = q.shape[1], attend(kernel, q, k, v, seen, first, chunk)
    for i, n in enumerate(seen):
        begin = first[i] if first else 0
        keys, values = as_stored(k, kv)[begin:n], as_stored(v, kv)[begin:n]
        query, scale = q[i].astype(np.float64), 1 / np.sqrt(d)
        scores = keys @ query * scale
        score_error = (EPS * (d + 8) + rounding) * (np.abs(keys) @ np.abs(query)).max() * scale
        p = np.exp(scores - scores.max())
        p /= p.sum()
        size = p @ np.abs(values)
        close(out[i], p @ values, size * (np.expm1(2 * score_error) + rounding + EPS * (n + 32)))


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_attention_at_every_length_to_200(kernel: str, d: int) -> None:
    k, v = numbers(200, d, seed=1), numbers(200, d, seed=2)
    for t in (*range(1, 20), 31, 33, *range(62, 67), 79, 80, 81, 127, 128, 129, 191, 192, 193, 200):
        check_attention(kernel, numbers(1, d, seed=t), k[:t], v[:t], [t])


@pytest.mark.parametrize("d", ODD_DIMS)
def test_a_prompts_rows_with_heads_of_any_size(kernel: str, d: int) -> None:
    """Rows one behind the other, at the edges of pages, of chunks, of the 256 positions that tiles take together."""
    k, v = numbers(600, d, seed=1), numbers(600, d, seed=2)
    for last, n, chunk in ((16, 16, 256), (70, 16, 256), (263, 16, 256), (300, 5, 576), (600, 16, 320)):
        seen = list(range(last - n + 1, last + 1))
        check_attention(kernel, numbers(n, d, seed=last), k[:last], v[:last], seen, chunk=chunk)


@given(st.data())
@settings(max_examples=60)
def test_queries_that_share_keys_each_see_their_own_positions(kernel: str, data: st.DataObject) -> None:
    d, t = data.draw(st.sampled_from(HEAD_DIMS)), data.draw(st.integers(1, 200))
    seen = sorted(data.draw(st.lists(st.integers(1, t), min_size=1, max_size=16)))
    check_attention(kernel, numbers(len(seen), d), numbers(t, d, seed=1), numbers(t, d, seed=2), seen)


@given(st.data())
@settings(max_examples=60)
def test_queries_with_a_window_each_see_the_end_of_what_is_before_them(kernel: str, data: st.DataObject) -> None:
    d, chunk = data.draw(st.sampled_from(HEAD_DIMS)), data.draw(st.sampled_from([128, 256, 320, 576]))
    t, window = data.draw(st.integers(1, 700)), data.draw(st.integers(1, 400))
    seen = sorted(data.draw(st.lists(st.integers(1, t), min_size=1, max_size=16)))
    first = [max(0, n - window) for n in seen]
    q, k, v = numbers(len(seen), d), numbers(t, d, seed=1), numbers(t, d, seed=2)
    check_attention(kernel, q, k, v, seen, first, chunk)
    together = attend(kernel, q, k, v, seen, first, chunk)
    for i, n in enumerate(seen):  # the same bits alone
        assert (attend(kernel, q[i : i + 1], k, v, [n], [first[i]], chunk) == together[i]).all()


def test_what_lies_outside_a_window_is_not_even_read(kernel: str) -> None:
    q, k, v, seen, first = (
        numbers(3, 64),
        numbers(700, 64, seed=1),
        numbers(700, 64, seed=2),
        [500, 501, 600],
        [460] * 3,
    )
    whole = attend(kernel, q, k, v, seen, first)
    k[:448], v[:448], k[640:] = np.nan, np.nan, np.nan  # whole pages: one not-a-number read would be in every answer
    assert (attend(kernel, q, k, v, seen, first) == whole).all()


def test_a_query_among_others_has_the_same_answer_whoever_they_are(kernel: str) -> None:
    q, k, v = numbers(4, 64), numbers(150, 64, seed=1), numbers(150, 64, seed=2)
    together = attend(kernel, q, k, v, [20, 64, 65, 150])
    others = attend(kernel, np.stack([q[0], *numbers(3, 64, seed=9)]), k, v, [20, 100, 120, 130])
    assert (together[0] == others[0]).all()


def test_chunks_only_change_the_order_of_sums(kernel: str) -> None:
    q, k, v, seen = numbers(6, 64), numbers(700, 64, seed=1), numbers(700, 64, seed=2), [1, 64, 65, 300, 511, 700]
    for chunk in (64, 192, 256, 704, 1024):
        check_attention(kernel, q, k, v, seen, chunk=chunk)


def test_sums_shrink_as_higher_scores_come(kernel: str) -> None:
    """Each 256 positions have a higher score than those before, some by so little that those still count."""
    q, k, v = np.zeros((2, 64), np.float32), numbers(1100, 64, seed=1) * np.float32(0.1), numbers(1100, 64, seed=2)
    q[:, 0] = (8, 800)
    k[:, 0] += np.arange(1100) // 256
    check_attention(kernel, q, k, v, [700, 1100], chunk=1152)
    check_attention(kernel, q, k[::-1].copy(), v, [700, 1100], chunk=1152)


# Queries, keys and values that rounding leaves as they are: then a weight is as exact as exp, sums and merging.


def unrounded(kernel: str, sizes: Any) -> Floats:
    """Queries (Q, 64), one number other than 0 in each, near those sizes."""
    rounded = np.asarray(sizes).astype(ml_dtypes.bfloat16).astype(np.float64)
    q = np.zeros((len(rounded), 64), np.float32)
    q[:, 0] = rounded / (64**-0.5 * np.log2(np.e)) if "amx" in kernel else rounded  # tiles hold q scale log2(e)
    return q


def test_exp_is_as_exact_as_floats(kernel: str) -> None:
    k, v = np.zeros((2, 64), np.float32), np.zeros((2, 64), np.float32)
    k[0, 0], k[1, 0], v[0] = 1, -1, 127
    for sizes in np.geomspace(1e-3, 300, 320).reshape(-1, 16):
        q = unrounded(kernel, sizes)
        score = q[:, :1].astype(np.float64) * 64**-0.5
        exact = np.broadcast_to(127 / (1 + np.exp(-2 * score)), q.shape)
        close(attend(kernel, q, k, v, [2] * 16), exact, exact * EPS * (8 + 8 * score))


def test_weights_add_up_as_exactly_as_floats_do(kernel: str) -> None:
    rng, scale = np.random.default_rng(0), 64**-0.5
    k, v = np.zeros((600, 64), np.float32), np.zeros((600, 64), np.float32)
    for size in (1.5, 24, 96):
        q = unrounded(kernel, [size])
        k[:, 0] = rng.uniform(-1, 1, 600).astype(ml_dtypes.bfloat16)
        scores = np.float64(q[0, 0]) * k[:, 0].astype(np.float64) * scale
        v[:] = 0
        v[scores.argmax()] = 127
        for chunk in (64, 256, 576):
            exact = 127 / np.exp(scores - scores.max()).sum()
            off = EPS * (700 + 8 * abs(scores).max())
            close(attend(kernel, q, k, v, [600], chunk=chunk), np.full((1, 64), exact), exact * off)


def test_extreme_scores_neither_overflow_nor_lose_the_answer(kernel: str) -> None:
    kv, rounding = ROWS[kernel]["kv"], ROWS[kernel]["rounding"] if ROWS[kernel]["kv"] == "int8" else 0  # of scales
    q, k, v = np.zeros((2, 64), np.float32), np.zeros((130, 64), np.float32), numbers(130, 64)
    mean, one = 200 * EPS + rounding, 4 * EPS + rounding
    q[:, 0] = 1e10
    close(attend(kernel, q, k, v, [1, 130])[1], as_stored(v, kv).mean(axis=0), mean * np.abs(v).mean(axis=0))
    for size in (1e4, 1e10, 1e20):
        k[:, 0] = -size  # every score far below zero, and one above it
        k[77, 0] = size
        first, second = attend(kernel, q, k, v, [70, 130])
        close(second, as_stored(v, kv)[77], one * np.abs(v[77]))
        close(first, as_stored(v[:70], kv).mean(axis=0), mean * np.abs(v[:70]).mean(axis=0))
    k[:, 0] = np.linspace(-1e4, 1e4, 130)  # each page's largest beyond the last
    close(attend(kernel, q, k, v, [50, 130]), as_stored(v, kv)[[49, 129]], one * np.abs(v[[49, 129]]))
    k[:, 0] = k[::-1, 0].copy()  # the largest first
    close(attend(kernel, q, k, v, [50, 130]), as_stored(v, kv)[[0, 0]], one * np.abs(v[[0, 0]]))


def test_what_is_not_a_number_stays_so(kernel: str) -> None:
    q, k, v = numbers(3, 64), numbers(100, 64, seed=1), numbers(100, 64, seed=2)
    q[1, 5] = np.nan
    got = attend(kernel, q, k, v, [80, 90, 100])
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[[0, 2]]).all()


def test_a_key_that_is_not_a_number_is_seen(kernel: str) -> None:
    """By who sees its position: a score that is no number must not count as the least of all."""
    q, k, v = numbers(2, 40), numbers(150, 40), numbers(150, 40)
    k[70, 3] = np.nan
    out = attend(kernel, q, k, v, [70, 150])
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_finite_number_is_seen(kernel: str, bad: float) -> None:
    q, k, v = numbers(1, 40), numbers(150, 40), numbers(150, 40)
    v[70, 3] = bad
    assert np.isfinite(attend(kernel, q, k, v, [64])).all()
    assert not np.isfinite(attend(kernel, q, k, v, [150])[0, 3])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_int8_stores_of_no_number_is_seen_by_those_alone_who_see_its_position(kernel: str, bad: float) -> None:
    """Also in a page that others see in part: pages are handed on with the scales of whoever had them before."""
    if ROWS[kernel]["kv"] != "int8":
        pytest.skip("values of other formats are cleared before a page is handed on, and have no scales")
    q, k, v = numbers(3, 40), numbers(150, 40), numbers(150, 40)
    k[75, 3], v[76, 5] = bad, bad
    out = attend(kernel, q, k, v, [70, 75, 150])
    assert np.isfinite(out[:2]).all()
    assert np.isnan(out[2]).all()


def test_int8_stores_what_is_next_to_nothing_as_nothing(kernel: str) -> None:
    if ROWS[kernel]["kv"] != "int8":
        pytest.skip("other formats have no scales")
    q, k, v = numbers(1, 40), np.full((70, 40), 1e-44, np.float32), np.full((70, 40), 1e-38, np.float32)
    v[:, ::2] = 0
    assert np.abs(attend(kernel, q, k, v, [70])).max() <= 1e-37


@pytest.mark.parametrize("kv", ["bf16", "int8", "f32"])
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512_vnni", "avx512", "amx"])
def test_the_table_chooses_these_rows(isa: str, kv: str) -> None:
    plain = f"attend_{kv}_{'avx512' if isa == 'amx' else isa}"
    tiled = f"attend_{kv}_amx" if isa == "amx" and kv != "f32" else plain
    if isa == "avx512" and kv == "int8":
        tiled = "attend_int8_avx512_bf16"
    for m in (1, 8, 33, 512):  # a class has one row, however many rows a step has
        assert _core.choose_attend(isa, kv, m, "few") == plain
        assert _core.choose_attend(isa, kv, m, "many") == tiled
        assert _core.choose_attend(isa, kv, m, "best") == (tiled if m >= 33 else plain)


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_the_tile_unit_attends_as_its_emulation_does(kv: str) -> None:
    if "amx" not in ISAS:
        pytest.skip(f"attend_{kv}_amx needs amx")
    for d, n_queries, seen in ((64, 16, 700), (80, 5, 65), (128, 1, 300), (33, 9, 130)):
        q, k, v = numbers(n_queries, d), numbers(seen, d, seed=1), numbers(seen, d, seed=2)
        n_positions = [seen - n_queries + 1 + i for i in range(n_queries)]
        by_unit, by_emulation = (attend(f"attend_{kv}_amx{of}", q, k, v, n_positions) for of in ("", "_emulated"))
        assert (by_unit == by_emulation).all()
