"""Who takes part in the next step: first come, first served, as far as pages reach. Integers only.

A step is of one of two kinds. One brings prompts nearer their end, by the kernels for many rows, a chunk at a time so
that nobody waits long; the other gives every text under way its next id, by the kernels for few. Where there is work of
both kinds they take turns. No step mixes them, so that the kernels which compute a position, and with them its bits, do
not depend on who else is there (`generation.Generation.n_many`).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fourfold.errors import QueueFull, ResourceError, UserError
from fourfold.generation import FEW_PROMPT, Generation
from fourfold.kvcache import PagePool

PrefixCache = Literal["all", "prompts", "off"]
PREFIX_CACHES: tuple[PrefixCache, ...] = ("all", "prompts", "off")


@dataclass(frozen=True)
class Limits:
    """How much is taken on at a time."""

    max_running: int = 32  # texts that take part in steps
    max_waiting: int = 128  # texts beside those; more are refused
    max_wait_seconds: float = 600.0  # a text that has waited so long fails
    prompt_chunk: int = 512  # ids of prompts a step, at most
    stall_seconds: float = 0.25  # that others' ids may wait for a step of prompts, where the chunk can be that small
    # What beginnings are shared: of all texts; of prompts alone, so that an answer is the same bits whatever ran before
    # (an answer's positions are computed by other kernels than a prompt's); of none.
    prefix_cache: PrefixCache = "all"

    def __post_init__(self) -> None:
        """Raises UserError for more texts at a time than a step has rows for, or no such way to share beginnings."""
        if not 1 <= self.max_running <= MOST_RUNNING:
            raise UserError(f"max_running must be from 1 to {MOST_RUNNING}, not {self.max_running}")
        if self.prefix_cache not in PREFIX_CACHES:
            raise UserError(f"prefix_cache must be one of {', '.join(PREFIX_CACHES)}, not {self.prefix_cache!r}")


@dataclass(frozen=True)
class Share:
    """One text's part of a step."""

    generation: Generation
    n_ids: int
    n_logits: int  # of the last of them


@dataclass(frozen=True)
class Plan:
    """One step. Nothing in it: nobody can go on."""

    shares: list[Share] = field(default_factory=list)
    tokens: Literal["few", "many"] = "few"  # the kernels of its rows
    outputs: Literal["few", "many"] = "few"  # the head's: of many where a long prompt is scored


MOST_RUNNING = 256  # so many rows and MOST_FEW beside them are a step
MOST_FEW = 256  # rows of short prompts, and of what is computed again, in a step for few; the rest wait their turn
LEAST_CHUNK = 64  # ids of a prompt: fewer cost the kernels for many rows as much


