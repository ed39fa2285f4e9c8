"""Functions that a model may call: how it is told of them, and how its calls are read.

Calls are in Hermes' form, a JSON object between tags, which a grammar holds every answer to. A chat template that
speaks this form tells the model of the tools itself; for any other a system message does, and calls and results become
text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fourfold.chat_template import ChatTemplate, Message
from fourfold.errors import UserError
from fourfold.grammar import CALL_BEGIN, CALL_END, Form, Function, Grammars

RESULT_BEGIN, RESULT_END = "<tool_response>", "</tool_response>"
NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

_INSTRUCTIONS = f"""\
You may call functions. Here they are, one a line, as JSON with a schema of their arguments:
{{functions}}
To call one, write its name and its arguments in this form:
{CALL_BEGIN}
{{{{"name": "function's name", "arguments": {{{{...}}}}}}}}
{CALL_END}
What it returns comes back between {RESULT_BEGIN} and {RESULT_END}. Answer plainly where no function helps."""


@dataclass(frozen=True)
class Tools:
    """What one request lets the model call."""

    descriptions: Sequence[Mapping[str, Any]]  # as OpenAI writes them; none: no calls
    choice: Literal["auto", "required"] | tuple[str]  # or the name of the function that must be called
    several: bool  # more than one call in an answer

    def form(self, grammars: Grammars) -> Form:
        """The grammar that every answer follows. Raises UserError for parameters that cannot be enforced."""
        functions = [_function(d["function"]) for d in self.descriptions]
        if isinstance(self.choice, tuple):
            functions = [function for function in functions if function.name == self.choice[0]]
        several = self.several and not isinstance(self.choice, tuple)
        return grammars.tool_calls(functions, text=self.choice == "auto", several=several)


def _function(description: Mapping[str, Any]) -> Function:
    parameters = description.get("parameters") or NO_ARGUMENTS
    if parameters.get("type") != "object":
        raise UserError(f"the parameters of {description['name']} must be a schema of type object")
    return Function(description["name"], parameters)


def render(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str:
    """The prompt: by the template's own words where it speaks of tools in Hermes' form, else by ours."""
    if template.names("tools") and template.mentions(CALL_BEGIN):
        return template.render(messages, tools=tools)
    return template.render(_spelled_out(messages, tools))


def _spelled_out(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The same conversation in roles that every template knows."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            result = f"{RESULT_BEGIN}\n{content}\n{RESULT_END}"
            if plain and plain[-1].get("results"):
                plain[-1]["content"] += "\n" + result
            else:
                plain.append({"role": "user", "content": result, "results": True})
        else:
            calls = [_written(call["function"]) for call in message.get("tool_calls", ())]
            plain.append({"role": role, "content": "\n".join([content] * bool(content or not calls) + calls)})
    if tools:
        functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        told = _INSTRUCTIONS.format(functions=functions)
        if plain[0]["role"] == "system":
            plain[0]["content"] += "\n\n" + told
        else:
            plain.insert(0, {"role": "system", "content": told})
    return [{"role": message["role"], "content": message["content"]} for message in plain]


def _written(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"{CALL_BEGIN}\n{json.dumps(call, ensure_ascii=False)}\n{CALL_END}"


@dataclass(frozen=True)
class CallBegins:
    index: int  # among the answer's calls
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsGoOn:
    index: int
    text: str


Event = str | CallBegins | ArgumentsGoOn

_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')


class CallReader:
    """Takes an answer apart as it comes: text, and calls whose arguments go on piece by piece.

    The grammar has made sure of the form; an answer that ends too soon leaves its last call unfinished.
    """

    def __init__(self, several: bool) -> None:
        self.n_calls = 0
        self._several = several
        self._read = self._text
        self._rest = ""  # not understood yet
        self._space = ""  # white space that counts only where text follows
        self._depth, self._in_string, self._escaped = 0, False, False

    @property
    def is_amid_call(self) -> bool:
        """Whether a call has begun whose arguments are not whole: the length may end it there."""
        return self._read in (self._header, self._arguments)

    def push(self, text: str, last: bool = False) -> list[Event]:
        """What this piece of the answer makes certain."""
        self._rest += text
        events: list[Event] = []
        while True:
            state, before = self._read, self._rest
            events += self._read()
            if (self._read, self._rest) == (state, before) or not self._rest:
                break
        if last and self._read == self._text:
            text = self._space + self._rest
            events += [text] if text and (text.strip() or not self.n_calls) else []
        return events

    def _text(self) -> Iterator[Event]:
        may_call = self._several or not self.n_calls
        text, tag, rest = self._rest.partition(CALL_BEGIN) if may_call else (self._rest, "", "")
        if not tag:
            held = _overlap(text, CALL_BEGIN) if may_call else 0
            text, rest = text[: len(text) - held], text[len(text) - held :]
        self._rest = rest
        whole = self._space + text
        kept = whole.rstrip()
        self._space = whole[len(kept) :]
        if kept:
            yield kept
        if tag:
            self._space, self._read = "", self._header

    def _header(self) -> Iterator[Event]:
        if match := _HEADER.match(self._rest):
            self._rest = self._rest[match.end() :]
            self._depth, self._in_string, self._escaped = 0, False, False
            self.n_calls += 1
            self._read = self._arguments
            yield CallBegins(self.n_calls - 1, f"call_{uuid.uuid4().hex[:24]}", match[1])

    def _arguments(self) -> Iterator[Event]:
        for i, character in enumerate(self._rest):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            else:
                self._depth += (character in "{[") - (character in "}]")
                if self._depth == 0:
                    text, self._rest = self._rest[: i + 1], self._rest[i + 1 :]
                    self._read = self._tail
                    yield ArgumentsGoOn(self.n_calls - 1, text)
                    return
        text, self._rest = self._rest, ""
        if text:
            yield ArgumentsGoOn(self.n_calls - 1, text)

    def _tail(self) -> Iterator[Event]:
        _, tag, rest = self._rest.partition(CALL_END)
        if tag:
            self._rest, self._read = rest, self._text
        return iter(())


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a beginning of `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
