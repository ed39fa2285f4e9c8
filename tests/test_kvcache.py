"""Pages and slots: whatever is asked in whatever order, none is lost and none is held twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.errors import ResourceError
from fourfold.kvcache import PagePool, Sequence

PAGE, PAGES, SLOTS = 64, 12, 3


@given(st.data())
@settings(max_examples=200)
def test_no_page_is_lost_or_held_twice_in_any_life(data: st.DataObject) -> None:
    pool = PagePool(PAGES, SLOTS, PAGE)
    live: list[Sequence] = []
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["new", "reserve", "reserve", "free", "free twice"]))
        n_free = PAGES - sum(len(s.pages) for s in live)
        if action == "new":
            if len(live) < SLOTS:
                live.append(pool.new_sequence())
                assert live[-1].pages == []
            else:
                with pytest.raises(ResourceError, match="3 texts are under way already"):
                    pool.new_sequence()
        elif live:
            sequence = data.draw(st.sampled_from(live))
            if action == "reserve":
                length = data.draw(st.integers(0, PAGE * PAGES))
                before, needed = list(sequence.pages), -(-length // PAGE)
                if needed - len(before) > n_free:
                    with pytest.raises(
                        ResourceError, match=f"room for {n_free * PAGE} more positions, not for {length}"
                    ):
                        pool.reserve(sequence, length)
                    assert sequence.pages == before
                else:
                    pool.reserve(sequence, length)
                    assert sequence.pages[: len(before)] == before, "what is written stays where it is"
                    assert len(sequence.pages) == max(len(before), needed)
            else:
                live.remove(sequence)
                pool.free(sequence)
                if action == "free twice":
                    pool.free(sequence)
        assert len({s.slot for s in live}) == len(live)
        pool.check_integrity()
    for sequence in live:
        pool.free(sequence)
    pool.reserve(pool.new_sequence(), PAGE * PAGES)  # all of it can be had again
    pool.check_integrity()


def test_a_sequence_of_another_pool_gives_nothing_back() -> None:
    ours, theirs = PagePool(PAGES, SLOTS, PAGE), PagePool(PAGES, SLOTS, PAGE)
    stranger = theirs.new_sequence()
    theirs.reserve(stranger, 100)
    ours.free(stranger)
    ours.check_integrity()
    theirs.check_integrity()


def test_integrity_is_really_checked() -> None:
    pool = PagePool(PAGES, SLOTS, PAGE)
    sequence = pool.new_sequence()
    pool.reserve(sequence, 200)
    page = sequence.pages.pop()
    with pytest.raises(AssertionError, match="pages were lost or held twice"):
        pool.check_integrity()
    sequence.pages += [page, page]
    with pytest.raises(AssertionError, match="pages were lost or held twice"):
        pool.check_integrity()
