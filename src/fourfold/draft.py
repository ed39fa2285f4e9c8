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


@dataclass
class _Follower:
    """How far the small model has read one text."""

    sequence: Sequence
    read: list[int] = field(default_factory=list)  # ids in its cache, drafted ones among them


class DraftModel:
    """Proposes what a small model finds likeliest, one id after another, for all texts together (a `Proposer`)."""

    def __init__(self, engine: Engine, n_ids: int) -> None:
        """`n_ids`: what both models' tokenizer has; the rest of a vocabulary is padding."""
        self._engine, self._n_ids = engine, n_ids
        self._followers: dict[Generation, _Follower] = {}
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
        """At most so many ids for each text; none for those whose text the small model has no room for."""
        drafts: list[list[int]] = [[] for _ in texts]
        began = perf_counter()
        try:
            most_texts = MAX_STEP_TOKENS // (MOST_BACK + 1)  # which may be so far behind each
            behind = [i for i, n in enumerate(most) if n > 0 and self._catch_up(texts[i])][:most_texts]
            while behind:
                feeds = [self._next(texts[i], drafts[i]) for i in behind]
                logits = self._engine.step(feeds, tokens="few", outputs="few")
                likeliest = logits[:, : self._n_ids].argmax(axis=1)
                for i, feed, token_id in zip(behind, feeds, likeliest.tolist(), strict=True):
                    self._followers[texts[i]].read += feed.ids
                    drafts[i].append(token_id)
                behind = [i for i in behind if len(drafts[i]) < most[i]]
        except ResourceError:  # its cache is full: go without
            self._drop_all()
            return [[] for _ in texts]
        n_drafted = sum(map(len, drafts))
        if n_drafted:
            each = (perf_counter() - began) / n_drafted
            self._row_seconds += (each - self._row_seconds) * (0.1 if self._row_seconds else 1)
        return drafts

    def forget(self, text: Generation) -> None:
        """Its pages are given back."""
        follower = self._followers.pop(text, None)
        if follower is not None:
            self._engine.free(follower.sequence)

    def row_seconds(self) -> float:
        """Seconds of a drafted id, reading what came before it included."""
        return self._row_seconds

    def _next(self, text: Generation, drafted: list[int]) -> Feed:
        """All that the small model has not read yet."""
        follower = self._followers[text]
        n_read, n_ids = len(follower.read), len(text.ids)
        return Feed(follower.sequence, text.ids[n_read:] + drafted if n_read < n_ids else drafted[n_read - n_ids :])

    def _catch_up(self, text: Generation) -> bool:
        """Reads all but the last few ids of a text; False where there is no room for it."""
        if len(text.ids) + MOST_BACK >= self._engine.context:
            return False
        follower = self._followers.get(text)
        if follower is not None:
            agreeing = next(
                (i for i, (a, b) in enumerate(zip(follower.read, text.ids, strict=False)) if a != b),
                min(len(follower.read), len(text.ids)),
            )
            agreeing = min(agreeing, len(text.ids) - 1)
            back = len(follower.read) - agreeing
            if back > MOST_BACK or agreeing < 1:
                self.forget(text)
                follower = None
            elif back:
                self._engine.rewind(follower.sequence, agreeing)
                del follower.read[agreeing:]
        if follower is None:
            if not self._engine.pool.has_slot:
                return False
            follower = self._followers[text] = _Follower(self._engine.new_sequence())
        while (missing := len(text.ids) - 1 - len(follower.read)) > MOST_BACK:
            n_read = len(follower.read)
            ids = text.ids[n_read : n_read + min(missing, MAX_STEP_TOKENS)]
            self._engine.step([Feed(follower.sequence, ids, 0)], tokens="many")
            follower.read += ids
        return True

    def _drop_all(self) -> None:
        for text in list(self._followers):
            self.forget(text)


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
