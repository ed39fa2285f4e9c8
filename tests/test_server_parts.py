"""What the server is made of, part by part: calls read as they come, keys, options, log lines, tokens' bytes."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.chat_template import ChatTemplate
from fourfold.errors import UserError
from fourfold.request import Update
from fourfold.server.auth import Keys
from fourfold.server.chat_answer import Answer
from fourfold.server.limits import Limits
from fourfold.server.log import JsonLines, PlainLines, request_id
from fourfold.server.options import ServeOptions, load_options
from fourfold.server.service import Service
from fourfold.server.tools import ArgumentsGoOn, CallBegins, CallReader, Tools
from fourfold.tokenizer import Tokenizer
from fourfold.vocabulary import Vocabulary

HELLO = [{"role": "user", "content": "hello"}]


def pieces(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


def read(parts: list[str], several: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls of an answer that comes in these parts."""
    reader, text, calls = CallReader(several), "", list[tuple[str, str]]()
    for i, part in enumerate(parts):
        for event in reader.push(part, last=i == len(parts) - 1):
            if isinstance(event, CallBegins):
                assert event.index == len(calls)
                calls.append((event.name, ""))
            elif isinstance(event, ArgumentsGoOn):
                calls[event.index] = (calls[event.index][0], calls[event.index][1] + event.text)
            else:
                assert event, "a piece of nothing"
                text += event
    return text, calls


def written(name: str, arguments: object) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.text('ab <\n/toolcal_>{"', max_size=20),
    st.lists(st.tuples(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.dictionaries(st.text(), values, max_size=3))),
    st.lists(st.integers(0, 10_000), max_size=12),
)
def test_calls_are_read_alike_however_they_are_cut(
    words: str, calls: list[tuple[str, dict[str, object]]], cuts: list[int]
) -> None:
    if "<tool_call>" in words:
        return
    answer = words + "\n".join(written(*call) for call in calls)
    text, found = read(pieces(answer, cuts))
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    assert text == (words.rstrip() if calls else words)


def test_an_unfinished_call_is_told_as_far_as_it_goes() -> None:
    assert read(['Hm <tool_call>\n{"name": "f", "argum']) == ("Hm", [])
    assert read(['<tool_call>\n{"name": "f", "arguments": {"a": [1, "}']) == ("", [("f", '{"a": [1, "}')])
    assert read(["a <tool", "_ca"]) == ("a <tool_ca", [])


@pytest.mark.parametrize(
    ("said", "finish", "reason"),
    [
        (written("f", {"a": 1}), "stop", "tool_calls"),
        (written("f", {"a": 1})[:-3], "stop", "tool_calls"),
        ('<tool_call>\n{"name": "f", "arguments": {"a": "x', "stop", "stop"),  # ended by itself
        (written("f", {}) + '\n<tool_call>\n{"name": "g", "argum', "stop", "stop"),
        ('<tool_call>\n{"name": "f", "arguments": {"a": "x', "length", "length"),
    ],
)
def test_an_answer_ends_in_calls_only_where_they_are_whole(said: str, finish: Any, reason: str) -> None:
    answer = Answer(0, Tools([], "auto", several=True), False, Vocabulary((), frozenset()))
    generation: Any = None
    answer.push(Update(generation, text=said, finish=finish))
    assert answer.finish_reason == reason


def test_one_call_alone() -> None:
    text, calls = read([written("f", {}) + "\n" + written("g", {})], several=False)
    assert [name for name, _ in calls] == ["f"]
    assert "g" in text


def test_keys() -> None:
    keys = Keys(["a" * 16])
    assert keys
    assert not Keys([])
    assert keys.accept("Bearer " + "a" * 16)
    assert keys.accept("bearer   " + "a" * 16)
    for wrong in ("", "Bearer", "Bearer ", "a" * 16, "Bearer " + "a" * 17, "Basic " + "a" * 16, "Bearer \udcff"):
        assert not keys.accept(wrong)
    assert "a" * 16 not in repr(vars(keys))  # hashes alone are kept
    for bad in ("short", "with space " * 3, "é" * 20, "x" * 20 + "\n"):
        with pytest.raises(UserError, match="at least 16 printable ASCII characters"):
            Keys([bad])


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# who\n{'k' * 20}\n\n")
    monkeypatch.setenv("FOURFOLD_API_KEY", "e" * 20)
    keys = Keys.load(file)
    assert keys.accept("Bearer " + "k" * 20)
    assert keys.accept("Bearer " + "e" * 20)
    monkeypatch.delenv("FOURFOLD_API_KEY")
    assert not Keys.load(None)
    with pytest.raises(OSError, match="No such file"):
        Keys.load(tmp_path / "nothing")
    file.write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(UserError, match="keys is not text; write one key a line"):
        Keys.load(file)


