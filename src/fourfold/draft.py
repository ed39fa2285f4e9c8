"""Drafts from a smaller model of the same tokenizer, which runs on the larger one's threads."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from time import perf_counter

from fourfold.engine import MAX_STEP_TOKENS, MOST_BACK, Engine, Feed
from fourfold.errors import ResourceError, UserError
from fourfold.generation import Generation
from fourfold.kvcache import Sequence
from fourfold.tokenizer import NoTokenizer, Tokenizer

READ_AT_ONCE = 256  # ids of prompts a step


@dataclass
class _Follower:
    """How far the small model has read one text."""

    sequence: Sequence
    read: list[int] = field(default_factory=list)  # ids in its cache, drafted ones among them
    n_agreeing: int = 0  # the first of them, that are known to be the text's


class DraftModel:
    """Proposes what a small model finds likeliest, one id after another, for all texts together (a `Proposer`)."""

    def __init__(self, engine: Engine, n_ids: int) -> None:
        """`n_ids`: what both models' tokenizer has; the rest of a vocabulary is padding."""
        self._engine, self._n_ids = engine, n_ids
        self._followers: dict[Generation, _Follower] = {}
        self._refused: set[Generation] = set()  # had no room
        self._budget = 0  # ids of prompts that may still be read in this step
        self._row_seconds = 0.0  # of a drafted id, lately

    @classmethod
    def of(
        cls, engine: Engine, tokenizer: Tokenizer | NoTokenizer, models_tokenizer: Tokenizer | NoTokenizer
    ) -> DraftModel:
        """Raises UserError where the two models' tokenizers are not the same."""
        check_same_tokenizer(models_tokenizer, tokenizer)
        return cls(engine, tokenizer.vocab_size)

    def close(self) -> None:
        """The small model's memory goes back."""
        self._engine.close()

    def propose(self, texts: Ids[Generation], most: Ids[int]) -> list[list[int]]:
        """At most so many ids for each text; none while it is still reading one, or has no room for it."""
        drafts: list[list[int]] = [[] for _ in texts]
        most_texts = MAX_STEP_TOKENS // (MOST_BACK + 1)  # which may be so far behind each
        self._budget = READ_AT_ONCE
        behind = [i for i, n in enumerate(most) if n > 0 and self._catch_up(texts[i], n)][:most_texts]
        began = perf_counter()
        while behind:
            feeds = [self._next(texts[i], drafts[i]) for i in behind]
            logits = self._engine.step(feeds, tokens="few", outputs="few")
            likeliest = logits[:, : self._n_ids].argmax(axis=1)
            for i, feed, token_id in zip(behind, feeds, likeliest.tolist(), strict=True):
                self._followers[texts[i]].read += feed.ids
                drafts[i].append(token_id)
            behind = [i for i in behind if len(drafts[i]) < most[i]]
        if n_drafted := sum(map(len, drafts)):
            each = (perf_counter() - began) / n_drafted
            self._row_seconds += (each - self._row_seconds) * (0.1 if self._row_seconds else 1)
        return drafts

    def forget(self, text: Generation) -> None:
        """Its pages are given back, and those who had no room may try again."""
        self._refused.discard(text)
        follower = self._followers.pop(text, None)
        if follower is not None:
            self._engine.free(follower.sequence)
            self._refused.clear()

    def row_seconds(self) -> float:
        """Seconds of a drafted id; what it takes to read a prompt is left out, being paid once."""
        return self._row_seconds

    def _next(self, text: Generation, drafted: list[int]) -> Feed:
        """All that the small model has not read yet."""
        follower = self._followers[text]
        n_read, n_ids = len(follower.read), len(text.ids)
        return Feed(follower.sequence, text.ids[n_read:] + drafted if n_read < n_ids else drafted[n_read - n_ids :])

    def _catch_up(self, text: Generation, most: int) -> bool:
        """Whether it has read all but the last few ids of a text and has room for so many drafts.

        Reads READ_AT_ONCE ids at most, of all texts together, so that nobody waits long for another's prompt.
        """
        if text in self._refused or len(text.ids) + MOST_BACK >= self._engine.context:
            return False
        follower = self._follower(text)
        if follower is None:
            return False
        try:
            self._engine.pool.reserve(follower.sequence, len(text.ids) + most)
        except ResourceError:  # do without, until somebody has left
            self.forget(text)
            self._refused.add(text)
            return False
        while (missing := len(text.ids) - 1 - len(follower.read)) > MOST_BACK:
            n_ids = min(missing, self._budget, MAX_STEP_TOKENS)
            if n_ids == 0:
                return False
            n_read = len(follower.read)
            ids = text.ids[n_read : n_read + n_ids]
            self._engine.step([Feed(follower.sequence, ids, 0)], tokens="many")
            follower.read += ids
            follower.n_agreeing = len(follower.read)
            self._budget -= n_ids
        return True

    def _follower(self, text: Generation) -> _Follower | None:
        """Of that text, gone back to where its ids and the text's part; None where there is no place for one."""
        follower = self._followers.get(text)
        if follower is not None:
            both = min(len(follower.read), len(text.ids) - 1)  # the last id is always read anew
            n = follower.n_agreeing = min(follower.n_agreeing, both)
            while n < both and follower.read[n] == text.ids[n]:
                n += 1
            back = len(follower.read) - n
            if back > MOST_BACK or n < 1:
                self.forget(text)
                follower = None
            elif back:
                self._engine.rewind(follower.sequence, n)
                del follower.read[n:]
            if follower is not None:
                follower.n_agreeing = n
        if follower is None and self._engine.pool.has_slot:
            follower = self._followers[text] = _Follower(self._engine.new_sequence())
        return follower


def check_same_tokenizer(model: Tokenizer | NoTokenizer, draft: Tokenizer | NoTokenizer) -> None:
    """Raises UserError where an id of one is another text in the other."""
    if isinstance(model, NoTokenizer) or isinstance(draft, NoTokenizer):
        if type(model) is type(draft) and model.vocab_size == draft.vocab_size:
            return
        raise UserError("a model without a tokenizer can only be helped by one that has none and as many ids")
    n_ids = min(model.vocab_size, draft.vocab_size)
    differing = next((i for i in range(n_ids) if model.decode([i], False) != draft.decode([i], False)), None)
    if model.vocab_size != draft.vocab_size or differing is not None:
        what = f"id {differing} is another text" if differing is not None else "one has more ids"
        raise UserError(f"the draft model has another tokenizer ({what}): choose a smaller model of its family")
