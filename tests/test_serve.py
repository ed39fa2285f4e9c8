"""`fourfold serve` as its users meet it: a process of its own, OpenAI's client, signals, flags and files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import tiny

ASK: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
SERVE = [sys.executable, "-c", "import sys; from fourfold.cli import main; main(['serve', *sys.argv[1:]])"]
KEY = "a-key-of-twenty-chars"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}


@dataclass
class Process:
    popen: subprocess.Popen[str]
    address: str
    client: openai.OpenAI
    log: list[dict[str, Any]]

    def end(self, number: int = signal.SIGTERM) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(100)


@contextmanager
def serving(*flags: str, model: str = "smollm2", key: str = "", command: Sequence[str] = SERVE) -> Iterator[Process]:
    """A server on a free port, until it is ready."""
    environment = {**os.environ, "FOURFOLD_API_KEY": key}
    words = [*command, model, "--port=0", "--no-measure", "--log-format=json", *flags]
    popen = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    assert popen.stderr is not None
    log: list[dict[str, Any]] = []
    try:
        for line in popen.stderr:
            log.append(json.loads(line) if line.startswith("{") else {"text": line})
            if log[-1].get("message") == "ready":
                break
        loaded = [entry for entry in log if "address" in entry]
        assert loaded, f"it did not start: {log}"
        address = loaded[0]["address"].rstrip("/")
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=key or "none", max_retries=0)
        yield Process(popen, address, client, log)
    finally:
        popen.kill()
        popen.wait()
        popen.stderr.close()


@pytest.fixture(scope="module")
def smollm() -> Iterator[openai.OpenAI]:
    with serving("--max-running=8", "--context=2048") as process, process.client as client:
        yield client


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model for tests that hardly ask it anything."""
    config = tiny.CONFIG | {"vocab_size": 264, "max_position_embeddings": 512}
    file = tmp_path_factory.mktemp("small") / "model.gguf"
    return str(tiny.write_gguf(file, config, tiny.tensors(config)))


def test_models(smollm: openai.OpenAI) -> None:
    assert [model.id for model in smollm.models.list()] == ["smollm2"]
    assert smollm.models.retrieve("smollm2").owned_by == "fourfold"


