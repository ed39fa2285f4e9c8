"""Last words: guessed by `fourfold eval`, through a server by the harness's requests, and by the harness itself."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import harness
import httpx
import numpy as np
import pytest

from fourfold.errors import UserError
from fourfold.lambada import cut, last_words, read_texts
from fourfold.llm import LLM
from scripted import BOS, N_IDS, VOCAB, byte_tokenizer, fixed_llm, scripted_llm

TEXT = "He gave her the ring"
N_PASSAGES = 6


@pytest.fixture(scope="module")
def lambada(shared: Path) -> Path:
    return shared / "lambada" / "lambada_test.jsonl"


def test_a_passage_is_cut_before_its_last_word_and_the_white_space_there() -> None:
    assert cut("a b c", byte_tokenizer()).context == (BOS, *b"a b")
    assert cut("a b c", byte_tokenizer()).word == (*b" c",)
    assert cut("a b\n\n c", byte_tokenizer()).word == (*b"\n\n c",)
    assert cut("a b\nc", byte_tokenizer()).word == (*b" b\nc",)
    for text in ("", " ", "word", " word", "a word ", "\n word"):
        with pytest.raises(UserError, match="a last word and something before it"):
            cut(text, byte_tokenizer())


def test_a_word_is_right_where_every_id_of_it_is_likeliest() -> None:
    llm, _ = scripted_llm(TEXT)  # after any k ids it expects the k-th byte of this
    heard: list[tuple[int, int]] = []
    found = last_words(llm, [TEXT, "He gave her the rung"], lambda *n: heard.append(n))
    assert (found["passages"], found["accuracy"]) == (2, 0.5)
    assert last_words(llm, [TEXT])["perplexity"] == pytest.approx(1)
    assert heard == [(1, 2), (2, 2)]


def test_perplexity_is_of_words_and_leaves_padding_out() -> None:
    found = last_words(fixed_llm(np.zeros(VOCAB, np.float32)), ["a b", "a bcd"])
    assert found["perplexity"] == pytest.approx(math.exp((2 + 4) / 2 * math.log(N_IDS)))


def test_a_file_of_passages(tmp_path: Path) -> None:
    file = tmp_path / "passages.jsonl"
    file.write_text('{"text": "a b"}\n{"text": "c d", "more": 1}\n{"words": "e f"}\n')
    assert read_texts(file, 2) == ["a b", "c d"]
    with pytest.raises(UserError, match=r"line 3 of .* is no JSON object with a text"):
        read_texts(file)
    with pytest.raises(UserError, match="must be at least 1, not 0"):
        read_texts(file, 0)
    for content in (b"[" * 10**5, b'{"text": 1}\n', b"\n", b'{"text": "a b"', b"\xff"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"no JSON object with a text|cannot be read as UTF-8"):
            read_texts(file)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        read_texts(file)


def test_a_server_scores_the_harnesss_requests_as_eval_does(
    lambada: Path, smollm2: Path, converted: Callable[[Path, str], Path]
) -> None:
    model = str(converted(smollm2, "f32"))
    with LLM(model) as llm:
        texts = sorted(read_texts(lambada, 10 * N_PASSAGES), key=len)[:N_PASSAGES]  # the short ones: seconds
        passages = [cut(text, llm.tokenizer) for text in texts]
        expected = [last_words(llm, [text]) for text in texts]
    request = {"model": "served", "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    prompts = [[*passage.context, *passage.word] for passage in passages]
    with harness.serving(model, "f32") as address:
        reply = httpx.post(f"{address}v1/completions", json={**request, "prompt": prompts}, timeout=300)
    assert reply.status_code == 200, reply.text
    choices = reply.json()["choices"]
    assert [choice["index"] for choice in choices] == [*range(N_PASSAGES)]
    for choice, passage, score in zip(choices, passages, expected, strict=True):
        rows = slice(len(passage.context), -1)
        logprobs, tops = choice["logprobs"]["token_logprobs"][rows], choice["logprobs"]["top_logprobs"][rows]
        assert len(logprobs) == len(passage.word)
        assert math.exp(-sum(logprobs)) == pytest.approx(score["perplexity"], rel=1e-3)
        assert all(p == max(top.values()) for p, top in zip(logprobs, tops, strict=True)) == (score["accuracy"] == 1)
    assert 0 < sum(score["accuracy"] for score in expected) < N_PASSAGES  # or the last line compared nothing


def test_lm_evaluation_harness_agrees(lambada: Path, smollm2: Path, converted: Callable[[Path, str], Path]) -> None:
    if shutil.which("lm_eval") is None:
        pytest.skip("lm_eval is not on the PATH (benchmarks/lm_eval/README.md)")
    command = [sys.executable, harness.__file__, "--model", str(converted(smollm2, "f32")), "--count", str(N_PASSAGES)]
    ran = subprocess.run([*command, "--passages", str(lambada)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["agree"]
    assert 0 <= found["harness"]["written"] <= 1
