"""What is asked of the step loop, and what it says: values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from fourfold.config import ModelConfig
from fourfold.errors import UserError
from fourfold.sampling import Allowed, SamplingParams, Uncut

if TYPE_CHECKING:
    from fourfold.generation import Generation

Finish = Literal["stop", "length", "error"]  # an end or stop string; max_tokens or the context; a failure
# Whose fault an error is: nobody's, for now (no room came in time, or there is none), the grammar's, or fourfold's.
ErrorKind = Literal["waited", "memory", "grammar", "failure"]


class Grammar(Protocol):
    """Constrains what is sampled for one text, whose state it carries."""

    def mask(self) -> Allowed | None:
        """The ids that may come next, an end of text among them where the text may end; None: all."""

    def accept(self, token_id: int) -> None:
        """That id was sampled."""


@dataclass(frozen=True)
class Request:
    """One text to continue."""

    prompt: tuple[int, ...]  # ids, at least one
    params: SamplingParams = field(default_factory=SamplingParams)
    grammar: Grammar | None = None  # a fresh one for each request
    after: tuple[int, ...] = ()  # ids whose text precedes the answer: a completion's prompt, nothing in a chat
    uncut: Uncut | None = None  # parts of the answer that params.stop does not end
    prompt_logprobs: bool = False  # of the prompt's ids too, with params.logprobs of the likeliest each


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model held an id: by its own distribution, before bias, penalties and temperature."""

    id: int
    logprob: float | None  # natural; None for a prompt's first id
    top: tuple[tuple[int, float], ...] = ()  # the likeliest ids and theirs, likeliest first


@dataclass(frozen=True)
class Update:
    """What one step did for one request."""

    generation: Generation
    text: str = ""  # whole characters, without stop strings
    ids: tuple[int, ...] = ()  # sampled; several where drafts were accepted
    logprobs: tuple[TokenLogprob, ...] = ()  # of the ids, where asked for
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # once, where asked for
    finish: Finish | None = None  # of the last update
    error: str | None = None  # a sentence, with finish "error"
    error_kind: ErrorKind | None = None  # the same


def check_prompt(ids: Sequence[int], config: ModelConfig, context: int) -> None:
    """Raises UserError for an empty prompt, for one that is too long, and for ids that the model does not have.

    So it does for tokens that stand for images.
    """
    if not ids:
        raise UserError("the prompt is empty; pass at least one token")
    if len(ids) > context:
        raise UserError(f"the prompt has {len(ids)} tokens but the context only {context}; shorten it")
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise UserError(f"ids {min(ids)} to {max(ids)} are not all the model's, which are 0 to {config.vocab_size - 1}")
    if images := sorted(set(config.image_ids).intersection(ids)):
        raise UserError(
            f"the prompt has the token {images[0]}, which stands for an image, and fourfold takes text only"
        )
