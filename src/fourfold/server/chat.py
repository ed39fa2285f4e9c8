"""POST /v1/chat/completions: messages in, the model's next one out, by its chat template."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from fourfold.grammar import Form
from fourfold.request import Request
from fourfold.sampling import SamplingParams
from fourfold.server import tools as tool_calls
from fourfold.server.chat_answer import Answer
from fourfold.server.errors import bad_request, failed
from fourfold.server.limits import check_count, check_depth
from fourfold.server.protocol import AssistantMessage, ChatRequest, Content, Message, NamedToolChoice, ToolMessage
from fourfold.server.replies import STREAMED, EventStream, JsonReply, closing_with_client
from fourfold.server.responses import ChatChoice, ChatChunk, ChatCompletion, ChatLogprobs, ChunkChoice
from fourfold.server.sampling_fields import check_logprobs, check_sampling, sampling_params
from fourfold.server.service import Service, new_id, service_of
from fourfold.server.usage import usage_of
from fourfold.server.worker import Job, JobFailed

router = APIRouter()


@router.post(
    "/v1/chat/completions", response_model=ChatCompletion, response_model_exclude_unset=True, responses=STREAMED
)
async def create_chat_completion(body: ChatRequest, http: HttpRequest) -> Response:
    """Answer a conversation, or call a function."""
    service = service_of(http)
    service.check_model(body.model)
    _check(body, service)
    tools = _tools(body)
    ids, form = await service.in_thread(_prompt, body, tools, service)
    n, room = body.n or 1, service.room(ids, "messages")
    max_tokens = min(body.max_completion_tokens or body.max_tokens or room, room)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = [sampling_params(body, i, max_tokens, logprobs) for i in range(n)]
    requests = [_request(ids, each, form) for each in params]
    check_logprobs(requests, service.limits, "top_logprobs")
    job = await service.submit(requests)
    answers = [Answer(i, tools, bool(body.logprobs), service.tokenizer.vocabulary) for i in range(n)]
    reply = _Reply(body, job, service)
    if body.stream:
        return EventStream(reply.stream(answers), job)
    async with closing_with_client(job, http.receive):
        try:
            return JsonReply(await reply.whole(answers))
        except JobFailed as error:
            raise failed(error) from None


def _check(body: ChatRequest, service: Service) -> None:
    limits = service.limits
    check_sampling(body, service.vocab_size, limits)
    check_count(len(body.messages), limits.max_messages, "messages", "messages")
    check_count(len(body.tools or ()), limits.max_tools, "tools", "tools")
    schemas = {f"tools[{i}].function.parameters": t.function.parameters for i, t in enumerate(body.tools or ())}
    if body.response_format and body.response_format.json_schema:
        schemas["response_format.json_schema.schema"] = body.response_format.json_schema.schema_
    size = 0
    for param, schema in schemas.items():
        check_depth(schema, limits.max_schema_depth, param)
        size += len(json.dumps(schema))
        check_count(size, limits.max_schema_bytes, "bytes of JSON schema", param)


def _tools(body: ChatRequest) -> tool_calls.Tools | None:
    """What may be called; None where nothing may."""
    choice: Literal["auto", "required"] | tuple[str]
    if not body.tools or body.tool_choice == "none":
        return None
    if isinstance(body.tool_choice, NamedToolChoice):
        choice = (body.tool_choice.function.name,)
    else:
        choice = "required" if body.tool_choice == "required" else "auto"
    descriptions = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in body.tools]
    return tool_calls.Tools(descriptions, choice, several=body.parallel_tool_calls is not False)


def _prompt(body: ChatRequest, tools: tool_calls.Tools | None, service: Service) -> tuple[tuple[int, ...], Form | None]:
    """Ids of the conversation, and the form of the answer. Raises UserError, or a 400."""
    if service.template is None:
        raise bad_request("this model has no chat template; use /v1/completions, or start with --chat-template")
    messages = [_message(message, i) for i, message in enumerate(body.messages)]
    text = tool_calls.render(service.template, messages, tools.descriptions if tools else [])
    ids = service.encode(text, "messages", add_special_tokens=False)
    form = body.response_format
    if tools is not None:
        return ids, tools.form(service.grammars)
    if form is None or form.type == "text":
        return ids, None
    schema = form.json_schema.schema_ if form.json_schema else None
    return ids, service.grammars.json_object() if schema is None else service.grammars.json_schema(schema)


def _request(ids: tuple[int, ...], params: SamplingParams, form: Form | None) -> Request:
    """Stop strings end what is said freely: neither a call nor JSON that was asked for is cut in half."""
    if form is None:
        return Request(ids, params)
    if form.uncut is None:
        params = dataclasses.replace(params, stop=())
    return Request(ids, params, form.matcher(), uncut=form.uncut)


def _message(message: Message, index: int) -> dict[str, Any]:
    """As chat templates know it: one text, arguments of calls as objects."""
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": _text(message.content)}
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage) and message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "type": call.type, "function": _call(call.function.name, call.function.arguments, index)}
            for call in message.tool_calls
        ]
    elif message.content is None:
        raise bad_request("an assistant's message needs a content, or tool_calls", f"messages[{index}].content")
    return plain


def _call(name: str, arguments: str, index: int) -> dict[str, Any]:
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, Mapping):
        raise bad_request("a call's arguments must be a JSON object, as text", f"messages[{index}].tool_calls")
    return {"name": name, "arguments": parsed}


def _text(content: Content | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


class _Reply:
    """The objects that answer one request."""

    def __init__(self, body: ChatRequest, job: Job, service: Service) -> None:
        self._job, self._n = job, body.n or 1
        self._wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._common: dict[str, Any] = {
            "id": new_id("chatcmpl"),
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }

    async def stream(self, answers: list[Answer]) -> AsyncIterator[ChatChunk]:
        """Chunks as OpenAI orders them: the role, what is said, why it ended, the usage where asked for."""
        for answer in answers:
            yield self._chunk(answer.opening())
        async for index, update in self._job.updates():
            for choice in answers[index].push(update):
                yield self._chunk(choice)
        if self._wants_usage and self._job.is_finished:
            usage = usage_of(self._job, self._n)
            yield ChatChunk(**self._common, object="chat.completion.chunk", choices=[], usage=usage)

    def _chunk(self, choice: ChunkChoice) -> ChatChunk:
        usage: dict[str, Any] = {"usage": None} if self._wants_usage else {}
        return ChatChunk(**self._common, **usage, object="chat.completion.chunk", choices=[choice])

    async def whole(self, answers: list[Answer]) -> ChatCompletion:
        """Everything at once."""
        async for index, update in self._job.updates():
            answers[index].push(update)
        choices = [
            ChatChoice(
                index=answer.index,
                message=answer.message(),
                logprobs=None if answer.logprobs is None else ChatLogprobs(content=answer.logprobs, refusal=None),
                finish_reason=answer.finish_reason or "stop",
            )
            for answer in answers
        ]
        usage = usage_of(self._job, self._n)
        return ChatCompletion(**self._common, object="chat.completion", choices=choices, usage=usage)
