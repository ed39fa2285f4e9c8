"""Filters against naive statements of them, seeds, and stop strings cut anywhere."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.errors import RuntimeFailure, UserError
from fourfold.sampling import SamplingParams, StopChecker, Uncut, draw, make_sampler, min_p, penalize, top_k, top_p

# Few values, so that ties are common; 0 is their maximum, as in the sampler.
some_logits = st.lists(st.sampled_from([0.0, -0.5, -1.0, -3.0, -30.0]), min_size=1, max_size=40).map(
    lambda values: np.array(values, np.float32) - np.float32(max(values))
)


def _kept(choose: object, logits: np.ndarray) -> set[int]:
    ids, values = choose(np.arange(len(logits)), logits)  # type: ignore[operator]
    assert (values == logits[ids]).all()
    assert (np.diff(ids) > 0).all()
    return set(ids.tolist())


@given(logits=some_logits, k=st.integers(1, 50))
def test_top_k_keeps_the_k_largest_and_what_ties_with_them(logits: np.ndarray, k: int) -> None:
    kth = sorted(logits, reverse=True)[min(k, len(logits)) - 1]
    assert _kept(top_k(k), logits) == {i for i, value in enumerate(logits) if value >= kth}


@given(logits=some_logits, p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_likeliest_that_reach_p(logits: np.ndarray, p: float) -> None:
    weights = np.exp(logits.astype(np.float64))
    kept: list[int] = []
    for i in sorted(range(len(logits)), key=lambda i: (-logits[i], i)):
        if kept and weights[kept].sum() >= p * weights.sum() * (1 - 1e-12):
            break
        kept.append(i)
    assert _kept(top_p(p), logits) == set(kept)


def test_top_p_is_the_same_where_the_first_few_do_not_suffice() -> None:
    logits = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    logits -= logits.max()
    weights = np.exp(logits.astype(np.float64))
    for p in (0.001, 0.5, 0.9, 0.9999):
        order = np.argsort(-logits, kind="stable")
        count = int(np.searchsorted(np.cumsum(weights[order]), p * weights.sum())) + 1
        assert _kept(top_p(p), logits) == set(order[:count].tolist())


@given(logits=some_logits, p=st.floats(0.01, 1))
def test_min_p_keeps_those_at_least_p_times_as_likely_as_the_likeliest(logits: np.ndarray, p: float) -> None:
    bound = logits.max() + np.float32(math.log(p))
    assert _kept(min_p(p), logits) == {i for i, value in enumerate(logits) if value >= bound}


def test_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    logits = np.array([2, -2, 4, -4, 0], np.float32)
    assert penalize(logits, [0, 1, 1, 4, 99], 2.0).tolist() == [1, -4, 4, -4, 0]
    assert logits.tolist() == [2, -2, 4, -4, 0]


def test_greedy_takes_the_lowest_of_the_likeliest_ids_and_never_padding() -> None:
    logits = np.array([1, 7, 3, 7, 9], np.float32)
    assert make_sampler(SamplingParams())(logits, []) == 4
    assert make_sampler(SamplingParams(top_k=3, seed=1), limit=4)(logits, []) == 1
    assert make_sampler(SamplingParams(repetition_penalty=3.0), limit=4)(logits, [1]) == 3


def test_draws_over_many_blocks_follow_the_probabilities_and_never_take_what_is_excluded() -> None:
    logits = np.full(5000, -np.inf, np.float32)
    some = np.array([0, 255, 256, 1000, 4095, 4999])
    logits[some] = np.log([8, 1, 4, 2, 0.5, 0.5]).astype(np.float32) - np.float32(np.log(8))
    generator = np.random.default_rng(4)
    counts = np.bincount([draw(logits, generator) for _ in range(20_000)], minlength=5000)
    assert counts.sum() == counts[some].sum()
    assert counts[some] / 20_000 == pytest.approx(np.array([8, 1, 4, 2, 0.5, 0.5]) / 16, abs=0.012)
    flat = np.zeros(1000, np.float32)
    assert np.std(np.bincount([draw(flat, generator) for _ in range(20_000)], minlength=1000)) < 6


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.2, 0.3], np.float32))
    generator = np.random.Generator(np.random.PCG64(7))
    counts = np.bincount([draw(logits, generator) for _ in range(20_000)], minlength=3)
    # five standard deviations of a binomial count are at most 5 · sqrt(20000 · 0.25) = 354
    assert np.abs(counts - np.array([10_000, 4_000, 6_000])).max() < 354


def test_the_same_seed_gives_the_same_ids_and_another_does_not() -> None:
    logits = np.random.default_rng(3).normal(size=1000).astype(np.float32)

    def some(seed: int | None) -> list[int]:
        sample = make_sampler(SamplingParams(temperature=1.5, top_p=0.9, seed=seed), limit=900)
        return [sample(logits, []) for _ in range(20)]

    assert some(5) == some(5)
    assert some(5) != some(6)
    assert some(None) != some(None)
    assert max(some(5)) < 900


def test_low_temperature_is_nearly_greedy_and_the_least_does_not_overflow() -> None:
    logits = np.random.default_rng(3).normal(size=100).astype(np.float32) * 1e4
    for temperature in (1e-3, 5e-324):
        sample = make_sampler(SamplingParams(temperature=temperature, seed=0))
        assert sample(logits, []) == int(logits.argmax())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_a_failure(bad: float) -> None:
    with pytest.raises(RuntimeFailure, match="not finite"):
        make_sampler(SamplingParams())(np.array([0, bad, 1], np.float32), [])


@pytest.mark.parametrize(
    ("field", "value", "interval"),
    [
        ("max_tokens", -1, "whole number from 0"),
        ("presence_penalty", 2.5, "from -2 to 2"),
        ("frequency_penalty", -3, "from -2 to 2"),
        ("logprobs", 21, "whole number from 0 to 20"),
        ("max_tokens", 1.5, "whole number"),
        ("temperature", -0.1, "from 0 to 100, not -0.1"),
        ("temperature", float("nan"), "from 0 to 100"),
        ("temperature", "hot", "from 0 to 100, not 'hot'"),
        ("top_k", 0, "from 1"),
        ("top_p", 0, "above 0 to 1, not 0"),
        ("top_p", 1.1, "above 0 to 1"),
        ("min_p", -1, "from 0 to 1"),
        ("repetition_penalty", 0, "from 0.01 to 100"),
        ("repetition_penalty", 1e-46, "from 0.01 to 100"),  # 0 in float32
        ("seed", -1, "from 0"),
        ("stop", ("",), "at least one character"),
        ("stop", (1,), "at least one character"),
    ],
)
def test_a_value_out_of_its_interval_is_refused_by_name(field: str, value: object, interval: str) -> None:
    with pytest.raises(UserError, match=f"{field} must be .*{interval}"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_one_stop_string_needs_no_tuple() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]


@given(
    text=st.text("ab\n", max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 12), max_size=6),
)
@settings(max_examples=500)
def test_stop_strings_end_the_text_wherever_the_pieces_are_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    checker, shown = StopChecker(stops), ""
    places = [0, *sorted(cuts), len(text)]
    for start, end in itertools.pairwise(places):
        shown += checker.push(text[start:end])
        assert expected.startswith(shown)
    assert shown + checker.flush() == expected
    assert checker.stopped == bool(ends)


def ended(text: str, stops: list[str], uncut: Uncut) -> tuple[str, bool]:
    """What `StopChecker` must show in the end, and whether a stop string ended it, from the whole text."""
    shown, left = "", uncut.most
    while True:
        free, begun, after = text.partition(uncut.begin) if left else (text, "", "")
        if ends := [(free.index(stop) + len(stop), free.index(stop)) for stop in stops if stop in free]:
            return shown + free[: min(ends)[1]], True
        part, end, text = after.partition(uncut.end)
        shown, left = shown + free + begun + part + end, left - 1
        if not end:
            return shown, False


@given(
    text=st.lists(st.sampled_from(["a", "[", "(", "[(", ")", "]", ")]"]), max_size=14).map("".join),
    stops=st.lists(st.text("a[()]", min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=6),
    most=st.integers(1, 3),
)
@settings(max_examples=1000)
def test_no_stop_string_counts_in_parts_that_are_uncut(text: str, stops: list[str], cuts: list[int], most: int) -> None:
    uncut = Uncut("[(", ")]", most)
    expected, stopped = ended(text, stops, uncut)
    checker, shown = StopChecker(stops, uncut), ""
    for start, end in itertools.pairwise([0, *sorted(cuts), max(20, len(text))]):
        shown += checker.push(text[start:end])
        assert expected.startswith(shown)
    assert shown + checker.flush() == expected
    assert checker.stopped == stopped


def test_text_that_cannot_begin_a_stop_string_is_not_held_back() -> None:
    checker = StopChecker(["<end>"])
    assert [checker.push(piece) for piece in ("a<", "en", "b<e", "nd", ">c", "d")] == ["a", "", "<enb", "", "", ""]
    assert checker.stopped


@pytest.mark.parametrize("stop", [5, None, ["a", 1], ""])
def test_stop_must_be_texts(stop: object) -> None:
    with pytest.raises(UserError, match="stop must be"):
        SamplingParams(stop=stop)  # type: ignore[arg-type]
