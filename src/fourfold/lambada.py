"""LAMBADA: the last word of a passage, guessed from all that comes before it (Paperno et al., arXiv 1606.06031)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold.errors import UserError
from fourfold.sampling import log_probabilities

if TYPE_CHECKING:
    from fourfold.llm import LLM
    from fourfold.tokenizer import Tokenizer


@dataclass(frozen=True)
class Passage:
    """A text cut before its last word."""

    context: tuple[int, ...]  # ids, at least one
    word: tuple[int, ...]  # ids, at least one: the white space before the word, and the word


def read_texts(path: Path, most: int | None = None) -> list[str]:
    """The `text` of each of the first `most` lines, JSON objects. Raises UserError for a file of another form."""
    if most is not None and most < 1:
        raise UserError(f"the number of passages must be at least 1, not {most}")
    texts: list[str] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if len(texts) == most:
                    break
                texts.append(_text(line, f"line {number} of {path}"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from None
    if not texts:
        raise UserError(f"{path} is empty; it must hold one JSON object a line")
    return texts


def cut(text: str, tokenizer: Tokenizer) -> Passage:
    """The last word is what follows the last space; white space before it is its own.

    The text is tokenized whole, and its word is what lies behind as many ids as its context has: what
    lm-evaluation-harness does (`lambada_openai`). Raises UserError where there is nothing to guess, or to guess from.
    """
    head, space, last = text.rpartition(" ")
    context, whole = tokenizer.encode(head.rstrip()), tokenizer.encode(text)
    if not (head.strip() and space and last.strip()) or not 0 < len(context) < len(whole):
        raise UserError(f"a passage must have a last word and something before it, unlike {text[-80:]!r}")
    return Passage(tuple(whole[: len(context)]), tuple(whole[len(context) :]))


def last_words(llm: LLM, texts: Sequence[str], report: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """How well a model guesses the last words of texts. `report` hears of texts done and in all.

    Returns `passages`, `accuracy` (the fraction whose every id is the likeliest, given those before it) and
    `perplexity` (exp of the mean over words of their -ln p, not over ids), as lm-evaluation-harness has them.
    Raises UserError for a text without a last word, or longer than the context.
    """
    right, total = 0, 0.0
    for done, text in enumerate(texts, 1):
        passage = cut(text, llm.tokenizer)
        logits = llm.logits((*passage.context, *passage.word))[len(passage.context) - 1 : -1]
        scores = [
            log_probabilities(row[: llm.tokenizer.vocab_size], token_id, 1)
            for row, token_id in zip(logits, passage.word, strict=True)
        ]
        right += all(logprob == likeliest for logprob, ((_, likeliest),) in scores)
        total -= sum(logprob for logprob, _ in scores)
        if report is not None:
            report(done, len(texts))
    mean = total / len(texts)
    return {
        "passages": len(texts),
        "accuracy": right / len(texts),
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
    }


def _text(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    text = found.get("text") if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where} is no JSON object with a text, as in {{"text": "..."}}')
    return text
