"""Forms of answers: what a model may say next, on tokenizers of every kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourfold.errors import UserError
from fourfold.grammar import CALL_BEGIN, CALL_END, Form, Function, Grammars
from fourfold.tokenizer import Tokenizer
from scripted import EOS, VOCAB, byte_tokenizer

PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "ok": {"type": "boolean"}},
    "required": ["city", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizers(shared: Path) -> dict[str, Tokenizer]:
    from fourfold.locate import fourfold_directory

    found = {"bytes": byte_tokenizer(), "sentencepiece": Tokenizer.from_directory(shared / "stories15M")}
    return found | {"byte-level": Tokenizer.from_directory(fourfold_directory("smollm2", None))}


KINDS = ("bytes", "sentencepiece", "byte-level")


def spoken(form: Form, tokenizer: Tokenizer, seed: int, most: int = 400) -> str | None:
    """What somebody says who knows nothing but the mask; None where it does not end."""
    rng, matcher, ids = np.random.default_rng(seed), form.matcher(), list[int]()
    for _ in range(most):
        allowed = np.flatnonzero(matcher.mask())
        token = int(rng.choice(allowed))
        if token in tokenizer.eos_ids:
            return b"".join(tokenizer.vocabulary.tokens[i] for i in ids).decode()
        matcher.accept(token)
        ids.append(token)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_said_fits_the_schema(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    form = Grammars(tokenizer, tokenizer.vocab_size).json_schema(PLACE)
    for seed in range(5):
        value = json.loads(spoken(form, tokenizer, seed) or "")
        assert len(value["city"]) <= 8
        assert set(value) == {"city", "ok"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_forced_call_is_well_formed(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    form = grammars.tool_calls([Function("a", PLACE), Function("b", PLACE)], text=False, several=False)
    names = set()
    for seed in range(8):
        said = spoken(form, tokenizer, seed) or ""
        assert said.startswith(CALL_BEGIN)
        assert said.endswith(CALL_END)
        call = json.loads(said.removeprefix(CALL_BEGIN).removesuffix(CALL_END))
        assert set(call["arguments"]) == {"city", "ok"}
        names.add(call["name"])
    assert names == {"a", "b"}


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_free_until_a_call_begins(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    form = Grammars(tokenizer, tokenizer.vocab_size).tool_calls([Function("a", PLACE)], text=True, several=True)
    matcher = form.matcher()
    plain = {i for i in range(tokenizer.vocab_size) if i not in tokenizer.vocabulary.special}

    def say(text: str) -> None:
        for token in tokenizer.encode(text, add_special_tokens=False):
            assert matcher.mask()[token], f"{tokenizer.vocabulary.tokens[token]!r} is barred"
            matcher.accept(token)

    say("So < be it. ")
    assert matcher.mask()[list(plain & set(range(100, 200)))].any()
    assert matcher.mask()[tokenizer.eos_ids[0]]
    say("\n" + CALL_BEGIN)
    assert not matcher.mask()[tokenizer.eos_ids[0]]
    with pytest.raises(UserError, match="the answer cannot follow the form that was asked"):
        matcher.accept(tokenizer.encode("?", add_special_tokens=False)[-1])


def test_each_text_has_a_state_of_its_own() -> None:
    form = Grammars(byte_tokenizer(), VOCAB).json_object()
    one, other = form.matcher(), form.matcher()
    one.accept(ord("{"))
    assert not other.mask()[ord('"')]
    assert one.mask()[ord('"')]
    assert one.mask().shape == (VOCAB,)
    assert not one.mask()[VOCAB - 1]  # padding of the vocabulary
    one.accept(ord("}"))
    assert np.flatnonzero(one.mask()).tolist() == [EOS]


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "nothing"}, "Invalid type: nothing"),
        ({"$ref": "http://127.0.0.1:1/x"}, "Resource"),  # no address is opened
        ({"$ref": "file:///etc/passwd"}, "Resource"),
        ({"allOf": [{"type": "array", "uniqueItems": True}]}, "Unimplemented keys"),
        ({"type": "string", "pattern": "("}, "cannot be followed"),
        ({"enum": []}, "cannot be followed"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(schema: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        Grammars(byte_tokenizer(), VOCAB).json_schema(schema)


def test_a_refusal_of_parameters_shows_no_grammar_of_ours() -> None:
    unique = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(UserError) as refused:
        Grammars(byte_tokenizer(), VOCAB).tool_calls([Function("f", unique)], text=True, several=True)
    assert str(refused.value).endswith('failed to compile JSON schema: Unimplemented keys: ["uniqueItems"]')


def test_a_schema_made_to_be_slow_is_stopped() -> None:
    """In a process of its own, so that a bomb would be seen as a timeout."""
    script = """
from fourfold.errors import UserError
from fourfold.grammar import Grammars
from scripted import VOCAB, byte_tokenizer
grammars = Grammars(byte_tokenizer(), VOCAB)
for bomb in (
    {"type": "string", "pattern": "(((a{1,999}){1,999}){1,999}){1,999}"},
    {"type": "string", "pattern": "(a|aa|aaa)*b" * 40, "maxLength": 100000},
    {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 999}}, "$ref": "#/$defs/a"},
    {"type": "array", "minItems": 100000000, "items": {"type": "integer"}},
    {"enum": ["x" * 60 + str(i) for i in range(900)]},
    {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "integer"}}} for i in range(6)]} for j in range(6)]},
):
    try:
        matcher = grammars.json_schema(bomb).matcher()
        for _ in range(50):
            token = int(matcher.mask().argmax())
            if token == 256:
                break
            matcher.accept(token)
    except UserError as error:
        print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout
