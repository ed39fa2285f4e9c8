"""One answer of a chat as its updates come in: deltas for a stream, and the whole message."""

from __future__ import annotations

from typing import Any

from fourfold.request import Update
from fourfold.server.logprobs import chat_logprobs
from fourfold.server.responses import (
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    Delta,
    FinishReason,
    FunctionCall,
    FunctionCallDelta,
    ToolCall,
    ToolCallDelta,
)
from fourfold.server.tools import ArgumentsGoOn, CallBegins, CallReader, Tools
from fourfold.vocabulary import Vocabulary


class Answer:
    """What has been said so far. Give it every update, in order."""

    def __init__(self, index: int, tools: Tools | None, with_logprobs: bool, vocabulary: Vocabulary) -> None:
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.logprobs: list[ChatLogprob] | None = [] if with_logprobs else None
        self._vocabulary = vocabulary
        self._reader = None if tools is None else CallReader(tools.several and not isinstance(tools.choice, tuple))
        self._text = ""
        self._calls: list[ToolCall] = []

    def opening(self) -> ChunkChoice:
        """The first chunk: whose message it is."""
        return ChunkChoice(index=self.index, delta=Delta(role="assistant", content=""), finish_reason=None)

    def push(self, update: Update) -> list[ChunkChoice]:
        """The chunks that an update makes: what it says, and last why the answer ended."""
        reader = self._reader
        events = [update.text] if reader is None else reader.push(update.text, last=update.finish is not None)
        deltas = [self._delta(event) for event in events if event != ""]
        extra: dict[str, Any] = {}
        if self.logprobs is not None and update.logprobs:
            found = chat_logprobs(update.logprobs, self._vocabulary)
            self.logprobs += found
            extra = {"logprobs": ChatLogprobs(content=found, refusal=None)}
            deltas = deltas or [Delta()]
        chunks = []
        for delta in deltas:
            chunks.append(ChunkChoice(index=self.index, delta=delta, finish_reason=None, **extra))
            extra = {}
        if update.finish is not None:
            ended_by_call = update.finish == "stop" and self._calls and not (reader and reader.is_amid_call)
            self.finish_reason = "tool_calls" if ended_by_call else "length" if update.finish == "length" else "stop"
            chunks.append(ChunkChoice(index=self.index, delta=Delta(), finish_reason=self.finish_reason))
        return chunks

    def message(self) -> ChatMessage:
        """All of it."""
        calls = {"tool_calls": self._calls} if self._calls else {}
        content = self._text if self._text or not self._calls else None
        return ChatMessage(role="assistant", content=content, refusal=None, **calls)

    def _delta(self, event: str | CallBegins | ArgumentsGoOn) -> Delta:
        if isinstance(event, str):
            self._text += event
            return Delta(content=event)
        if isinstance(event, CallBegins):
            begun = FunctionCall(name=event.name, arguments="")
            self._calls.append(ToolCall(id=event.id, type="function", function=begun))
            function = FunctionCallDelta(name=event.name, arguments="")
            call = ToolCallDelta(index=event.index, id=event.id, type="function", function=function)
        else:
            self._calls[event.index].function.arguments += event.text
            call = ToolCallDelta(index=event.index, function=FunctionCallDelta(arguments=event.text))
        return Delta(tool_calls=[call])
