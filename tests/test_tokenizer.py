"""Tokenizers against published vectors, and the stream decoder against decoding the whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from fourfold.chat_template import ChatTemplate
from fourfold.checkpoint import open_source
from fourfold.errors import CheckpointError, UserError
from fourfold.tokenizer import Tokenizer

TEXTS = ["hello world", "你好，世界 👋🏽!", " two  spaces ", "naïve\ncafé\t𒀀", "", "x"]


@pytest.fixture(scope="module")
def yuan(yuan_tokenizer: Path) -> Tokenizer:
    return Tokenizer.from_directory(yuan_tokenizer)


@pytest.fixture(scope="module")
def stories(shared: Path) -> Tokenizer:
    return Tokenizer.from_directory(shared / "stories15M")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(TEXTS * 20, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return _saved(library, tmp_path_factory.mktemp("bpe"), {"eos_token": "<|im_end|>", "bos_token": None})


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The shape of Llama 2's tokenizer.json: ▁ for spaces, bytes for what is not in the vocabulary."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [f"<0x{b:02X}>" for b in range(256)] + list("▁abcdefghijklmnopqrstuvwxyz你") + ["▁a", "▁b"]:
        vocab[piece] = len(vocab)
    merges = [("▁", "a"), ("▁", "b")]
    library = Library(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?!)"), "isolated")
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return _saved(library, tmp_path_factory.mktemp("fallback"), {"eos_token": {"content": "</s>"}, "bos_token": "<s>"})


def _saved(library: Library, root: Path, config: dict[str, object]) -> Tokenizer:
    library.enable_truncation(2)  # what a tokenizer.json may have been saved with must not cut our texts
    library.save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_directory(root)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("What is AI?", [1724, 338, 79545, 29973]),
        (
            "请问目前最先进的机器学习算法有哪些？",
            [29871, 36264, 32139, 58274, 54577, 38386, 33638, 30882],
        ),
        ("写一篇春游作文<sep>", [29871, 31479, 37056, 31031, 32419, 39053, 77187]),
        ("北京简介<sep> 北京<eod>", [29871, 32279, 39968, 77187, 29871, 32279, 77185]),
        ("<eod>hello", [77185, 22172]),
        ("x <sep> y", [921, 77187, 343]),
        ("hi<n>", [7251, 29966, 29876, 29958]),
        ("<mask><predict><FIM_SUFFIX><FIM_PREFIX><FIM_MIDDLE>", [134953, 134954, 134955, 134956, 134957]),
        ("<jupyter_start><pad>", [96630, 77188]),
    ],
)
def test_yuan_matches_the_published_slow_tokenizer(yuan: Tokenizer, text: str, ids: list[int]) -> None:
    assert yuan.encode(text) == ids
    assert yuan.encode(text, add_special_tokens=False) == ids


def test_yuan_ends_at_eod_begins_with_nothing_and_leaves_the_padding_rows_out(yuan: Tokenizer) -> None:
    assert (yuan.eos_ids, yuan.bos_id, yuan.vocab_size) == ((77185,), None, 134958)
    yuan.check_fits(135040)
    assert yuan.decode(yuan.encode("北京<sep>北京<eod>"), skip_special=False) == "北京<sep>北京<eod>"
    with pytest.raises(UserError, match="id 134958 is not the tokenizer's, whose ids are 0 to 134957"):
        yuan.decode([134958])


def test_sentencepiece_reads_a_trained_model(stories: Tokenizer, shared: Path) -> None:
    ids = np.load(shared / "stories15M" / "ref_ids.npy").tolist()
    text = stories.decode(ids)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")
    assert stories.encode(text)[: len(ids) - 1] == ids[:-1]
    assert (stories.bos_id, stories.eos_ids, stories.vocab_size) == (1, (2,), 32000)
    assert stories.encode("a</s>b") == [1, 263, 2, 289]


def test_text_after_a_special_token_has_no_space_in_front_unless_legacy(shared: Path, tmp_path: Path) -> None:
    shutil.copy(shared / "stories15M" / "tokenizer.model", tmp_path)
    added = {"32000": {"content": "<|x|>", "lstrip": True, "rstrip": False, "special": True}}
    config = {"legacy": False, "add_bos_token": False, "add_eos_token": True, "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("a <|x|>Once") == [263, 32000, 26222, 2]
    assert tokenizer.decode([263, 32000, 26222], skip_special=False) == "a<|x|>Once"
    assert tokenizer.vocab_size == 32001
    with pytest.raises(CheckpointError, match="has 32001 ids but the model's vocabulary only 32000"):
        tokenizer.check_fits(32000)


@pytest.mark.parametrize("name", ["yuan", "stories", "byte_level", "byte_fallback"])
def test_a_text_survives(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["yuan", "stories", "byte_level", "byte_fallback"])
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_streamed_pieces_joined_are_the_whole(name: str, request: pytest.FixtureRequest, data: st.DataObject) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    some = st.integers(0, min(300, tokenizer.vocab_size) - 1)  # bytes and specials lie low
    ids = data.draw(st.lists(some | st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    pieces, decoder = _streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert decoder.flush() == ""


@pytest.mark.parametrize("name", ["yuan", "stories", "byte_level", "byte_fallback"])
@given(text=st.text(max_size=30), cut=st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_a_stream_continues_the_text_before_it(name: str, request: pytest.FixtureRequest, text: str, cut: int) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text)
    before, after = ids[:cut], ids[cut:]
    whole, known = tokenizer.decode(ids), tokenizer.decode(before)
    added = "".join(_streamed(tokenizer, after, before)[0])
    assert known.rstrip("\ufffd") + added == whole or known + added == whole


@pytest.mark.parametrize("name", ["yuan", "stories", "byte_level", "byte_fallback"])
def test_no_piece_holds_half_a_character(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    text = "a𒀀👋🏽é漢 b"
    pieces, _ = _streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def _streamed(tokenizer: Tokenizer, ids: Sequence[int], after: Sequence[int] = ()) -> tuple[list[str], object]:
    decoder = tokenizer.stream(after)
    return [*map(decoder.push, ids), decoder.flush()], decoder


def test_smollm2_chats_in_the_ids_it_was_trained_on(shared: Path, smollm2: Path, tmp_path: Path) -> None:
    with open_source(smollm2) as source:
        for name, content in source.tokenizer_files.items():
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    tokenizer, template = Tokenizer.from_directory(tmp_path), ChatTemplate.from_directory(tmp_path)
    known = json.loads((shared / "smollm2" / "ref_gen.json").read_text())
    assert tokenizer.encode(known["text"])[:64] == known["ids"]
    assert tokenizer.decode(known["chat_new_ids"], skip_special=False) == known["chat_text"]
    assert tokenizer.decode(known["plain_new_ids"]) == known["plain_text"]
    assert template is not None
    prompt = template.render([{"role": "user", "content": "What is the capital of France? Answer in one sentence."}])
    assert tokenizer.decode(known["chat_prompt_ids"], skip_special=False) == prompt
    assert tokenizer.encode(prompt, add_special_tokens=False) == known["chat_prompt_ids"]
    assert 2 in tokenizer.eos_ids


def test_eos_ids_are_those_of_every_file(byte_level: Tokenizer, tmp_path: Path) -> None:
    assert byte_level.decode(byte_level.encode("a<|im_end|>")) == "a"
    source = {"vocab": {"a": 0, "b": 1, "</s>": 2}, "merges": []}
    library = Library(models.BPE(vocab=source["vocab"], merges=source["merges"]))
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"fourfold": 1, "model": {"eos_ids": [0], "bos_id": 1}}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.eos_ids, tokenizer.bos_id) == ((0, 1, 2), 1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has neither tokenizer.json nor tokenizer.model"),
        ({"tokenizer.json": b"{"}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer.json": b"{}"}, "tokenizer.json is not a tokenizer"),
        ({"tokenizer.model": b""}, "tokenizer.model is empty"),
        ({"tokenizer.model": b"garbage" * 9}, "tokenizer.model is not a SentencePiece model"),
        ({"tokenizer.model": b"", "tokenizer_config.json": b"[]"}, "tokenizer_config.json"),
        ({"tokenizer.model": b"", "config.json": b'{"a'}, "config.json"),
    ],
)
def test_damaged_files_are_one_sentence(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_unicode_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(UserError, match="not valid Unicode at character 1"):
        byte_level.encode("a\udc80")


def _document(**parts: object) -> str:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model} | parts)


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
        {"model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"zz": 0}}},
    ],
)
def test_a_tokenizer_that_makes_its_library_panic_is_refused_quietly(
    parts: dict[str, object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text(_document(**parts))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer that can be read \(.+\); copy it"):
        Tokenizer.from_directory(tmp_path)
    assert capfd.readouterr().err == ""


def test_a_text_that_a_damaged_tokenizer_cannot_encode_is_refused(tmp_path: Path) -> None:
    vocab = {"a": 0, "b": 1, "##b": 2}
    model = {"type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
    document = _document(model=model | {"vocab": vocab}, pre_tokenizer={"type": "WhitespaceSplit"})
    (tmp_path / "tokenizer.json").write_text(document)
    tokenizer = Tokenizer.from_directory(tmp_path)
    with pytest.raises(CheckpointError, match="cannot encode this text"):
        tokenizer.encode("zebra")
