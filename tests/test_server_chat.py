"""POST /v1/chat/completions: what OpenAI's clients send, and what they read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from serving import ASK, MODEL, Served, messages, served

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Pa\\"}ris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def paris() -> Iterator[Served]:
    with served() as server:
        yield server


def chunks(server: Served, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, which ends with [DONE]."""
    reply = server.chat(stream=True, **fields)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_an_answer_at_once(paris: Served) -> None:
    reply = paris.chat().json()
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "Paris.", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert reply["choices"] == [choice]
    usage = reply["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (19, 7, 26)
    assert (reply["object"], reply["model"]) == ("chat.completion", MODEL)
    assert reply["system_fingerprint"].startswith("fp_")


def test_a_stream_is_the_same_in_pieces(paris: Served) -> None:
    events = chunks(paris, stream_options={"include_usage": True})
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Paris."
    assert [event["choices"][0]["finish_reason"] for event in events[-3:-1]] == [None, "stop"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 7
    assert all(event["usage"] is None for event in events[:-1])
    assert len({event["id"] for event in events}) == 1


def test_several_answers(paris: Served) -> None:
    reply = paris.chat(n=3).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in reply["choices"]} == {"Paris."}
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (19, 21)
    streamed = chunks(paris, n=2)
    said = {i: "" for i in range(2)}
    for event in streamed:
        said[event["choices"][0]["index"]] += event["choices"][0]["delta"].get("content", "")
    assert said == {0: "Paris.", 1: "Paris."}


def test_a_seed_makes_answers_repeat_and_n_answers_differ(paris: Served) -> None:
    def said(**fields: Any) -> list[str]:
        reply = paris.chat(max_tokens=30, logit_bias={str(i): -100 for i in (*b"Paris.", 256)}, **fields).json()
        return [choice["message"]["content"] for choice in reply["choices"]]

    first = said(seed=5, n=2)
    assert first == said(seed=5, n=2)
    assert first[0] != first[1]
    assert first != said(seed=6, n=2)


def test_stop_and_length(paris: Served) -> None:
    for fields, text, reason in (
        ({"stop": "r"}, "Pa", "stop"),
        ({"stop": ["zz", "is"]}, "Par", "stop"),
        ({"max_tokens": 2}, "Pa", "length"),
        ({"max_completion_tokens": 3}, "Par", "length"),
    ):
        choice = paris.chat(**fields).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)


def test_log_probabilities(paris: Served) -> None:
    content = paris.chat(logprobs=True, top_logprobs=2, max_tokens=2).json()["choices"][0]["logprobs"]["content"]
    assert [(token["token"], token["bytes"]) for token in content] == [("P", [80]), ("a", [97])]
    assert [len(token["top_logprobs"]) for token in content] == [2, 2]
    assert content[0]["top_logprobs"][0]["token"] == "P"
    assert -0.1 < content[0]["logprob"] <= 0
    streamed = [event["choices"][0].get("logprobs") for event in chunks(paris, logprobs=True, max_tokens=2)]
    assert [token["token"] for part in streamed if part for token in part["content"]] == ["P", "a"]


def test_a_context_that_is_full_ends_the_answer() -> None:
    with served("x" * 200, context=100) as server:
        reply = server.chat().json()
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["usage"]["total_tokens"] == 101  # the last token takes no position
        status, sentence, _ = messages(server.chat(messages=[{"role": "user", "content": "x" * 200}]))
        assert (status, sentence) == (400, "messages has 217 tokens, and this model's context is 100; shorten it")


def test_contents_in_parts_and_the_developers_role(paris: Served) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    reply = paris.chat(messages=[{"role": "developer", "content": "s"}, {"role": "user", "content": parts}])
    assert reply.status_code == 200
    assert list(b"[system]s[user]ab[assistant]") in paris.engine.fed


def test_an_answer_can_be_sent_back(paris: Served) -> None:
    message = paris.chat().json()["choices"][0]["message"]
    for parsed in ({}, {"parsed": {"city": "Paris"}}):
        again = [*ASK["messages"], message | parsed, {"role": "user", "content": "and?"}]
        assert paris.chat(messages=again).status_code == 200


def test_a_null_asks_for_nothing_whatever_its_name(paris: Served) -> None:
    message = {"role": "assistant", "content": "Paris.", "reasoning_content": None}
    again = [*ASK["messages"], message, {"role": "user", "content": "and?"}]
    assert paris.chat(messages=again, reasoning_effort=None, functions=None).status_code == 200


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_of_all_tokens(paris: Served, top_k: int) -> None:
    some = [paris.chat(seed=1, temperature=2, **given).json()["choices"] for given in ({}, {"top_k": top_k})]
    assert some[0] == some[1]


