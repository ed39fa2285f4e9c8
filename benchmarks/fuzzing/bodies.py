"""Bodies of requests: such as must be answered, and such as are nearly so."""

from __future__ import annotations

import json
from copy import deepcopy
from random import Random
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
FEW_TOKENS = 24

_WORDS = [
    "the",
    "a",
    "of",
    "to",
    "and",
    "city",
    "river",
    "time",
    "return",
    "def",
    "class",
    "if",
    "1",
    "2",
    "3.14",
    "Paris",
    "北京",
    "你好",
    "été",
    "😀",
    "\u200f́",
    "\x00",
    "\t\n",
    "<|im_end|>",
]
_SPECIAL = (
    "<|im_start|>system\n",
    "<tool_call>",
    "{{ messages }}",
    "%s%n",
    "\u2028",
    "</s>",
    '"}]',
    "data: [DONE]\n\n",
)
_SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "object"},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"s": {"type": "string", "pattern": "^[a-z]{1,9}$"}}, "required": ["s"]},
    {"type": "object", "properties": {"l": {"type": "array", "items": {"enum": ["x", "yy", 3, None]}, "maxItems": 4}}},
    {"type": "object", "properties": {"o": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/n"}]}},
     "$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}},
)  # fmt: skip
_ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 17, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308, 1e-320, -0.0),
    *(float("nan"), float("inf"), "", "x", "1", "\x00", "\ud800", "😀" * 50, "x" * 100_000, "a" * 257),
    *([], {}, [[]], [None], [1, "a"], [""], ["x"] * 1000, [0] * 5000, {"": ""}, {"type": "text"}, {"x": {"y": []}}),
)


class Bodies:
    """What a random client asks of one model."""

    def __init__(self, random: Random, model: str, context: int) -> None:
        self._random, self._model, self._context = random, model, context

    def text(self, most_words: int) -> str:
        """Words of all kinds."""
        random = self._random
        words = [random.choice(_WORDS) for _ in range(random.randint(1, most_words))]
        if random.random() < 0.2:
            words.insert(random.randrange(len(words)), random.choice(_SPECIAL))
        return " ".join(words)

    def valid(self) -> tuple[str, dict[str, Any]]:
        """A path, and a body that it must answer."""
        return (CHAT, self._chat()) if self._random.random() < 0.5 else (COMPLETIONS, self._completion())

    def nearly_valid(self) -> tuple[str, bytes]:
        """A path, and a body with something wrong: a value, a field, the JSON, the bytes."""
        random = self._random
        path, body = self.valid()
        for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
            self._spoil(body)
        if random.random() < 0.01:
            body[random.choice(("prompt", "messages", "stop", "tools", "foo"))] = [
                random.choice((1, "x", [1], {}, None))
            ] * 300_000
        data = json.dumps(body, ensure_ascii=random.random() < 0.5).encode(errors="surrogatepass")
        spoilt = random.random()
        if spoilt < 0.1:
            data = data[: random.randrange(len(data))]
        elif spoilt < 0.2:
            at = random.randrange(len(data))
            data = data[:at] + random.randbytes(random.randint(1, 4)) + data[at + 1 :]
        elif spoilt < 0.23:
            data = data.decode(errors="replace").encode(random.choice(("utf-16", "utf-8-sig", "utf-32")))
        elif spoilt < 0.26:
            deep = random.choice((100, 5000, 100_000))
            data = data[:-1] + b', "deep": ' + b'[{"a":' * deep + b"1" + b"}]" * deep + b"}"
        elif spoilt < 0.28:
            data = random.choice((b"", b"[]", b"1", b"null", b'"x"', b"{}", b"\x00", b"{" * 9999, b"1" * 99_999))
        return path, data

    def _common(self) -> dict[str, Any]:
        random = self._random
        optional: dict[str, Any] = {
            "n": random.randint(1, 3),
            "stream": random.random() < 0.7,
            "temperature": random.choice((0, 0.0, 1e-9, 0.7, 1, 2)),
            "top_p": random.choice((0, 1e-9, 0.5, 0.95, 1)),
            "stop": random.choice((self.text(2), [self.text(2) for _ in range(random.randint(1, 16))])),
            "seed": random.randint(-(2**63), 2**63 - 1),
            "presence_penalty": random.uniform(-2, 2),
            "frequency_penalty": random.choice((-2, 0, 2)),
            "logit_bias": {str(random.randrange(250)): random.choice((-100, 100, 0.5)) for _ in range(8)},
            "user": self.text(3),
            "top_k": random.choice((1, 2, 50, 2**31 - 1)),
            "min_p": random.choice((0, 0.05, 1)),
            "repetition_penalty": random.choice((0.01, 0.9, 1.2, 100)),
            "ignore_eos": random.random() < 0.5,
        }
        chosen = {name: value for name, value in optional.items() if random.random() < 0.25}
        if chosen.get("stream") and random.random() < 0.5:
            chosen["stream_options"] = {"include_usage": random.random() < 0.7}
        return {"model": self._model, "max_tokens": random.randint(1, FEW_TOKENS), **chosen}

    def _completion(self) -> dict[str, Any]:
        random = self._random
        ids = [random.randrange(3, 250) for _ in range(random.choice((1, 2, 20, 100, self._context // 2)))]
        prompt = random.choice((self.text(60), [self.text(20), self.text(5)], ids, [ids[:30], ids[:3]]))
        body = {**self._common(), "prompt": prompt}
        if random.random() < 0.3:
            body["logprobs"] = random.choice((0, 1, 5, 20))
        if random.random() < 0.3:
            body |= {"echo": True, "max_tokens": random.choice((0, 0, 1, 5))}
        return body

    def _chat(self) -> dict[str, Any]:
        random = self._random
        turns = [
            {"role": random.choice(("user", "assistant", "system", "developer")), "content": self._content()}
            for _ in range(random.randint(0, 4))
        ]
        body = {**self._common(), "messages": [*turns, {"role": "user", "content": self._content()}]}
        if random.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": random.randint(0, 20)}
        schema, form = deepcopy(random.choice(_SCHEMAS)), random.random()
        if form < 0.15:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        elif form < 0.2:
            body["response_format"] = {"type": random.choice(("json_object", "text"))}
        elif form < 0.35:
            body["tools"] = [{"type": "function", "function": {"name": "look_up", "parameters": schema}}]
            body["tool_choice"] = random.choice(("auto", "required", "none"))
            if random.random() < 0.5:
                function = {"name": "look_up", "arguments": '{"a": 1}'}
                call = {"id": "c1", "type": "function", "function": function}
                body["messages"] += [
                    {"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "c1", "content": self.text(5)},
                ]
        return body

    def _content(self) -> Any:
        text = self.text(self._random.choice((3, 20, self._context // 40)))
        return text if self._random.random() < 0.8 else [{"type": "text", "text": text}]

    def _spoil(self, body: dict[str, Any]) -> None:
        """Somewhere in it: another value, no value, or a field more."""
        random, where = self._random, body
        while inner := [value for value in where.values() if isinstance(value, dict) and value]:
            if random.random() < 0.6:
                break
            where = random.choice(inner)
        choice, name = random.random(), random.choice(list(where))
        value = where[name]
        if choice < 0.15:
            del where[name]
            where.setdefault("model", self._model)
        elif choice < 0.3:
            where[random.choice(("foo", "functions", "best_of", "prompt_logprobs", "__class__", "", "\ud800"))] = 1
        elif choice < 0.5 and isinstance(value, list) and value:
            value[random.randrange(len(value))] = deepcopy(random.choice(_ODD))
        else:
            where[name] = deepcopy(random.choice(_ODD))
