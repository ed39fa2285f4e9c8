"""Which KV pages belong to which sequence, and which hold a beginning that others may share: integers, no memory.

A page is full of one text's positions, or a sequence is still writing it. Full pages may be kept under a key that
stands for every id up to the page's end; whoever begins with the same ids adopts them instead of computing them again.
Kept pages that nobody holds stay until their room is needed, those unused for longest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import wraps
from hashlib import blake2b
from itertools import takewhile
from threading import RLock
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np

from fourfold.errors import ResourceError

Key = bytes
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(eq=False)
class Sequence:
    """One text under way: its slot (LFA state), its pages in order, and how many positions they hold."""

    slot: int
    length: int = 0
    pages: list[int] = field(default_factory=list)


def page_keys(ids: Seq[int], page: int, before: Key = b"") -> list[Key]:
    """A key for each full page of the ids, which follow those that `before` stands for."""
    keys = []
    for end in range(page, len(ids) + 1, page):
        text = np.asarray(ids[end - page : end], "<i4").tobytes()
        before = blake2b(before + text, digest_size=16).digest()  # no two texts of one key can be made up
        keys.append(before)
    return keys


def _atomic(method: Callable[Concatenate[PagePool, P], R]) -> Callable[Concatenate[PagePool, P], R]:
    @wraps(method)
    def locked(pool: PagePool, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with pool._lock:
            return method(pool, *args, **kwargs)

    return locked


class PagePool:
    """Pages of `page` positions each and slots, handed out and taken back. Threads may share it.

    `may_touch(n)`: whether memory has room for n pages that were never used so far.
    """

    def __init__(
        self, n_pages: int, n_slots: int, page: int, may_touch: Callable[[int], bool] = lambda n_pages: True
    ) -> None:
        self.page, self.n_pages, self.n_slots = page, n_pages, n_slots
        self._may_touch = may_touch
        self._lock = RLock()  # again and again in one thread: a dropped stream is freed wherever it is collected
        self._touched = 0  # pages below this were used before: their memory is taken
        self._empty: list[int] = []  # touched, and of no use to anybody
        self._idle: dict[int, None] = {}  # kept but held by nobody; the longest idle first
        self._holders: dict[int, int] = {}  # how many sequences hold a page
        self._page_of: dict[Key, int] = {}  # kept
        self._key_of: dict[int, Key] = {}
        self._free_slots = list(range(n_slots))[::-1]
        self._live: set[Sequence] = set()

    @property
    def n_idle(self) -> int:
        """Pages that are kept for whoever begins alike, and held by nobody."""
        return len(self._idle)

    @property
    def n_held(self) -> int:
        """Pages that sequences hold."""
        return len(self._holders)

    @_atomic
    def has_room(self, n_pages: int) -> bool:
        """Whether so many pages could be taken now."""
        return self._fresh(n_pages) is not None

    @_atomic
    def new_sequence(self) -> Sequence:
        """An empty sequence. Raises ResourceError where all slots are taken."""
        if not self._free_slots:
            raise ResourceError(f"{self.n_slots} texts are under way already: finish or close one first")
        sequence = Sequence(self._free_slots.pop())
        self._live.add(sequence)
        return sequence

    @property
    def has_slot(self) -> bool:
        """Whether another sequence can begin."""
        return bool(self._free_slots)

    @_atomic
    def reserve(self, sequence: Sequence, length: int) -> None:
        """Pages for `length` positions in all. Raises ResourceError, taking none, where too few are left."""
        missing = -(-length // self.page) - len(sequence.pages)
        fresh = self._fresh(missing)
        if fresh is None:
            free = self.n_pages - len(self._holders)
            raise ResourceError(
                f"the KV cache has room for {free * self.page} more positions, not for {length}: "
                "finish or close other texts first"
                if free < missing
                else f"memory has no room for {missing * self.page} more positions of KV cache: finish others first"
            )
        for _ in range(missing):
            if not self._empty:
                fresh -= self._touch() if fresh else self._evict()
            page = self._empty.pop()
            self._holders[page] = 1
            sequence.pages.append(page)

    @_atomic
    def kept(self, keys: Iterable[Key]) -> int:
        """How many pages, from the first on, are kept under the keys."""
        return sum(1 for _ in takewhile(self._page_of.__contains__, keys))

    @_atomic
    def adopt(self, sequence: Sequence, keys: Seq[Key]) -> None:
        """Begins an empty sequence with pages that are all kept under the keys."""
        assert not sequence.pages
        for key in keys:
            page = self._page_of[key]
            self._idle.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1
            sequence.pages.append(page)
        sequence.length = len(keys) * self.page

    @_atomic
    def keep(self, sequence: Sequence, keys: Seq[Key]) -> None:
        """Keeps a sequence's first pages, which are full, under their keys. A key keeps the page that it has."""
        assert len(keys) * self.page <= sequence.length
        for page, key in zip(sequence.pages, keys, strict=False):
            if page not in self._key_of and key not in self._page_of:
                self._page_of[key], self._key_of[page] = page, key

    @_atomic
    def free(self, sequence: Sequence) -> None:
        """Take everything back; a second time does nothing."""
        if sequence not in self._live:
            return
        self._live.remove(sequence)
        self._free_slots.append(sequence.slot)
        for page in reversed(sequence.pages):  # a text's end goes before its beginning, without which it is of no use
            self._holders[page] -= 1
            if self._holders[page] == 0:
                del self._holders[page]
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._empty.append(page)
        sequence.pages, sequence.length = [], 0

    @_atomic
    def forget(self) -> None:
        """Keeps nothing of what nobody holds."""
        while self._idle:
            self._evict()

    @_atomic
    def check_integrity(self) -> None:
        """Every page and slot is free or held, as often as it should be. Raises AssertionError otherwise."""
        held: dict[int, int] = {}
        for page in (page for sequence in self._live for page in sequence.pages):
            held[page] = held.get(page, 0) + 1
        assert held == self._holders, "KV pages are held by nobody, or more often than is known"
        pages = sorted([*self._empty, *self._idle, *held])
        assert pages == list(range(self._touched)), "KV pages were lost or held twice"
        assert {page: key for key, page in self._page_of.items()} == self._key_of, "a kept page has another's key"
        assert self._idle.keys() <= self._key_of.keys(), "a page that is not kept is idle"
        slots = sorted(self._free_slots + [s.slot for s in self._live])
        assert slots == list(range(self.n_slots)), "slots were lost or held twice"

    def _fresh(self, n_pages: int) -> int | None:
        """Of n pages to be taken, how many never used before; None where there are not enough of any kind."""
        wanted, untouched = max(0, n_pages - len(self._empty)), self.n_pages - self._touched
        for fresh in (min(wanted, untouched), max(0, wanted - len(self._idle))):  # rather than lose what is kept
            if wanted - fresh <= len(self._idle) and fresh <= untouched and (not fresh or self._may_touch(fresh)):
                return fresh
        return None

    def _touch(self) -> int:
        self._empty.append(self._touched)
        self._touched += 1
        return 1

    def _evict(self) -> int:
        page = next(iter(self._idle))
        del self._idle[page]
        del self._page_of[self._key_of.pop(page)]
        self._empty.append(page)
        return 0
