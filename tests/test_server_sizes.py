"""Large bodies, large answers, costly forms: refused by a number, or bounded, before they cost the others anything."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fourfold.errors import UserError
from fourfold.grammar import Grammars
from scripted import VOCAB, byte_tokenizer
from serving import ASK, MODEL, Served, messages, served

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASKED = {"model": MODEL, "prompt": "a"}
MANY = 400_000


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running
        running.until_empty()


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        (COMPLETIONS, {**ASKED, "prompt": ["a"] + [1] * MANY}, "prompt: has 400001 prompts, more than 10000"),
        (COMPLETIONS, {**ASKED, "prompt": [1] * MANY + ["a"]}, "prompt: must be a text"),
        (COMPLETIONS, {**ASKED, "prompt": [[1]] * MANY}, "prompt: has 400000 prompts, more than 10000"),
        (COMPLETIONS, {**ASKED, "stop": [1] * MANY}, "stop[0]: Input should be a valid string"),
        (COMPLETIONS, {**ASKED, "logit_bias": {str(i): "" for i in range(200_000)}}, "logit_bias: has 200000 entries"),
        (COMPLETIONS, {**ASKED, **{str(i): 1 for i in range(200_000)}}, "the body: has 200002 fields"),
        (CHAT, {**ASK, "messages": [1] * MANY}, "messages[0]: Input should be"),
        (
            CHAT,
            {**ASK, "messages": [{"role": "user", "content": [1] * MANY}]},
            "messages[0].content[0]: Input should be",
        ),
        (CHAT, {**ASK, "tools": [{}] * MANY}, "tools[0].type is missing"),
        (CHAT, {**ASK, "metadata": dict.fromkeys(map(str, range(200_000)), 1)}, "metadata: has 200000 entries"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value)[:40],
)
def test_a_mistake_a_million_times_is_told_once(server: Served, path: str, body: dict[str, Any], says: str) -> None:
    """Each took seconds, in which nobody was answered, and gigabytes."""
    began = time.process_time()
    status, sentence, _ = messages(server.http.post(path, json=body))
    assert time.process_time() - began < 3
    assert status == 400
    assert sentence.startswith(says)


def test_a_text_far_too_long_is_not_cut_into_tokens(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four megabytes took three seconds of a core."""
    asked = "x" * 1_000_000
    monkeypatch.setattr(type(server.service.tokenizer), "encode", lambda *_, **__: pytest.fail("it was"))
    for reply, what in (
        (server.complete(prompt=asked), "prompt"),
        (server.chat(messages=[{"role": "user", "content": asked}]), "messages"),
    ):
        status, sentence, param = messages(reply)
        assert (status, param) == (400, what)
        assert "and this model's context of 1000 tokens holds 5000 at most; shorten it" in sentence
        assert reply.json()["error"]["code"] == "context_length_exceeded"


def test_large_answers_are_refused_by_their_size() -> None:
    with served(max_logprobs=1000, context=300) as server:
        scored = {"prompt": [[1] * 100] * 2, "echo": True, "max_tokens": 0}
        status, sentence, param = messages(server.complete(**scored, logprobs=5))  # 200 tokens, each with 5 more
        assert (status, param) == (400, "logprobs")
        assert sentence == "1200 log probabilities are more than the 1000 that this server allows"
        assert server.complete(**scored, logprobs=4).status_code == 200
        assert server.complete(**scored).status_code == 200
        assert messages(server.complete(logprobs=4, max_tokens=201))[0] == 400
        asked = {"logprobs": True, "top_logprobs": 9, "n": 2}
        assert messages(server.chat(**asked, max_tokens=51))[2] == "top_logprobs"
        assert server.chat(**asked, max_tokens=50).status_code == 200
        server.until_empty()


def _form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)[:1]}


@pytest.mark.parametrize(
    "schema",
    [
        pytest.param(_object(**{f"p{i}": {"type": "string"} for i in range(2000)}), id="many fields"),
        pytest.param(_object(a={"enum": [f"v{i:05}" for i in range(4000)]}), id="many values"),
        pytest.param(_object(a={"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"}), id="nested repeats"),
        pytest.param(_object(a={"type": "string", "pattern": "^.*a.{300}$"}), id="states without end"),
        pytest.param(_object(a={"type": "string", "pattern": "^(.{1,5000}x){1,50}$"}), id="long repeats"),
        pytest.param(_object(a={"type": "array", "minItems": 10**9}), id="a billion items"),
        pytest.param(
            {"anyOf": [_object(**{f"p{(i + j) % 60}": {"type": "integer"} for i in range(30)}) for j in range(60)]},
            id="many forms at once",
        ),
        pytest.param({"allOf": [{"anyOf": [_object(x={"const": k})] * 6} for k in range(12)]}, id="a product of forms"),
        pytest.param(
            {"$ref": "#/$defs/a0",
             "$defs": {f"a{i}": _object(**{str(k): {"$ref": f"#/$defs/a{i * k % 200}"} for k in (3, 7)})
                       for i in range(200)}},
            id="references in circles",
        ),
    ],
)  # fmt: skip
def test_a_form_takes_little_time_whatever_it_is(schema: dict[str, Any]) -> None:
    """To compile, and then for every token: everybody waits for that. Measured: 1 s and 0.14 s of the processor."""
    assert len(json.dumps(schema)) < 65_536
    began = time.process_time()
    with contextlib.suppress(UserError):  # which is well, too
        matcher = Grammars(byte_tokenizer(), VOCAB).json_schema(schema).matcher()
        assert time.process_time() - began < 10
        for byte in b'{"a": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa':
            began = time.process_time()
            allowed = matcher.mask()
            assert time.process_time() - began < 2
            if not allowed[byte]:
                break
            matcher.accept(byte)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_a_character_is_refused(server: Served, text: str) -> None:
    for path, fields in (
        (COMPLETIONS, {**ASKED, "prompt": text}),
        (COMPLETIONS, {**ASKED, "model": text}),
        (COMPLETIONS, {**ASKED, "logit_bias": {text: 1}}),
        (COMPLETIONS, {**ASKED, text: 1}),
        (CHAT, {**ASK, "messages": [{"role": "user", "content": text}]}),
        (CHAT, {**ASK, "tools": [{"type": "function", "function": {"name": "f", "description": text}}]}),
        (CHAT, {**ASK, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"title": text}}}]}),
        (CHAT, {**ASK, "response_format": _form({"type": "object", "properties": {text: {"const": text}}})}),
    ):
        reply = server.http.post(path, content=json.dumps(fields), headers={"Content-Type": "application/json"})
        assert messages(reply)[0] in (400, 404), fields


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_page_elsewhere_cannot_post_without_asking_first(server: Served, kind: str) -> None:
    """Browsers send these kinds to anybody; for JSON they ask, and are told nothing."""
    reply = server.http.post(CHAT, content=json.dumps(ASK), headers={"Content-Type": kind})
    assert messages(reply)[0] == 400
