"""Request fields to `SamplingParams`: OpenAI's names and defaults on one side, fourfold's on the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fourfold.errors import UserError
from fourfold.request import Request
from fourfold.sampling import SamplingParams
from fourfold.server.errors import bad_request
from fourfold.server.limits import Limits, check_count, check_stops
from fourfold.server.protocol import SamplingFields

TEMPERATURE = 1.0  # OpenAI's default; fourfold's own is 0
LEAST_TOP_P = 1e-9  # top_p 0: the likeliest token alone


def check_sampling(body: SamplingFields, vocab_size: int, limits: Limits) -> None:
    """Raises a 400 for what the limits, or the vocabulary, do not allow."""
    check_count(body.n or 1, limits.max_n, "answers", "n")
    check_stops(stops_of(body), limits)
    biases = body.logit_bias or {}
    check_count(len(biases), limits.max_biases, "biases", "logit_bias")
    for token in biases:
        if not (token.isdecimal() and token.isascii() and len(token) < 10 and int(token) < vocab_size):
            raise bad_request(f"logit_bias is by token id, from 0 to {vocab_size - 1}, as text", "logit_bias")


def sampling_params(body: SamplingFields, index: int, max_tokens: int, logprobs: int | None) -> SamplingParams:
    """For the `index`-th answer to a prompt: with a seed, each answer has a seed of its own. Raises a 400."""
    given: dict[str, Any] = {
        "temperature": TEMPERATURE if body.temperature is None else body.temperature,
        "top_p": None if body.top_p is None else max(body.top_p, LEAST_TOP_P),
        "top_k": None if body.top_k in (0, -1) else body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "ignore_eos": body.ignore_eos,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logit_bias": {int(token): bias for token, bias in (body.logit_bias or {}).items()},
        "seed": None if body.seed is None else (body.seed + index) % 2**64,
        "stop": tuple(stops_of(body)),
    }
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            logprobs=logprobs,
            **{name: value for name, value in given.items() if value is not None},
        )
    except UserError as error:
        raise bad_request(str(error)) from None


def check_logprobs(requests: Sequence[Request], limits: Limits, param: str) -> None:
    """Raises a 400 for more than the limits allow: each takes memory until the whole answer is sent."""
    count = 0
    for request in requests:
        if (alternatives := request.params.logprobs) is not None:
            scored = len(request.prompt) if request.prompt_logprobs else 0
            count += (scored + request.params.max_tokens) * (1 + alternatives)
    check_count(count, limits.max_logprobs, "log probabilities", param)


def stops_of(body: SamplingFields) -> list[str]:
    return [body.stop] if isinstance(body.stop, str) else body.stop or []