class Scheduler:
    """Texts waiting and under way, over one pool of pages."""

    def __init__(self, pool: PagePool, limits: Limits) -> None:
        self._pool, self.limits = pool, limits
        self.waiting: list[Generation] = []  # in the order of coming
        self.running: list[Generation] = []  # the same
        self.preemptions = 0
        self.tokens_reused = 0
        self._n_arrived = 0
        self._was_prompt = False

    def add(self, generation: Generation) -> None:
        """To the end of the queue. Raises QueueFull where it is as long as it may be."""
        if len(self.waiting) >= self.limits.max_waiting + self.limits.max_running - len(self.running):
            raise QueueFull(
                f"{len(self.running)} texts are under way and {len(self.waiting)} wait already: try again later"
            )
        generation.arrival = self._n_arrived
        self._n_arrived += 1
        self.waiting.append(generation)

    def remove(self, generation: Generation) -> None:
        """Out of the queue or the steps, its pages given back; a second time does nothing."""
        for texts in (self.waiting, self.running):
            if generation in texts:
                texts.remove(generation)
        self._release(generation)

    def plan(self, prompt_seconds: float) -> Plan:
        """The next step. `prompt_seconds`: what one id of a prompt takes, as measured.

        Raises ResourceError where not even the only text under way has room for its next id: `running` holds it.
        """
        self._admit()
        prompts = [g for g in self.running if g.computed < g.n_many]
        others = [g for g in self.running if g.computed >= g.n_many]
        self._was_prompt = bool(prompts) and not (others and self._was_prompt)
        if not self._was_prompt:
            return Plan(self._with_pages(_few_shares(others)))
        shares = self._with_pages(self._prompt_shares(prompts, bool(others), prompt_seconds))
        is_scored = any(share.generation.is_scored for share in shares)
        return Plan(shares, "many", "many" if is_scored else "few")

    def computed(self, generation: Generation) -> None:
        """To be told after a step, once the ids that were sampled are known: full pages may now be shared."""
        sequence = generation.sequence
        if sequence is None or self.limits.prefix_cache == "off":
            return
        length = min(sequence.length, len(generation.ids))
        if self.limits.prefix_cache == "prompts":
            length = min(length, generation.n_many)
        keys = generation.keys(self._pool.page, length)
        if len(keys) > generation.n_shared:
            self._pool.keep(sequence, keys)
            generation.n_shared = len(keys)

    def _admit(self) -> None:
        under_way = self._keys_under_way() if self.waiting else set()
        for generation in list(self.waiting):
            if len(self.running) >= self.limits.max_running or not self._pool.has_slot:
                return
            keys = self._shareable(generation)
            n_kept = self._pool.kept(keys)
            if n_kept < len(keys) and keys[n_kept] in under_way:
                continue  # somebody is computing its beginning: it begins when that is done
            sequence = self._pool.new_sequence()
            self._pool.adopt(sequence, keys[:n_kept])
            needed = len(generation.ids) // self._pool.page + 1 - n_kept
            if self.running and not self._pool.has_room(needed + self._promised()):
                self._pool.free(sequence)
                return
            generation.sequence, generation.n_shared = sequence, n_kept
            n_reused = generation.count(sequence.length)
            generation.cached_tokens += n_reused
            self.tokens_reused += n_reused
            self.waiting.remove(generation)
            insort(self.running, generation, key=lambda g: g.arrival)
            under_way |= set(generation.keys(self._pool.page, generation.n_many)[n_kept:])

    def _promised(self) -> int:
        """Pages that those under way will still write their ids to, and one more each to grow."""
        page = self._pool.page
        return sum(max(1, len(g.ids) // page + 1 - len(g.sequence.pages)) for g in self.running if g.sequence)

    def _shareable(self, generation: Generation) -> list[bytes]:
        """Keys of the pages that it could adopt: at least its last id is always computed."""
        if generation.is_scored or self.limits.prefix_cache == "off":
            return []
        length = len(generation.ids) - 1
        if self.limits.prefix_cache == "prompts":  # a prompt that continues as this answer does is no answer's page
            length = min(length, generation.n_many)
        return generation.keys(self._pool.page, length)

    def _keys_under_way(self) -> set[bytes]:
        """Of prompts' pages that steps to come will fill."""
        if self.limits.prefix_cache == "off":
            return set()
        page = self._pool.page
        return {
            key for g in self.running if g.computed < g.n_many for key in g.keys(page, g.n_many)[g.computed // page :]
        }

    def _prompt_shares(self, prompts: list[Generation], are_others: bool, seconds: float) -> list[Share]:
        room = self.limits.prompt_chunk
        if are_others and seconds > 0:
            room = min(room, max(LEAST_CHUNK, int(self.limits.stall_seconds / seconds)))
        if prompts[0].is_scored:
            prompts = prompts[:1]  # all its logits are wanted, by the kernels for many rows
        shares: list[Share] = []
        for g in prompts:
            n_ids = min(room, g.n_many - g.computed)
            if n_ids == 0 or (shares and g.is_scored):
                break
            at_end = g.computed + n_ids == len(g.ids)
            shares.append(Share(g, n_ids, n_ids if g.is_scored else int(at_end)))
            room -= n_ids
        return shares

    def _with_pages(self, shares: list[Share]) -> list[Share]:
        """Those that have pages to write to; the texts that came last give theirs up where there are too few."""
        ready: list[Share] = []
        for share in shares:
            generation = share.generation
            while generation.sequence is not None:
                try:
                    self._pool.reserve(generation.sequence, generation.computed + share.n_ids)
                except ResourceError:
                    if len(self.running) == 1:
                        raise
                    self.preempt(self.running[-1])
                else:
                    ready.append(share)
                    break
        return [share for share in ready if share.generation.sequence is not None]

    def preempt(self, generation: Generation) -> None:
        """Back to the queue, in its old place; what it had computed is computed again, to the same bits."""
        self.preemptions += 1
        self.running.remove(generation)
        self._release(generation)
        insort(self.waiting, generation, key=lambda g: g.arrival)

    def _release(self, generation: Generation) -> None:
        if generation.sequence is not None:
            self._pool.free(generation.sequence)
            generation.sequence = None


def _few_shares(generations: Sequence[Generation]) -> list[Share]:
    """Every text's next id; of short prompts, and of what is computed again, FEW_PROMPT each while there is room."""
    shares, room = [], MOST_FEW
    for g in generations:
        n_ids = min(FEW_PROMPT, len(g.ids) - g.computed)
        if n_ids > 1 and n_ids > room:
            continue
        room -= n_ids if n_ids > 1 else 0
        at_end = g.computed + n_ids == len(g.ids)
        shares.append(Share(g, n_ids, n_ids if g.is_scored else int(at_end)))
    return shares
