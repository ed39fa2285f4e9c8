"""Log probabilities as OpenAI writes them: one way for chats, another for completions."""

from __future__ import annotations

from collections.abc import Iterable

from fourfold.request import TokenLogprob
from fourfold.server.responses import ChatLogprob, CompletionLogprobs, TopLogprob
from fourfold.vocabulary import Vocabulary


def chat_logprobs(found: Iterable[TokenLogprob], vocabulary: Vocabulary) -> list[ChatLogprob]:
    """Of sampled ids, with their bytes: a character of several tokens has a part of its bytes in each."""

    def shown(token_id: int, logprob: float) -> TopLogprob:
        data = vocabulary.tokens[token_id]
        return TopLogprob(token=data.decode(errors="replace"), bytes=list(data), logprob=logprob)

    return [
        ChatLogprob(
            **shown(token.id, token.logprob or 0.0).model_dump(),
            top_logprobs=[shown(*likely) for likely in token.top],
        )
        for token in found
    ]


class CompletionScores:
    """Collects what a completion's choice says of its tokens. Offsets count from the choice's own beginning."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary, self._end = vocabulary, 0

    def of(self, found: Iterable[TokenLogprob], with_top: bool) -> CompletionLogprobs:
        """The next tokens. `with_top`: the likeliest ids beside each, by their text."""
        found = tuple(found)
        offsets = []
        for token in found:
            offsets.append(self._end)
            self._end += 0 if token.id in self._vocabulary.special else len(self._vocabulary.text(token.id))
        top = [self._top(token) for token in found]
        return CompletionLogprobs(
            text_offset=offsets,
            token_logprobs=[token.logprob for token in found],
            tokens=[self._text(token.id) for token in found],
            top_logprobs=top if with_top else None,
        )

    def _top(self, token: TokenLogprob) -> dict[str, float] | None:
        """The likeliest and the token itself, as OpenAI has it: so many and one more."""
        if not token.top:
            return None
        return {self._text(i): logprob for i, logprob in (*token.top, (token.id, token.logprob)) if logprob is not None}

    def _text(self, token_id: int) -> str:
        """A token that is no text by itself is written as its bytes, so that two of them do not look the same."""
        data = self._vocabulary.tokens[token_id]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
