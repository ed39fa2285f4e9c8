"""Log probabilities as OpenAI writes them: one way for chats, another for completions."""

from __future__ import annotations

from codecs import getincrementaldecoder
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

    def __init__(self, vocabulary: Vocabulary, echo: str = "") -> None:
        """`echo`: the prompt as it stands in front of the answer, where its tokens are among those that come."""
        self._vocabulary, self._echo, self._end = vocabulary, echo, 0
        self._characters = getincrementaldecoder("utf-8")("replace")

    def of(self, found: Iterable[TokenLogprob], with_top: bool) -> CompletionLogprobs:
        """The next tokens. `with_top`: the likeliest ids beside each, by their text."""
        found = tuple(found)
        offsets = []
        for token in found:
            offsets.append(self._end)
            self._end += self._width(token.id)
        top = [self._top(token) for token in found]
        return CompletionLogprobs(
            text_offset=offsets,
            token_logprobs=[token.logprob for token in found],
            tokens=[self._text(token.id) for token in found],
            top_logprobs=top if with_top else None,
        )

    def _width(self, token_id: int) -> int:
        """Characters that the text has more with this token: of one in several tokens, with its last."""
        data = self._vocabulary.tokens[token_id]
        if token_id in self._vocabulary.special:  # is no part of a text, but where it was written in the prompt
            written = data.decode(errors="replace")
            return len(written) if self._echo.startswith(written, self._end) else 0
        if not self._end and self._echo[:1] not in ("", " ") and data.startswith(b" "):
            data = data[1:]  # the space that SentencePiece puts in front of a text
        return len(self._characters.decode(data))

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
