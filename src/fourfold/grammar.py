"""Answers of a given form: which ids may come next, by llguidance, which needs nothing but the ids' bytes.

The library parses and compiles what strangers send; its limits bound the time and memory of that, it opens no file and
no address, and what it refuses is a UserError with its reason.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fourfold.errors import UnsupportedError, UserError
from fourfold.sampling import Uncut

if TYPE_CHECKING:
    from fourfold.tokenizer import Tokenizer

CALL_BEGIN, CALL_END = "<tool_call>", "</tool_call>"  # Hermes' form, which Qwen speaks too
_PLACE, _EXCERPT = re.compile(r"^at \d+\(\d+\): "), re.compile(r"\n\s*\d+ \| ")
# One space behind commas and colons and none elsewhere: a small model that may write white space writes it without end.
_PLAIN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Function:
    """A function that a model may call."""

    name: str  # letters, digits, _ and -
    parameters: Mapping[str, Any]  # JSON schema of an object


@dataclass(frozen=True)
class Form:
    """A grammar that was compiled once; each text gets a matcher of its own by `matcher`."""

    _library: Any
    _vocab_size: int
    uncut: Uncut | None  # the parts that are formed, in a text that is free otherwise; None where all of it is formed

    def matcher(self) -> Matcher:
        """For one text, from its beginning."""
        return Matcher(self._library.deep_copy(), self._vocab_size)


class Matcher:
    """The state of one text: a `request.Grammar`."""

    def __init__(self, library: Any, vocab_size: int) -> None:
        self._library, self._vocab_size = library, vocab_size

    def mask(self) -> NDArray[np.bool_]:
        """(vocab,): the ids that may come next, an end of text among them where the text may end.

        Raises UserError where following the grammar takes more than its limits allow.
        """
        allowed = np.zeros(self._vocab_size, np.bool_)
        bits = np.frombuffer(self._library.compute_bitmask(), np.uint8)
        self._check()
        known = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        allowed[: len(known)] = known
        return allowed

    def accept(self, id: int) -> None:
        """The id that was sampled. Raises UserError where the grammar does not allow it."""
        self._library.consume_token(id)
        self._check()

    def _check(self) -> None:
        if self._library.is_error():
            raise UserError(f"the answer cannot follow the form that was asked ({_line(self._library.get_error())})")


class Grammars:
    """Compiles forms for one tokenizer. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size`: width of the logits. Raises UnsupportedError where llguidance is not installed."""
        try:
            import llguidance
        except ImportError:
            raise UnsupportedError(
                "answers of a given form need llguidance; install it with `pip install 'fourfold[serve]'`"
            ) from None
        self._llguidance, self._vocab_size = llguidance, vocab_size
        bridge = _Bridge(tokenizer)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(bridge), n_vocab=tokenizer.vocab_size, eos_token=list(tokenizer.eos_ids)
        )
        bridge.greedy = self._tokenizer.greedy_tokenize
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=1_000_000, max_lexer_states=100_000, max_grammar_size=200_000, verbose_errors=False
        )

    def json_object(self) -> Form:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any]) -> Form:
        """JSON that fits a schema. Raises UserError for one that is invalid, or says what cannot be enforced."""
        return self._compile(self._llguidance.LLMatcher.grammar_from_json_schema(_plain(schema)), "the JSON schema")

    def tool_calls(self, functions: Sequence[Function], *, text: bool, several: bool) -> Form:
        """Calls, each between CALL_BEGIN and CALL_END as {"name": ..., "arguments": ...}, arguments by their schema.

        `text`: free text may come instead of calls, before and behind them; without it one call at least is made.
        `several`: more calls than one may be made. Raises UserError for parameters that are no schema.
        """
        # Arguments hold no line break, so that this end is no other's.
        uncut = Uncut(CALL_BEGIN, f"\n{CALL_END}", most=sys.maxsize if several else 1) if text else None
        return self._compile(_calls_grammar(functions, text=text, several=several), "the tools' parameters", uncut)

    def _compile(self, grammar: str, what: str, uncut: Uncut | None = None) -> Form:
        matcher = self._llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise UserError(f"{what} cannot be followed: {_line(matcher.get_error())}")
        if warnings := matcher.get_grammar_warnings():
            raise UserError(f"{what} cannot be followed wholly: {_line('; '.join(warnings))}")
        return Form(matcher, self._vocab_size, uncut)


def _calls_grammar(functions: Sequence[Function], *, text: bool, several: bool) -> str:
    """llguidance's dialect of Lark. A lazy lexeme ends free text as soon as a call begins."""
    calls = [f"call_{i}" for i in range(len(functions))]
    lines = ["%llguidance {}"]
    if text:
        lines += [f"start: call{'*' if several else '?'} TEXT", "TEXT: /(.|\\n)*/"]
        lines += [f"begin[lazy]: TEXT {json.dumps(CALL_BEGIN)}", "call: begin body"]
    else:
        lines += [f"start: call{' (NEWLINE call)*' if several else ''}", 'NEWLINE: "\\n"']
        lines += [f"call: {json.dumps(CALL_BEGIN)} body"]
    lines += [f'body: "\\n" ({" | ".join(calls)}) {json.dumps("}" + chr(10) + CALL_END)}']
    for i, function in enumerate(functions):
        opening = f'{{"name": {json.dumps(function.name)}, "arguments": '
        lines += [f"call_{i}: {json.dumps(opening)} arguments_{i}"]
        lines += [f"arguments_{i}: %json {_plain(function.parameters)}"]
    return "\n".join(lines)


def _plain(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": _PLAIN})


class _Bridge:
    """The tokenizer as llguidance wants it: bytes of every id, and ids of a text in the middle of another."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode
        vocabulary = tokenizer.vocabulary
        self.tokens = list(vocabulary.tokens)
        self.special_token_ids = sorted(vocabulary.special | set(tokenizer.eos_ids))
        self.eos_token_id, self.bos_token_id = (tokenizer.eos_ids or (0,))[0], tokenizer.bos_id
        self.greedy: Any = None
        self._lead = self._encode("\n", add_special_tokens=False)

    def __call__(self, text: str) -> list[int]:
        """Raises TypeError for bytes: the sign by which llguidance knows that it is to pass text."""
        if not isinstance(text, str):
            raise TypeError("text, not bytes")
        for lead, skip in (("", 0), ("\n", len(self._lead))):  # where a space is put in front of every text
            ids = self._encode(lead + text, add_special_tokens=False)[skip:]
            if b"".join(self.tokens[i] for i in ids) == text.encode():
                return ids
        found: list[int] = self.greedy(text)
        return found


def _line(text: str) -> str:
    """What is wrong, without the place and the excerpt of a grammar that the client has not written."""
    reason = _EXCERPT.split(_PLACE.sub("", text), maxsplit=1)[0]
    return " ".join(reason.split())[:400]
