"""POST /v1/completions: prompts of every form, echo, and the two requests by which models are scored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from fourfold.request import TokenLogprob
from fourfold.server.logprobs import CompletionScores
from fourfold.vocabulary import Vocabulary
from serving import Served, messages, served


@pytest.fixture(scope="module")
def paris() -> Iterator[Served]:
    with served() as server:
        yield server


def test_openais_defaults() -> None:
    with served("x" * 50) as server:
        reply = server.complete().json()
        assert reply["object"] == "text_completion"
        assert reply["choices"] == [{"index": 0, "text": "x" * 16, "logprobs": None, "finish_reason": "length"}]
        assert reply["usage"]["prompt_tokens"] == 4  # with the token that begins a text


@pytest.mark.parametrize(
    ("prompt", "n", "usage"),
    [("ab", 1, (3, 7)), (["a", "bc"], 1, (5, 14)), ([97, 98], 1, (2, 7)), ([[97], [98, 99]], 2, (3, 28))],
)
def test_prompts_of_every_form(paris: Served, prompt: Any, n: int, usage: tuple[int, int]) -> None:
    reply = paris.complete(prompt=prompt, n=n).json()
    count = n * (len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1)
    assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == [(i, "Paris.") for i in range(count)]
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == usage


def test_echo(paris: Served) -> None:
    assert paris.complete(prompt="Where? ", echo=True).json()["choices"][0]["text"] == "Where? Paris."
    assert paris.complete(prompt=[*b"ids "], echo=True).json()["choices"][0]["text"] == "ids Paris."
    parts = [
        json.loads(line[6:])["choices"][0]["text"]
        for line in paris.complete(echo=True, stream=True).text.split("\n\n")
        if line.startswith("data: {")
    ]
    assert parts[0].startswith("abc")
    assert "".join(parts) == "abcParis."


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scoring_a_prompt_of_ids(paris: Served, max_tokens: int) -> None:
    """What lm-evaluation-harness asks: a context and its continuation as ids, echoed with their log probabilities."""
    request = {"prompt": [[*b"abcd"], [*b"xy"]], "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    reply = paris.complete(temperature=0, seed=1234, **request).json()
    for choice, text in zip(reply["choices"], ("abcd", "xy"), strict=True):
        scores = choice["logprobs"]
        assert scores["tokens"] == [*text, "P"][: len(text) + max_tokens]
        assert scores["token_logprobs"][0] is None
        assert all(value <= 0 for value in scores["token_logprobs"][1:])
        assert scores["top_logprobs"][0] is None
        for token, top in zip(scores["tokens"][1:], scores["top_logprobs"][1:], strict=True):
            assert token in top
            assert len(top) <= 2  # the likeliest, and the token itself
        assert scores["text_offset"] == [*range(len(text) + max_tokens)]
        assert choice["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 2 * max_tokens


def test_logprobs_without_alternatives(paris: Served) -> None:
    scores = paris.complete(logprobs=0, max_tokens=2).json()["choices"][0]["logprobs"]
    assert (scores["tokens"], scores["top_logprobs"]) == (["P", "a"], None)


def test_tokens_that_are_half_a_character_are_told_apart() -> None:
    with served("é<eos>") as server:
        choice = server.complete(logprobs=1).json()["choices"][0]
        assert choice["text"] == "é"
        assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "<eos>"]


def test_a_stream_ends_with_the_usage(paris: Served) -> None:
    text = paris.complete(stream=True, stream_options={"include_usage": True}, prompt=["a", "b"], logprobs=1).text
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    said = {0: "", 1: ""}
    for event in events[:-1]:
        (choice,) = event["choices"]
        said[choice["index"]] += choice["text"]
        assert "".join(choice["logprobs"]["tokens"]).startswith(choice["text"])
    assert said == {0: "Paris.", 1: "Paris."}
    assert (events[-1]["choices"], events[-1]["usage"]["completion_tokens"]) == ([], 14)
    assert text.endswith("data: [DONE]\n\n")


def test_a_beginning_that_was_there_before_is_counted(paris: Served) -> None:
    prompt = "y" * 200
    assert paris.complete(prompt=prompt).json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    again = paris.complete(prompt=prompt).json()["usage"]["prompt_tokens_details"]
    assert again["cached_tokens"] >= 128


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": []}, "prompt", "an empty list"),
        ({"prompt": [[]]}, "prompt", "prompt is empty"),
        ({"prompt": [""] * 129}, "prompt", "129 prompts are more than the 128"),
        ({"prompt": ["x"] * 20, "n": 10}, "prompt", "200 texts"),
        ({"prompt": [1, "x"]}, "prompt", "must be a text, a list of texts"),
        ({"prompt": [-1]}, "prompt", "from 0 to 258"),
        ({"prompt": [259]}, "prompt", "from 0 to 258"),
        ({"prompt": "x" * 1001}, "prompt", "1002 tokens"),
        ({"prompt": {"a": 1}}, "prompt", ""),
        ({"suffix": "x"}, "suffix", "not a field"),
        ({"best_of": 2}, "best_of", "1"),
        ({"max_tokens": 0}, None, "max_tokens 0 is for echo"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"logprobs": True}, "logprobs", "integer"),
    ],
)
def test_what_is_refused_says_so(paris: Served, fields: dict[str, Any], param: str | None, says: str) -> None:
    status, sentence, named = messages(paris.complete(**fields))
    assert (status, named) == (400, param)
    assert says in sentence


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not valid JSON"),
        (b"", "the body is missing"),
        (b"[]", "the body"),
        (b'"x"', "the body"),
        (b'{"model": "scripted", "prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"model": "scripted", "prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"model": "scripted", "prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}", ""),
        (b"[" * 100_000, ""),
        (b"\xff\xfe", ""),
    ],
)
def test_what_is_no_json_is_refused(paris: Served, content: bytes, says: str) -> None:
    reply = paris.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    status, sentence, _ = messages(reply)
    assert status == 400
    assert says in sentence


@pytest.mark.parametrize("prompt", ["", "é🙂 ", "<sep>, 世<eos>界"])
def test_offsets_are_where_tokens_stand_in_the_text(prompt: str) -> None:
    with served("né 🙂! <sep>世界.<eos>") as server:
        asked = {"prompt": prompt or "abc", "echo": bool(prompt)}
        choice = server.complete(logprobs=1, max_tokens=30, **asked).json()["choices"][0]
        text, scores = choice["text"], choice["logprobs"]
        assert (text, choice["finish_reason"]) == (prompt + "né 🙂! 世界.", "stop")
        stands = [*zip(scores["tokens"], scores["text_offset"], strict=True)]
        whole = {token: at for token, at in stands if not token.startswith(("bytes:", "<eos>", "<bos>", "<sep>"))}
        assert set(whole) >= {"n", "!", "."}
        assert all(text[at] == token for token, at in whole.items())
        assert [at for token, at in stands if token.startswith("bytes:")] == [
            i for i, character in enumerate(text) for _ in character.encode() if ord(character) > 127
        ]
        if prompt.startswith("<sep>"):
            assert [at for token, at in stands if token in ("<bos>", "<sep>")][:2] == [0, 0]
            assert stands[2] == (",", 5)


def test_the_space_in_front_of_a_sentencepiece_text_has_no_place() -> None:
    vocabulary = Vocabulary((b"<s>", b" Hello", b" world", b"!"), frozenset({0}))
    found = [TokenLogprob(i, -1.0) for i in (0, 1, 2, 3)]
    assert CompletionScores(vocabulary, "Hello world!").of(found, with_top=False).text_offset == [0, 0, 5, 11]
    assert CompletionScores(vocabulary).of(found[1:], with_top=False).text_offset == [0, 6, 12]
