"""Which KV pages belong to which sequence: integers only, no memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from fourfold.errors import ResourceError


@dataclass(eq=False)
class Sequence:
    """One text under way: its slot (LFA state), its pages in order, and how many positions they hold."""

    slot: int
    length: int = 0
    pages: list[int] = field(default_factory=list)


class PagePool:
    """Pages of `page` positions each and slots, handed out and taken back."""

    def __init__(self, n_pages: int, n_slots: int, page: int) -> None:
        self.page = page
        self._n_pages, self._n_slots = n_pages, n_slots
        self._free_pages = list(range(n_pages))[::-1]
        self._free_slots = list(range(n_slots))[::-1]
        self._live: set[Sequence] = set()

    def new_sequence(self) -> Sequence:
        """An empty sequence. Raises ResourceError where all slots are taken."""
        if not self._free_slots:
            raise ResourceError(f"{self._n_slots} texts are under way already: finish or close one first")
        sequence = Sequence(self._free_slots.pop())
        self._live.add(sequence)
        return sequence

    def reserve(self, sequence: Sequence, length: int) -> None:
        """Pages for `length` positions in all. Raises ResourceError, taking none, where too few are left."""
        missing = -(-length // self.page) - len(sequence.pages)
        if missing > len(self._free_pages):
            raise ResourceError(
                f"the KV cache has room for {len(self._free_pages) * self.page} more positions, not for {length}: "
                "finish or close other texts first"
            )
        sequence.pages += [self._free_pages.pop() for _ in range(missing)]

    def free(self, sequence: Sequence) -> None:
        """Take everything back; a second time does nothing."""
        if sequence not in self._live:
            return
        self._live.remove(sequence)
        self._free_pages += sequence.pages[::-1]
        self._free_slots.append(sequence.slot)
        sequence.pages = []

    def check_integrity(self) -> None:
        """Every page and slot is free or held, once. Raises AssertionError otherwise."""
        pages = sorted(self._free_pages + [p for s in self._live for p in s.pages])
        assert pages == list(range(self._n_pages)), "KV pages were lost or held twice"
        slots = sorted(self._free_slots + [s.slot for s in self._live])
        assert slots == list(range(self._n_slots)), "slots were lost or held twice"