def test_a_call_as_clients_send_it_back(paris: Served) -> None:
    """Put together from a stream, which numbers calls, and parsed; without arguments; with the function's name."""
    function = {"name": "time", "arguments": "", "parsed_arguments": {}}
    call = {"index": 0, "id": "c1", "type": "function", "function": function}
    turns = [{"role": "user", "content": "t?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns += [{"role": "tool", "tool_call_id": "c1", "name": "time", "content": "noon"}]
    assert paris.chat(messages=turns, tools=[TIME]).status_code == 200
    told = '[assistant]<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>[user]<tool_response>\nnoon'
    assert any(told.encode() in bytes(i for i in fed if i < 256) for fed in paris.engine.fed)


def test_json_by_a_schema() -> None:
    with served('{"city": "Paris"}<eos>') as server:
        schema = {"name": "place", "schema": CITY, "strict": True}
        reply = server.chat(response_format={"type": "json_schema", "json_schema": schema}).json()
        assert json.loads(reply["choices"][0]["message"]["content"]) == {"city": "Paris"}
    with served('No. {"a": 1}<eos>') as server:  # wants to talk, and may not
        reply = server.chat(response_format={"type": "json_object"}, max_tokens=400, seed=1).json()
        assert reply["choices"][0]["message"]["content"].startswith("{")
        bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        status, sentence, _ = messages(server.chat(response_format=bad))
        assert (status, sentence) == (400, "the JSON schema cannot be followed: Invalid type: nothing")


@pytest.mark.parametrize("choice", ["required", "auto", {"type": "function", "function": {"name": "weather"}}])
def test_a_call(choice: Any) -> None:
    with served(CALL + "<eos>") as server:
        answer = server.chat(tools=[WEATHER, TIME], tool_choice=choice).json()["choices"][0]
        assert answer["finish_reason"] == "tool_calls"
        assert answer["message"]["content"] is None
        (call,) = answer["message"]["tool_calls"]
        assert (call["type"], call["function"]["name"]) == ("function", "weather")
        assert json.loads(call["function"]["arguments"]) == {"city": 'Pa"}ris'}
        told = bytes(i for i in max(server.engine.fed, key=len) if i < 256).decode()
        assert '"name": "weather"' in told
        assert told.startswith("[system]You may call functions.")


@pytest.mark.parametrize("stop", ["city", "<tool", '": "', "}", "_call>", "</", "\n{"])
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_a_stop_string_cuts_no_call_in_half(choice: str, stop: str) -> None:
    with served(f"{CALL}\n{CALL}<eos>") as server:
        answer = server.chat(tools=[WEATHER], tool_choice=choice, stop=stop).json()["choices"][0]
        calls = [json.loads(call["function"]["arguments"]) for call in answer["message"]["tool_calls"]]
        assert calls == [{"city": 'Pa"}ris'}] * 2
        assert answer["finish_reason"] == "tool_calls"


def test_a_stop_string_ends_what_is_said_beside_calls() -> None:
    with served(f"Let me see.\n{CALL}\nThere it is.<eos>") as server:
        before = server.chat(tools=[WEATHER], stop="see").json()["choices"][0]
        assert (before["message"]["content"], before["finish_reason"]) == ("Let me ", "stop")
        assert "tool_calls" not in before["message"]
        behind = server.chat(tools=[WEATHER], stop=["city", "it"]).json()["choices"][0]
        assert behind["message"]["content"] == "Let me see.\nThere"
        assert len(behind["message"]["tool_calls"]) == 1


def test_a_stop_string_cuts_no_json_in_half() -> None:
    with served('{"city": "Paris"}<eos>') as server:
        schema = {"name": "place", "schema": CITY, "strict": True}
        form = {"type": "json_schema", "json_schema": schema}
        answer = server.chat(response_format=form, stop=["city", ":"]).json()["choices"][0]
        assert json.loads(answer["message"]["content"]) == {"city": "Paris"}
        assert server.chat(response_format={"type": "text"}, stop=":").json()["choices"][0]["message"]["content"] == (
            '{"city"'
        )


def test_a_call_in_a_stream_behind_words() -> None:
    with served(f"Let me see.\n{CALL}\n{CALL}<eos>") as server:
        events = chunks(server, tools=[WEATHER])
        deltas = [event["choices"][0]["delta"] for event in events]
        assert "".join(delta.get("content") or "" for delta in deltas) == "Let me see."
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert [call["function"]["name"] for call in calls if "id" in call] == ["weather", "weather"]
        for index in range(2):
            arguments = "".join(call["function"]["arguments"] for call in calls if call["index"] == index)
            assert json.loads(arguments) == {"city": 'Pa"}ris'}
        assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
        only = server.chat(tools=[WEATHER], parallel_tool_calls=False).json()["choices"][0]["message"]
        assert len(only["tool_calls"]) == 1


def test_without_a_choice_to_call_there_is_text() -> None:
    with served("Plain.<eos>") as server:
        assert server.chat(tools=[WEATHER]).json()["choices"][0]["message"]["content"] == "Plain."
        reply = server.chat(tools=[WEATHER], tool_choice="none").json()
        assert reply["usage"]["prompt_tokens"] == 19  # the model is not told of them
        forced = server.chat(tools=[TIME], tool_choice="required", max_tokens=200).json()["choices"][0]["message"]
        assert forced["tool_calls"][0]["function"]["name"] == "time"
        assert json.loads(forced["tool_calls"][0]["function"]["arguments"]) == {}


def test_calls_and_results_are_told_to_a_template_that_knows_no_tools(paris: Served) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    conversation = [
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    assert paris.chat(messages=conversation).status_code == 200
    expected = (
        '[user]w?[assistant]<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
        "[user]<tool_response>\nsun\n</tool_response>[assistant]"
    )
    assert list(expected.encode()) in paris.engine.fed


def test_a_template_that_speaks_of_calls_does_so_itself() -> None:
    template = (
        "{% for t in tools %}{{ t.function.name }}{% endfor %}<tool_call>"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
    )
    with served(template=template) as server:
        call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
        turns = [{"role": "user", "content": "w"}, {"role": "assistant", "tool_calls": [call]}]
        turns += [{"role": "tool", "tool_call_id": "c1", "content": "sun"}]
        assert server.chat(messages=turns, tools=[WEATHER]).status_code == 200
        assert list(b"weather<tool_call>[user]w[assistant]Paris[tool]sun") in server.engine.fed


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"foo": 1}, "foo", "foo is not a field that this server honours; leave it out"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name", "not a field"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]", "robot"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].image_url",
            "not a field",
        ),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 17}, "n", "17 answers are more than the 16"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, None, "differ"),
        ({"top_logprobs": 2}, None, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"stop": ["a"] * 17}, "stop", "17 stop strings"),
        ({"stop": ""}, "stop", "at least one character"),
        ({"stop": "x" * 300}, "stop", "300 characters"),
        ({"logit_bias": {"999": 1}}, "logit_bias", "from 0 to 259"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "100"),
        ({"stream_options": {"include_usage": True}}, None, "stream_options is for a stream"),
        ({"store": True}, "store", "False"),
        ({"functions": []}, "functions", "not a field"),
        ({"tools": [TIME, TIME]}, None, "the same name"),
        ({"tool_choice": "required"}, None, "there are no tools"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "q"}}}, None, "names q"),
        ({"tools": [TIME], "response_format": {"type": "json_object"}}, None, "cannot both form"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "belongs to type json_schema"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
            "match pattern",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
            None,
            "schema of type object",
        ),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content", "needs a content, or tool_calls"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "not valid Unicode"),
    ],
)  # fmt: skip
def test_what_is_refused_says_so(paris: Served, fields: dict[str, Any], param: str | None, says: str) -> None:
    reply = paris.http.post(
        "/v1/chat/completions", content=json.dumps({**ASK, **fields}), headers={"Content-Type": "application/json"}
    )
    status, sentence, named = messages(reply)
    assert (status, named) == (400, param)
    assert says in sentence


def test_a_token_that_stands_for_an_image_is_refused() -> None:
    with served() as server:
        server.engine.config = dataclasses.replace(server.engine.config, image_ids=(ord("#"),))
        for reply in (server.chat(messages=[{"role": "user", "content": "see #"}]), server.complete(prompt="#")):
            status, sentence, _ = messages(reply)
            assert (status, sentence.split(",")[0]) == (400, "the prompt has the token 35")
        assert server.chat().status_code == 200


def test_a_model_without_a_template_cannot_chat() -> None:
    with served(template=None) as server:
        status, sentence, _ = messages(server.chat())
        assert (status, sentence.split(";")[0]) == (400, "this model has no chat template")


def test_another_model_is_not_here(paris: Served) -> None:
    status, sentence, param = messages(paris.chat(model="gpt-4"))
    assert (status, sentence, param) == (404, "there is no model 'gpt-4' here; this server has 'scripted'", "model")