def test_every_flag_is_an_option_and_the_other_way_round() -> None:
    from inspect import signature

    from fourfold.cli_serve import serve

    flags = set(signature(serve).parameters)
    assert flags - {"config"} == set(ServeOptions.model_fields)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('model = "m"\nport = 81\nmax-running = 5\ncors_origin = ["https://a"]\nspeculate = false\n')
    options = load_options({"port": 82, "host": None}, file)
    assert (options.model, options.host, options.port) == ("m", "127.0.0.1", 82)
    assert (options.max_running, options.step_limits.max_running, options.speculate) == (5, 5, False)
    assert options.limits.max_n == 16
    assert options.is_local
    assert not load_options({"model": "m", "host": "0.0.0.0"}, None).is_local


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("prot = 1", "has a key 'prot', which is no option"),
        ("port = 1.5", "port cannot be 1.5"),
        ("port = 99999", "port cannot be 99999"),
        ("port = ", "is not valid TOML"),
        ("log_level = 'loud'", "log_level cannot be 'loud'"),
        ("root_path = 'x/'", "root_path cannot be 'x/'"),
        ("max_n = 0", "max_n cannot be 0"),
        ("[limits]\nmax_n = 1", "has a key 'limits'"),
        ("cors_origin = ['https://a', 7]", r"cors_origin cannot be \['https://a', 7\]: .*it is 7"),
        ("max-n = 3\nmax_n = 4", "sets max_n twice"),
    ],
)
def test_a_file_with_a_mistake(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(line)
    with pytest.raises(UserError, match=says):
        load_options({"model": "m"}, file)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2", "smollm2"),
        ("m.gguf", "m.gguf"),
        (".", "here"),
        ("../here/", "here"),
        ("./..", "above"),
        ("/", "model"),
    ],
)
def test_the_name_of_a_model_is_that_of_its_place(
    model: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    assert load_options({"model": model}, None).served_name == name
    assert load_options({"model": model, "name": "mine"}, None).served_name == "mine"
    with pytest.raises(UserError, match="name cannot be ''"):
        load_options({"model": model, "name": ""}, None)


def test_a_model_must_be_named() -> None:
    with pytest.raises(UserError, match="there is no model to serve; name one"):
        load_options({}, None)


def test_log_lines() -> None:
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "GET %s", ("/a\nb\x1b[2J\ud800",), None)
    record.fields = {"status": 500}
    token = request_id.set("req-1")
    try:
        entry = json.loads(JsonLines().format(record))
        plain = PlainLines().format(record)
    finally:
        request_id.reset(token)
    assert (entry["level"], entry["message"], entry["status"]) == ("warning", "GET /a\nb\x1b[2J\ud800", 500)
    assert entry["request_id"] == "req-1"
    assert plain.endswith("warning: GET /a\\nb\\x1b[2J\\ud800 status=500 [req-1]")


def test_templates_are_told_of_tools_and_calls() -> None:
    source = "{% for t in tools or [] %}{{ t.function | tojson }}{% endfor %}{% for m in messages %}{{ m.role }}"
    source += "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    template = ChatTemplate(source + "{{ m.tool_call_id }}{{ m.content }}{% endfor %}")
    call = {"function": {"name": "f", "arguments": {"é": 1}}}
    turns: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "x", "tool_call_id": "c1"},
    ]
    assert template.render(turns, tools=[{"function": {"name": "f"}}]) == '{"name": "f"}assistantf{"é": 1}toolc1x'
    assert template.names("tools")
    assert not ChatTemplate("{{ messages }}").names("tools")
    assert not ChatTemplate("{% set tools = 1 %}{{ tools }}").names("tools")


def test_tools_do_not_loosen_the_sandbox() -> None:
    deep = [{"function": {"name": "x" * 1000}}] * 1000
    for source in (
        "{{ tools[0].__class__.__mro__ }}",
        "{{ tools.append(1) }}",
        "{% for a in tools %}{% for b in tools %}{% endfor %}{% endfor %}",
        "{% set t = tools | tojson %}{{ t * 100 }}",
    ):
        with pytest.raises(UserError, match="not safe to run"):
            ChatTemplate(source).render(HELLO, tools=deep)


@pytest.mark.parametrize("text", ["Hello, 世界! é\n\t{x: 1}", "  two  spaces ", "🙂"])
def test_the_bytes_of_ids_are_those_of_their_text(text: str, shared: Path, yuan_tokenizer: Path) -> None:
    from fourfold.locate import fourfold_directory

    for path in (shared / "stories15M", fourfold_directory("smollm2", None), yuan_tokenizer):
        tokenizer = Tokenizer.from_directory(path)
        vocabulary = tokenizer.vocabulary
        assert len(vocabulary.tokens) == tokenizer.vocab_size
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(vocabulary.tokens[i] for i in ids).decode()
        assert joined.lstrip(" ") == tokenizer.decode(ids).lstrip(" ")
        assert set(tokenizer.eos_ids) <= vocabulary.special
        assert all(
            vocabulary.tokens[i].decode() == tokenizer.decode([i], skip_special=False) for i in tokenizer.eos_ids
        )


FACTS = {
    "identity": "0" * 64,
    "kv": "bf16",
    "rope_angles": "f32",
    "isa": "avx2",
    "ranks": 1,
    "kernels_decode": {"a": "b"},
}


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "1" * 64},
        {"kv": "int8"},
        {"rope_angles": "bf16"},
        {"isa": "avx512"},
        {"ranks": 2},
        {"kernels_decode": {"a": "c"}},
        {"context": 99},
        {"template": ChatTemplate("{{ messages }}")},
        {"prefix_cache": "off"},
    ],
)
def test_the_fingerprint_changes_with_whatever_changes_answers(change: dict[str, Any]) -> None:
    def fingerprint(name: str, changed: dict[str, Any]) -> str:
        facts = FACTS | {key: changed[key] for key in changed.keys() & FACTS.keys()}
        engine: Any = SimpleNamespace(context=changed.get("context", 100), describe=lambda: facts)
        rest = {key: changed[key] for key in changed.keys() & {"prefix_cache"}}
        nothing: Any = None
        template = changed.get("template")
        service = Service(name, engine, nothing, template, Limits(), nothing, nothing, **rest)
        service.texts.shutdown()
        return service.fingerprint

    assert fingerprint("model", change) != fingerprint("model", {}) == fingerprint("another name of it", {})
