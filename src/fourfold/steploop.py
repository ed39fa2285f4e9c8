"""The step loop: requests join and leave at any step, and each step serves as many of them as it can."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

from fourfold.engine import MAX_STEP_TOKENS, MOST_BACK, Feed
from fourfold.errors import FourfoldError, ResourceError, UserError
from fourfold.generation import Generation
from fourfold.kvcache import Sequence
from fourfold.request import ErrorKind, Request, Update, check_prompt
from fourfold.scheduler import Limits, Plan, Scheduler, Share
from fourfold.speculate import PromptLookup, Proposer, Speculation, StepCost

if TYPE_CHECKING:
    from fourfold.assembly import Vector
    from fourfold.engine import Engine
    from fourfold.tokenizer import NoTokenizer, Tokenizer


@dataclass
class Stats:
    """What has been done since the start, and what is under way."""

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_held: int = 0  # by texts under way
    pages_cached: int = 0  # held by nobody, kept for whoever begins alike
    tokens_prompt: int = 0  # computed, each once
    tokens_reused: int = 0  # of prompts, found in the cache instead
    tokens_generated: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    bytes_read: int = 0  # weights and KV cache


class StepLoop:
    """Requests over one engine. One thread owns it: it has none of its own, and time passes in `step` alone."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | NoTokenizer,
        *,
        limits: Limits | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._scheduler = Scheduler(engine.pool, limits or Limits())
        self._speculation = speculation
        self._stats = Stats(pages_total=engine.pool.n_pages)
        self._added: dict[Generation, float] = {}  # when
        self._left: list[Generation] = []  # during a step
        self._is_stepping = False
        self._prompt_seconds = 0.0  # an id of a prompt, lately

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not self._added

    def add(self, request: Request) -> Generation:
        """A request takes its place in the queue.

        Raises UserError where it could never run, QueueFull where too many wait.
        """
        check_prompt(request.prompt, self._engine.config, self._engine.context)
        generation = Generation(request, self._tokenizer, self._engine.context)
        self._scheduler.add(generation)
        self._added[generation] = monotonic()
        return generation

    def cancel(self, generation: Generation) -> None:
        """Ends a request: its pages are free on return, or as soon as the step ends that is under way."""
        if self._is_stepping:  # called from within it, by whoever collects garbage
            self._left.append(generation)
        elif self._added.pop(generation, None) is not None:
            self._scheduler.remove(generation)
            if self._speculation:
                self._speculation.forget(generation)

    def step(self) -> list[Update]:
        """One step, and what it did for each request; nothing where nobody waits.

        Raises RuntimeFailure where a rank stalled: every request is lost then, and so is every later step.
        """
        self._is_stepping = True
        try:
            updates = self._expire()
            if not self.is_idle:
                updates += self._step()
        finally:
            self._is_stepping = False
            for generation in [*self._left, *(g for g in self._added if g.finish is not None)]:
                self.cancel(generation)
            self._left.clear()
        return updates

    def stats(self) -> Stats:
        """A copy, up to date."""
        pool, scheduler = self._engine.pool, self._scheduler
        now = Stats(**vars(self._stats))
        now.running, now.waiting = len(scheduler.running), len(scheduler.waiting)
        now.pages_held, now.pages_cached = pool.n_held, pool.n_idle
        now.preemptions, now.tokens_reused = scheduler.preemptions, scheduler.tokens_reused
        return now

    def check_integrity(self) -> None:
        """No page, slot or request is lost. Raises AssertionError otherwise."""
        self._engine.check_integrity()
        known = {*self._scheduler.running, *self._scheduler.waiting}
        assert known == self._added.keys(), "requests were lost, or stay that have ended"
        assert all(g.sequence is None for g in self._scheduler.waiting), "a waiting request holds pages"

    def _step(self) -> list[Update]:
        try:
            plan = self._scheduler.plan(self._prompt_seconds)
        except ResourceError as error:  # there is one text, and no room for it
            return [_failed(self._scheduler.running[0], str(error), "memory")]
        if not plan.shares:
            return []
        try:
            return self._carry_out(plan)
        except BaseException:  # an interrupt, say, between the step and what follows from it
            for share in plan.shares:
                if share.generation.sequence is not None:
                    self._scheduler.preempt(share.generation)
            raise

    def _carry_out(self, plan: Plan) -> list[Update]:
        drafts = self._drafts(plan)
        feeds = [
            Feed(_sequence(g), g.ids[g.computed : g.computed + s.n_ids] + drafted, s.n_logits + len(drafted))
            for s, drafted in zip(plan.shares, drafts, strict=True)
            for g in (s.generation,)
        ]
        began = perf_counter()
        logits = self._engine.step(feeds, tokens=plan.tokens, outputs=plan.outputs)
        seconds = perf_counter() - began
        self._account(plan, feeds, seconds)
        updates, at = [], 0
        for share, feed, drafted in zip(plan.shares, feeds, drafts, strict=True):
            rows = logits[at : at + feed.n_logits]
            at += feed.n_logits
            update = self._advance(share, rows, drafted, seconds)
            if update is not None:
                updates.append(update)
        return updates

    def _advance(self, share: Share, logits: Vector, drafted: list[int], seconds: float) -> Update | None:
        """What the step means for one text."""
        g = share.generation
        if g.completion_tokens:
            g.decode_seconds += seconds
        else:
            g.prompt_seconds += seconds
        before = g.computed - len(drafted)  # positions that are what they are, whatever is sampled
        at_end = before == len(g.ids)
        update = None
        try:
            if g.is_scored:
                g.score(logits, g.computed - share.n_ids)
                logits = logits[-1:]
            if at_end:
                update = g.sample(logits, drafted)
        except UserError as error:  # logits are never the user's mistake: what was asked of them is
            return _failed(g, str(error), "grammar")
        except FourfoldError as error:
            return _failed(g, str(error), "failure")
        except Exception as error:  # a request's own grammar, say: no reason for the others to end
            return _failed(g, f"sampling failed: {type(error).__name__}: {error}", "failure")
        if update is not None:
            n_accepted = sum(a == b for a, b in zip(update.ids, drafted, strict=False))
            if n_accepted < len(drafted):
                self._engine.rewind(_sequence(g), before + n_accepted)
            if drafted and self._speculation:
                self._speculation.learn(g, len(drafted), n_accepted)
            self._stats.drafted += len(drafted)
            self._stats.accepted += n_accepted
            self._stats.tokens_generated += len(update.ids)
        self._scheduler.computed(g)
        return update

    def _drafts(self, plan: Plan) -> list[list[int]]:
        """Ids to try after each text's last, where that is worth it and there are pages for them."""
        none: list[list[int]] = [[] for _ in plan.shares]
        n_rows = sum(share.n_ids for share in plan.shares)
        decoding = [i for i, s in enumerate(plan.shares) if s.n_ids == 1 and s.generation.completion_tokens]
        if self._speculation is None or plan.tokens == "many" or not decoding:
            return none
        texts = [plan.shares[i].generation for i in decoding]
        ends = [g.prompt_tokens + g.request.params.max_tokens - 1 for g in texts]
        room = [min(self._engine.context, end) - len(g.ids) for g, end in zip(texts, ends, strict=True)]
        for i, drafted in zip(decoding, self._speculation.draft(texts, room, n_rows, MAX_STEP_TOKENS), strict=True):
            sequence = _sequence(plan.shares[i].generation)
            try:
                self._engine.pool.reserve(sequence, sequence.length + 1 + len(drafted))
            except ResourceError:
                continue
            none[i] = drafted
        return none

    def _account(self, plan: Plan, feeds: Ids[Feed], seconds: float) -> None:
        n_ids = sum(len(feed.ids) for feed in feeds)
        if plan.tokens == "many":
            each = seconds / n_ids
            self._prompt_seconds += (each - self._prompt_seconds) * (0.3 if self._prompt_seconds else 1)
        elif self._speculation:
            self._speculation.observe(n_ids, seconds)
        self._stats.steps += 1
        self._stats.step_seconds += seconds
        self._stats.tokens_prompt += sum(s.generation.count(s.generation.computed) for s in plan.shares)
        weights = self._engine.bytes_per_token()
        self._stats.bytes_read += weights + sum(
            self._engine.bytes_per_token(feed.sequence.length) - weights for feed in feeds
        )

    def _expire(self) -> list[Update]:
        most = self._scheduler.limits.max_wait_seconds
        waiting = [g for g in self._scheduler.waiting if not g.prompt_seconds]  # whoever gave way has had its turn
        late = [g for g in waiting if monotonic() > self._added[g] + most]
        for generation in late:
            self._scheduler.remove(generation)  # now: this very step might find room for it
        return [_failed(g, f"no room was found for the request in {most:g} s", "waited") for g in late]


def lookup(cost: StepCost | None = None) -> Speculation:
    """Drafts from the text itself."""
    return speculation(PromptLookup(), cost)


def speculation(proposer: Proposer, cost: StepCost | None = None) -> Speculation:
    """Drafts by a proposer, as many at a time as an engine can go back by. `cost`: of its steps, as known so far."""
    return Speculation(proposer, MOST_BACK, cost)


def _failed(generation: Generation, why: str, kind: ErrorKind) -> Update:
    generation.finish = "error"
    return Update(generation, finish="error", error=why, error_kind=kind)


def _sequence(generation: Generation) -> Sequence:
    assert generation.sequence is not None, "a text without pages takes part in no step"
    return generation.sequence