def test_a_chat_whole_and_streamed(smollm: openai.OpenAI) -> None:
    whole = smollm.chat.completions.create(model="smollm2", messages=ASK, temperature=0, max_tokens=30)
    text = whole.choices[0].message.content
    assert text is not None
    assert "Paris" in text
    assert whole.usage is not None
    stream = smollm.chat.completions.create(
        model="smollm2", messages=ASK, temperature=0, max_tokens=30, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_client_that_leaves_a_stream(smollm: openai.OpenAI) -> None:
    stream = smollm.chat.completions.create(model="smollm2", messages=ASK, stream=True, max_tokens=1500, seed=1)
    next(iter(stream))
    stream.close()
    root = str(smollm.base_url).removesuffix("v1/")
    end = time.monotonic() + 100
    while (stats := httpx.get(f"{root}stats").json())["running"]:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert stats["pages"]["held"] == 0


def test_completions_with_echo_and_logprobs(smollm: openai.OpenAI) -> None:
    prompts = ["The capital of France is", "Once upon a time"]
    reply = smollm.completions.create(
        model="smollm2", prompt=prompts, temperature=0, max_tokens=4, echo=True, logprobs=2, n=2
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    for choice, prompt in zip(reply.choices, [prompts[0]] * 2 + [prompts[1]] * 2, strict=True):
        assert choice.text.startswith(prompt)
        scores = choice.logprobs
        assert scores is not None
        assert scores.tokens is not None
        assert scores.text_offset is not None
        assert "".join(scores.tokens) == choice.text
        assert all(choice.text[at:].startswith(t) for at, t in zip(scores.text_offset, scores.tokens, strict=True))
    assert reply.choices[0].text == reply.choices[1].text
    scored = smollm.completions.create(
        model="smollm2", prompt=[[504, 3575, 282, 4649]], temperature=0, max_tokens=1, echo=True, logprobs=1
    )
    first = reply.choices[0].logprobs
    again = scored.choices[0].logprobs
    assert first is not None
    assert again is not None
    assert again.token_logprobs is not None
    assert first.token_logprobs is not None
    assert again.token_logprobs[1:4] == pytest.approx(first.token_logprobs[1:4], abs=1e-3)


def test_a_seed(smollm: openai.OpenAI) -> None:
    def said(seed: int) -> list[str | None]:
        reply = smollm.chat.completions.create(
            model="smollm2", messages=ASK, seed=seed, n=2, max_tokens=24, temperature=1.5
        )
        return [choice.message.content for choice in reply.choices]

    assert said(1) == said(1)
    assert said(1) != said(2)
    assert len(set(said(1))) == 2


def test_stop(smollm: openai.OpenAI) -> None:
    reply = smollm.chat.completions.create(model="smollm2", messages=ASK, temperature=0, stop=["Paris"], max_tokens=30)
    assert reply.choices[0].message.content == "The capital of France is "
    assert reply.choices[0].finish_reason == "stop"


def test_logprobs_of_a_chat(smollm: openai.OpenAI) -> None:
    reply = smollm.chat.completions.create(
        model="smollm2", messages=ASK, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(token.token for token in logprobs.content) == reply.choices[0].message.content
    assert all(token.logprob == token.top_logprobs[0].logprob for token in logprobs.content)


def test_a_json_schema(smollm: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": CITY}}
    for stream in (False, True):
        reply: Any = smollm.chat.completions.create(
            model="smollm2", messages=ASK, response_format=form, seed=4, stream=stream, max_tokens=60
        )
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
        else:
            text = reply.choices[0].message.content
        assert set(json.loads(text)) == {"city"}


def test_tool_calls(smollm: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "smollm2", "messages": ASK, "tools": [WEATHER], "temperature": 0}
    ask |= {"max_tokens": 100, "tool_choice": "required", "parallel_tool_calls": False}
    message = smollm.chat.completions.create(**ask).choices[0].message
    assert message.tool_calls is not None
    call: Any = message.tool_calls[0]
    assert call.function.name == "get_weather"
    chunks = list(smollm.chat.completions.create(**ask, stream=True))
    parts: list[Any] = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert "".join(part.function.arguments for part in parts) == call.function.arguments
    assert set(json.loads(call.function.arguments)) == {"city"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    reply = smollm.chat.completions.create(model="smollm2", messages=[*ASK, message, result], max_tokens=8)
    assert reply.choices[0].message.content is not None


def test_errors_are_openais(smollm: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="foo is not a field that this server honours") as caught:
        smollm.chat.completions.create(model="smollm2", messages=ASK, extra_body={"foo": 1})
    assert (caught.value.param, caught.value.type) == ("foo", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here"):
        smollm.chat.completions.create(model="gpt-4", messages=ASK)


def test_a_key_a_name_and_a_file_of_options(small: str, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text('name = "file"\nmax-n = 1\ncontext = 256\nlog_level = "warning"\n')
    with serving(f"--config={config}", "--name=flag", "--log-level=info", model=small, key=KEY) as process:
        assert [model.id for model in process.client.models.list()] == ["flag"]
        with pytest.raises(openai.AuthenticationError):
            process.client.with_options(api_key="wrong").models.list()
        with pytest.raises(openai.BadRequestError, match="2 answers are more than the 1"):
            process.client.chat.completions.create(model="flag", messages=ASK, n=2)
        loaded = next(entry for entry in process.log if "model" in entry)
        assert loaded["model"]["context"] == 256
        assert re.fullmatch(r"\d+ at a time; up to 32 shorter ones", loaded["model"]["texts of full context"])
        assert loaded["machine"]["isa"]
        assert process.end() == 0


def test_a_signal_ends_in_order_and_a_second_one_at_once() -> None:
    with serving("--context=2048") as process:
        stream = process.client.chat.completions.create(model="smollm2", messages=ASK, max_tokens=1900, stream=True)
        next(iter(stream))
        process.popen.send_signal(signal.SIGTERM)
        end = time.monotonic() + 100
        while httpx.get(f"{process.address}/ready").json()["status"] != "draining":
            assert time.monotonic() < end
        assert process.popen.poll() is None
        assert process.end() == 1  # in order it would be 0
        stream.close()


def fails(*arguments: str, **environment: str) -> str:
    """What `fourfold serve` says where it ends with status 2."""
    ran = subprocess.run(
        [*SERVE, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **environment},
        check=False,
    )
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.count("\n") == 1
    return ran.stderr.removeprefix("fourfold: ").rstrip()


def test_options_that_cannot_be(tmp_path: Path) -> None:
    """The rest of them, faster, in test_server_parts."""
    config = tmp_path / "serve.toml"
    config.write_text('hots = "0.0.0.0"\n')
    assert fails(f"--config={config}") == (
        f"{config} has a key 'hots', which is no option of `fourfold serve`; its --help lists them"
    )
    assert "an API key must have at least 16 printable ASCII characters" in fails("smollm2", FOURFOLD_API_KEY="short")
    assert "host.invalid port 8000 cannot be listened at" in fails("smollm2", "--host=host.invalid")


BREAKING = """
import os, sys
from fourfold.errors import RuntimeFailure
from fourfold.steploop import StepLoop
step = StepLoop.step
def breaking(self):
    if os.path.exists(sys.argv[1]):
        raise RuntimeFailure("rank 1 did not arrive")
    return step(self)
StepLoop.step = breaking
from fourfold.cli import main
main(["serve", *sys.argv[2:]])
"""


def test_a_model_that_fails_ends_its_requests_and_the_process(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    with serving("--context=1024", command=(sys.executable, "-c", BREAKING, str(broken))) as process:
        stream = process.client.chat.completions.create(model="smollm2", messages=ASK, max_tokens=900, stream=True)
        next(iter(stream))
        broken.touch()
        with pytest.raises(openai.APIError, match="the model has stopped: rank 1 did not arrive"):
            list(stream)
        assert process.popen.wait(100) == 1
        assert process.popen.stderr is not None
        assert process.popen.stderr.read().endswith("fourfold: the model has stopped: rank 1 did not arrive\n")


def test_without_its_libraries_it_says_what_to_install() -> None:
    script = "import sys; sys.modules['fastapi'] = None; from fourfold.cli import main; main(['serve', 'smollm2'])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "install what it needs with `pip install 'fourfold[serve]'`" in ran.stderr


def test_beyond_this_machine_without_a_key_it_warns(small: str) -> None:
    with serving("--host=0.0.0.0", "--context=128", model=small) as process:
        said = " ".join(" ".join(entry.get("text", "").split()) for entry in process.log)
        assert "EVERYBODY who can reach 0.0.0.0 can use this server" in said
        assert process.end(signal.SIGINT) == 0
