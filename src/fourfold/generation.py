"""One text under way: its ids, how the next is sampled, and the text they make. Knows nothing of the others."""

from __future__ import annotations

from collections.abc import Sequence as Ids

import numpy as np
from numpy.typing import NDArray

from fourfold.kvcache import Key, Sequence, page_keys
from fourfold.request import Finish, Request, TokenLogprob, Update
from fourfold.sampling import StopChecker, log_probabilities, make_sampler
from fourfold.tokenizer import NoTokenizer, Tokenizer

FEW_PROMPT = 32  # ids; a longer prompt goes through the kernels for many rows, all else through those for few


class Generation:
    """A request and what has become of it.

    Which kernels compute a position depends on the request alone (`n_many`), never on its company: so do the bits.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | NoTokenizer, context: int) -> None:
        params = request.params
        self.request, self.ids = request, list(request.prompt)
        self.n_many = len(request.prompt) if len(request.prompt) > FEW_PROMPT else 0  # first ids, by many-row kernels
        self.sequence: Sequence | None = None  # while it holds pages
        self.cached_tokens = 0  # of the prompt, that others had computed
        self.finish: Finish | None = None
        self.arrival = -1  # its number, in the order of coming
        self.n_shared = 0  # its first pages, that others may adopt
        self.prompt_seconds = self.decode_seconds = 0.0  # of the steps until its first id, and of those after it
        self.scored: list[TokenLogprob] = [TokenLogprob(self.ids[0], None)] if request.prompt_logprobs else []
        self._context = context
        self._n_counted = 0  # ids of the prompt
        self._keys: list[Key] = []
        self._limit = tokenizer.vocab_size
        self._eos = frozenset(() if params.ignore_eos else tokenizer.eos_ids)
        self._decoder, self._stops = tokenizer.stream(request.after), StopChecker(params.stop, request.uncut)
        self._sampler = make_sampler(params, limit=tokenizer.vocab_size, n_prompt=len(self.ids))

    @property
    def prompt_tokens(self) -> int:
        """Ids that were given."""
        return len(self.request.prompt)

    @property
    def completion_tokens(self) -> int:
        """Ids that were sampled."""
        return len(self.ids) - len(self.request.prompt)

    @property
    def computed(self) -> int:
        """Positions in the KV cache."""
        return self.sequence.length if self.sequence else 0

    def count(self, n_ids: int) -> int:
        """Of the first `n_ids`, those of the prompt that were not counted before: what was taken away counts once."""
        new = max(0, min(n_ids, self.prompt_tokens) - self._n_counted)
        self._n_counted += new
        return new

    @property
    def is_scored(self) -> bool:
        """Whether logits of every id of the prompt are wanted."""
        return self.request.prompt_logprobs and not self.completion_tokens

    def keys(self, page: int, length: int) -> list[Key]:
        """Of the full pages among the first `length` ids."""
        n = length // page
        if len(self._keys) < n:
            before = self._keys[-1] if self._keys else b""
            self._keys += page_keys(self.ids[len(self._keys) * page : n * page], page, before)
        return self._keys[:n]

    def score(self, logits: NDArray[np.float32], first: int) -> None:
        """Logits after the prompt's ids from the `first` on: what they say of the ids that follow them."""
        n_likeliest = self.request.params.logprobs or 0
        del self.scored[first + 1 :]  # from before its pages were taken away
        for row, token_id in zip(logits, self.ids[first + 1 : self.prompt_tokens], strict=False):
            self.scored.append(TokenLogprob(token_id, *log_probabilities(row[: self._limit], token_id, n_likeliest)))

    def sample(self, logits: NDArray[np.float32], drafted: Ids[int] = ()) -> Update:
        """Logits (1 + drafted, vocab) after the last id and after each drafted one: the ids that are sampled from them.

        An id is sampled from its own row as if nothing had been drafted, until one is not what was drafted: drafts
        change no text, whatever the sampling.
        """
        ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        text = ""
        for row, draft in zip(logits, [*drafted, None], strict=True):
            if self.finish is None and self.request.params.max_tokens:
                ids.append(self._next(row))
                text += self._push(ids[-1])
                if self.request.params.logprobs is not None:
                    found = log_probabilities(row[: self._limit], ids[-1], self.request.params.logprobs)
                    logprobs.append(TokenLogprob(ids[-1], *found))
            if self.finish is not None or not ids or ids[-1] != draft:
                break
        if not self.request.params.max_tokens:
            self.finish = "length"
        scored, self.scored = tuple(self.scored), []
        return Update(self, text, tuple(ids), tuple(logprobs), scored, self.finish)

    def _next(self, row: NDArray[np.float32]) -> int:
        grammar = self.request.grammar
        token_id = self._sampler(row, self.ids, grammar.mask() if grammar else None)
        self.ids.append(token_id)
        if grammar and token_id not in self._eos:
            grammar.accept(token_id)
        return token_id

    def _push(self, token_id: int) -> str:
        """The text that is certain now; notices the end."""
        text = "" if token_id in self._eos else self._stops.push(self._decoder.push(token_id))
        if token_id in self._eos or self._stops.stopped:
            self.finish = "stop"
        elif self.completion_tokens == self.request.params.max_tokens or len(self.ids) > self._context:
            self.finish = "length"  # the last id has no position left, or no successor
        if self.finish is not None:
            text += self._stops.push(self._decoder.flush()) + self._stops.flush()
            self.finish = "stop" if self._stops.stopped else self.finish
        return text
