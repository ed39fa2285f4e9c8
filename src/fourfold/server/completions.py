"""POST /v1/completions: texts as they stand, without a chat template."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from fourfold.request import Request, Update
from fourfold.server.errors import bad_request, failed
from fourfold.server.limits import check_count
from fourfold.server.logprobs import CompletionScores
from fourfold.server.protocol import CompletionRequest
from fourfold.server.replies import STREAMED, EventStream, JsonReply, closing_with_client
from fourfold.server.responses import Completion, CompletionChoice, CompletionLogprobs, FinishReason
from fourfold.server.sampling_fields import check_logprobs, check_sampling, sampling_params
from fourfold.server.service import Service, new_id, service_of
from fourfold.server.usage import usage_of
from fourfold.server.worker import Job, JobFailed

MAX_TOKENS = 16  # OpenAI's default

router = APIRouter()


@dataclass(frozen=True)
class _Prompt:
    text: str | None  # as it was sent, or what its ids say; None where nobody asks
    ids: tuple[int, ...]


@router.post("/v1/completions", response_model=Completion, response_model_exclude_unset=True, responses=STREAMED)
async def create_completion(body: CompletionRequest, http: HttpRequest) -> Response:
    """Continue one prompt or several."""
    service = service_of(http)
    service.check_model(body.model)
    check_sampling(body, service.vocab_size, service.limits)
    prompts = await service.in_thread(_prompts, body, service)
    n = body.n or 1
    check_count(len(prompts) * n, service.limits.max_texts, "texts (prompts times n)", "prompt")
    requests = [_request(body, prompt, i, service) for prompt in prompts for i in range(n)]
    check_logprobs(requests, service.limits, "logprobs")
    job = await service.submit(requests)
    texts = [_Text(body, prompt, service) for prompt in prompts for _ in range(n)]
    reply = _Reply(body, job, service)
    if body.stream:
        return EventStream(reply.stream(texts), job)
    async with closing_with_client(job, http.receive):
        try:
            return JsonReply(await reply.whole(texts))
        except JobFailed as error:
            raise failed(error) from None


def _prompts(body: CompletionRequest, service: Service) -> list[_Prompt]:
    """Every prompt's ids. Raises a 400, or UserError, for what is no prompt."""
    given: list[Any]
    if isinstance(body.prompt, str) or (body.prompt and isinstance(body.prompt[0], int)):
        given = [body.prompt]
    else:
        given = list(body.prompt)
    check_count(len(given), service.limits.max_texts, "prompts", "prompt")
    if not given:
        raise bad_request("prompt is an empty list; send at least one", "prompt")
    tokenizer, found = service.tokenizer, []
    for prompt in given:
        ids = service.encode(prompt, "prompt") if isinstance(prompt, str) else tuple(prompt)
        service.room(ids, "prompt")
        if not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
            raise bad_request(f"token ids go from 0 to {tokenizer.vocab_size - 1}", "prompt")
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids) if body.echo else None
        found.append(_Prompt(text, ids))
    return found


def _request(body: CompletionRequest, prompt: _Prompt, index: int, service: Service) -> Request:
    asked = MAX_TOKENS if body.max_tokens is None else body.max_tokens
    params = sampling_params(body, index, min(asked, service.room(prompt.ids, "prompt")), body.logprobs)
    scored = bool(body.echo) and body.logprobs is not None
    return Request(prompt.ids, params, after=prompt.ids, prompt_logprobs=scored)


class _Text:
    """One choice as its updates come in."""

    def __init__(self, body: CompletionRequest, prompt: _Prompt, service: Service) -> None:
        self._echo = (prompt.text or "") if body.echo else ""
        self._asked = body.logprobs
        self._scores = CompletionScores(service.tokenizer.vocabulary, self._echo)

    def push(self, update: Update) -> tuple[str, CompletionLogprobs | None, FinishReason | None]:
        """What this update adds; the echo comes with the first."""
        text, self._echo = self._echo + update.text, ""
        logprobs = None
        if self._asked is not None:
            logprobs = self._scores.of((*update.prompt_logprobs, *update.logprobs), with_top=self._asked > 0)
        return text, logprobs, update.finish  # type: ignore[return-value]  # errors are raised before they come here


class _Reply:
    """The objects that answer one request."""

    def __init__(self, body: CompletionRequest, job: Job, service: Service) -> None:
        self._job, self._n = job, body.n or 1
        self._wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._common: dict[str, Any] = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }

    async def stream(self, texts: list[_Text]) -> AsyncIterator[Completion]:
        """A chunk for each update that adds something."""
        usage: dict[str, Any] = {"usage": None} if self._wants_usage else {}
        async for index, update in self._job.updates():
            text, logprobs, finish = texts[index].push(update)
            if text or finish or (logprobs and logprobs.tokens):
                choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish)
                yield Completion(**self._common, **usage, choices=[choice])
        if self._wants_usage and self._job.is_finished:
            yield Completion(**self._common, choices=[], usage=usage_of(self._job, self._n))

    async def whole(self, texts: list[_Text]) -> Completion:
        """Everything at once."""
        choices = [CompletionChoice(index=i, text="", logprobs=None, finish_reason=None) for i in range(len(texts))]
        async for index, update in self._job.updates():
            text, logprobs, finish = texts[index].push(update)
            choice = choices[index]
            choice.text += text
            choice.finish_reason = finish
            choice.logprobs = _joined(choice.logprobs, logprobs)
        return Completion(**self._common, choices=choices, usage=usage_of(self._job, self._n))


def _joined(first: CompletionLogprobs | None, then: CompletionLogprobs | None) -> CompletionLogprobs | None:
    if first is None or then is None:
        return first or then
    first.text_offset += then.text_offset  # in place: copies would take time by the square of the answer's length
    first.token_logprobs += then.token_logprobs
    first.tokens += then.tokens
    if first.top_logprobs is not None:
        first.top_logprobs += then.top_logprobs or []
    return first
