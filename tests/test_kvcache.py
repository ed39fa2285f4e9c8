"""Pages and slots: whatever is asked in whatever order, none is lost and none is held twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.errors import ResourceError
from fourfold.kvcache import PagePool, Sequence, page_keys

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
    with pytest.raises(AssertionError, match="held by nobody, or more often"):
        pool.check_integrity()
    sequence.pages += [page, page]
    with pytest.raises(AssertionError, match="held by nobody, or more often"):
        pool.check_integrity()
    sequence.pages.pop()
    pool.check_integrity()
    pool._empty.append(page)
    with pytest.raises(AssertionError, match="pages were lost or held twice"):
        pool.check_integrity()


def test_one_page_too_many_held_is_seen() -> None:
    pool = PagePool(PAGES, SLOTS, PAGE)
    pool.reserve(pool.new_sequence(), 64)
    pool._holders[5] = 1
    with pytest.raises(AssertionError, match="held by nobody"):
        pool.check_integrity()


# ---- pages that are kept


def text(pool: PagePool, ids: list[int]) -> tuple[Sequence, int]:
    """A text as a step loop begins it: what is kept adopted, the rest reserved, and kept in its turn."""
    sequence, keys = pool.new_sequence(), page_keys(ids, PAGE)
    n = pool.kept(keys)
    pool.adopt(sequence, keys[:n])
    pool.reserve(sequence, len(ids))
    sequence.length = len(ids)
    pool.keep(sequence, keys)
    return sequence, n


def test_keys_stand_for_all_ids_before_them() -> None:
    ids = list(range(200))
    keys = page_keys(ids, PAGE)
    assert len(keys) == 3
    assert len(set(keys)) == 3
    assert page_keys(ids[:128], PAGE) == keys[:2]
    assert page_keys(ids[64:], PAGE, keys[0]) == keys[1:]
    assert page_keys([1, *ids[1:]], PAGE)[1] != keys[1]
    assert page_keys(ids[64:], PAGE)[0] != keys[1]
    assert page_keys(ids[:63], PAGE) == []


def test_whoever_begins_alike_shares_pages() -> None:
    pool = PagePool(PAGES, SLOTS, PAGE)
    ids = list(range(150))
    first, n = text(pool, ids)
    assert n == 0
    second, n = text(pool, [*ids[:128], *range(1000, 1100)])
    assert n == 2
    assert second.pages[:2] == first.pages[:2]
    assert not set(second.pages[2:]) & set(first.pages[2:])
    pool.free(first)
    pool.check_integrity()
    third, n = text(pool, ids)  # from the second, which still runs
    assert n == 2
    for sequence in (second, third):
        pool.free(sequence)
    assert (pool.n_held, pool.n_idle) == (0, 3)
    pool.check_integrity()


def test_kept_pages_give_way_the_longest_idle_first_and_a_texts_end_before_its_beginning() -> None:
    pool = PagePool(4, SLOTS, PAGE)
    old, new = list(range(128)), list(range(500, 628))
    for ids in (old, new):
        pool.free(text(pool, ids)[0])
    sequence = pool.new_sequence()
    pool.reserve(sequence, PAGE)
    assert pool.kept(page_keys(old, PAGE)) == 1
    assert pool.kept(page_keys(new, PAGE)) == 2
    pool.reserve(sequence, 4 * PAGE)
    assert pool.kept(page_keys(new, PAGE)) == 0
    pool.check_integrity()


def test_memory_that_is_short_is_not_touched() -> None:
    room = [2]
    pool = PagePool(PAGES, SLOTS, PAGE, may_touch=lambda n: n <= room[0])
    first, _ = text(pool, list(range(128)))
    assert pool.has_room(2)
    assert not pool.has_room(3)
    with pytest.raises(ResourceError, match="memory has no room for 192 more positions"):
        pool.reserve(pool.new_sequence(), 192)
    room[0] = 0
    pool.free(first)
    assert pool.has_room(2)  # the two kept pages give way
    assert not pool.has_room(3)
    pool.check_integrity()


def test_memory_is_to_blame_where_as_many_pages_are_left_as_are_wanted() -> None:
    pool = PagePool(PAGES, SLOTS, PAGE, may_touch=lambda n: False)
    with pytest.raises(ResourceError, match="memory has no room"):
        pool.reserve(pool.new_sequence(), PAGES * PAGE)
    with pytest.raises(ResourceError, match="the KV cache has room"):
        pool.reserve(pool.new_sequence(), PAGES * PAGE + 1)


def test_forgetting_leaves_what_is_held() -> None:
    pool = PagePool(PAGES, SLOTS, PAGE)
    kept, _ = text(pool, list(range(64)))
    pool.free(text(pool, list(range(100, 300)))[0])
    pool.forget()
    assert (pool.n_held, pool.n_idle) == (1, 0)
    pool.free(kept)
    assert pool.n_idle == 1
    pool.check_integrity()


@given(st.data())
@settings(max_examples=200)
def test_sharing_loses_nothing_in_any_life(data: st.DataObject) -> None:
    pool = PagePool(PAGES, SLOTS, PAGE)
    live: list[Sequence] = []
    contents: dict[int, tuple[int, ...]] = {}  # of each page, as its first writer left it: every id before its end
    for _ in range(data.draw(st.integers(1, 30))):
        if live and data.draw(st.booleans()):
            pool.free(live.pop(data.draw(st.integers(0, len(live) - 1))))
        elif len(live) < SLOTS:
            ids = [data.draw(st.integers(0, 1)) for _ in range(4)]
            ids = [i for i in ids for _ in range(PAGE)][: data.draw(st.integers(1, 4 * PAGE))]
            needed = -(-len(ids) // PAGE) - pool.kept(page_keys(ids, PAGE))
            if needed > PAGES - pool.n_held - pool.n_idle and not pool.has_room(needed):
                continue
            try:
                sequence, n = text(pool, ids)
            except ResourceError:
                live += [s for s in pool._live if s not in live]
                continue
            live.append(sequence)
            for i, page in enumerate(sequence.pages):
                told = tuple(ids[: (i + 1) * PAGE])
                assert i >= n or contents[page] == told, "an adopted page holds another text"
                if i >= n:
                    contents[page] = told
        pool.check_integrity()
