"""The tokenizer inside a GGUF file comes out as files that cut text as the original did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

import tiny
from fourfold.chat_template import ChatTemplate
from fourfold.checkpoint import open_source
from fourfold.checkpoint.gguf_tokenizer import PRE_TOKENIZERS
from fourfold.tokenizer import Tokenizer as OurTokenizer

TRICKY = "It's 2024, don't  you\tknow?\r\n\n  naïve café — 北京 🙂 x=3.14159;\n\tHE'LL "


def files(path: Path, config: dict[str, Any] = tiny.CONFIG, **metadata: Any) -> dict[str, bytes]:
    keys = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    found = open_source(tiny.write_gguf(path, config, tiny.tensors(config), metadata=keys)).tokenizer_files
    assert all(isinstance(content, bytes) for content in found.values())
    return dict(found)  # type: ignore[arg-type]


def byte_level(path: Path, **metadata: Any) -> Tokenizer:
    return Tokenizer.from_str(files(path, **metadata)["tokenizer.json"].decode())


def test_smollm2s_prompts(shared: Path, smollm2: Path) -> None:
    found = open_source(smollm2).tokenizer_files
    library = Tokenizer.from_str(found["tokenizer.json"].decode())  # type: ignore[union-attr]
    reference = json.loads((shared / "smollm2" / "ref_gen.json").read_text())
    for key in ("chat_prompt_ids", "plain_prompt_ids", "chat_new_ids", "plain_new_ids"):
        assert library.encode(library.decode(reference[key], skip_special_tokens=False)).ids == reference[key]
    assert library.encode(reference["text"]).ids[:64] == reference["ids"]
    assert library.decode(reference["plain_new_ids"]) == reference["plain_text"]
    assert library.decode(library.encode(TRICKY).ids) == TRICKY
    about = json.loads(found["tokenizer_config.json"])  # type: ignore[arg-type]
    assert (about["bos_token"], about["eos_token"], about["add_bos_token"]) == ("<|im_start|>", "<|im_end|>", False)
    assert about["chat_template"].startswith("{% for message in messages %}")


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_loses_nothing(tmp_path: Path, pre: str) -> None:
    library = byte_level(tmp_path / "model.gguf", pre=pre)
    assert library.decode(library.encode(TRICKY).ids) == TRICKY


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["ab", "'s", "Ġ12345", "Ġ", "Ġ!?", "Ċ", "Ċ", "'", "LL"]),
        ("smollm", ["ab", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġ!?", "Ċ", "Ċ", "'", "LL"]),
        ("qwen2", ["ab", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġ!?ĊĊ", "'LL"]),
        ("llama-bpe", ["ab", "'s", "Ġ", "123", "45", "Ġ", "Ġ!?ĊĊ", "'LL"]),
        ("dbrx", ["ab", "'s", "Ġ", "123", "45", "Ġ", "Ġ!?ĊĊ", "'LL"]),
        ("gpt-4o", ["ab's", "Ġ", "123", "45", "Ġ", "Ġ!?ĊĊ", "'LL"]),
        ("tekken", ["ab", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġ!?ĊĊ", "'LL"]),
    ],
)
def test_how_each_pre_tokenizer_cuts(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    library = byte_level(tmp_path / "model.gguf", pre=pre)
    found = [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str("ab's 12345  !?\n\n'LL")]
    assert found == pieces


def test_control_tokens_are_found_in_text_and_padding_is_dropped(tmp_path: Path) -> None:
    library = byte_level(tmp_path / "model.gguf")
    assert library.encode("<|start|>he<|tool|> he<|end|>").ids == [256, 259, 258, 261, 257]
    assert library.decode([256, 259, 258, 257]) == "he<|tool|>"  # a user-defined token is text, a control token is not
    assert library.get_vocab_size() == 262
    about = json.loads(files(tmp_path / "model.gguf")["tokenizer_config.json"])
    assert {i: token["special"] for i, token in about["added_tokens_decoder"].items()} == {
        "256": True,
        "257": True,
        "258": False,
    }
    assert about["chat_template"] == "{{ messages[0]['content'] }}"


def test_bos_and_eos_are_added_where_the_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    assert byte_level(path).encode("he").ids == [259]
    assert byte_level(path, add_bos_token=True).encode("he").ids == [256, 259]
    assert byte_level(path, add_bos_token=True, add_eos_token=True).encode("he").ids == [256, 259, 257]
    assert byte_level(path, pre="llama-bpe").encode("he").ids == [256, 259]
    assert byte_level(path, pre="llama-bpe", add_bos_token=False).encode("he").ids == [259]


@pytest.mark.parametrize("bos", ["a:b", "$A", "$B:1", " ", "x y", "\0", "<s>:0"])
def test_an_odd_bos_token_is_no_template(tmp_path: Path, bos: str) -> None:
    tokens, _, _ = tiny.byte_level_vocabulary()
    tokens[256] = bos
    library = byte_level(tmp_path / "model.gguf", tokens=tokens, add_bos_token=True)
    assert library.encode("he").ids == [256, 259]


def test_a_file_without_a_tokenizer_gives_none(tmp_path: Path) -> None:
    assert files(tmp_path / "model.gguf", model="none") == {}


def test_sentencepiece_is_rebuilt(tmp_path: Path, shared: Path) -> None:
    original = SentencePieceProcessor(model_file=str(shared / "stories15M" / "tokenizer.model"))
    size = original.get_piece_size()

    def kind(i: int) -> TokenType:
        if original.is_unknown(i):
            return TokenType.UNKNOWN
        if original.is_control(i):
            return TokenType.CONTROL
        return TokenType.BYTE if original.is_byte(i) else TokenType.NORMAL

    found = files(
        tmp_path / "model.gguf",
        tiny.CONFIG | {"vocab_size": size + 8, "bos_token_id": 1, "eos_token_id": 2},
        model="llama",
        pre="default",
        tokens=[original.id_to_piece(i) for i in range(size)] + ["<|tool|>", "[PAD]"],
        scores=[original.get_score(i) for i in range(size)] + [-1000.0, -1000.0],
        token_type=[int(kind(i)) for i in range(size)] + [int(TokenType.USER_DEFINED), int(TokenType.UNUSED)],
        merges=None,
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )
    rebuilt = SentencePieceProcessor(model_proto=found["tokenizer.model"])
    assert rebuilt.get_piece_size() == size + 1
    assert (rebuilt.unk_id(), rebuilt.bos_id(), rebuilt.eos_id()) == (0, 1, 2)
    lines = (shared / "wikitext2" / "wiki.valid.raw").read_text().splitlines()[:400]
    for line in [*lines, TRICKY, "", " ", "  two", "🙂"]:
        assert rebuilt.encode(line) == original.encode(line)
        assert rebuilt.decode(rebuilt.encode(line)) == original.decode(original.encode(line))
    assert size in rebuilt.encode("call <|tool|> now")
    about = json.loads(found["tokenizer_config.json"])
    assert (about["tokenizer_class"], about["add_bos_token"]) == ("LlamaTokenizer", True)
    assert list(about["added_tokens_decoder"]) == ["0", "1", "2", str(size)]


def test_sentencepiece_without_a_space_in_front(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a"]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * 3]
    common = {
        "model": "llama",
        "tokens": pieces,
        "scores": [0.0] * 259 + [-3.0, -2.0, -1.0],
        "token_type": [int(kind) for kind in kinds],
        "merges": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = tiny.CONFIG | {"bos_token_id": 1, "eos_token_id": 2}
    for prefix, expected in ((True, [261, 261]), (False, [260, 261])):
        found = files(tmp_path / "model.gguf", config, **common, add_space_prefix=prefix)
        assert SentencePieceProcessor(model_proto=found["tokenizer.model"]).encode("a a") == expected


PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "\n"]


def turns(
    path: Path, model_type: str, template: str, *marks: str, **metadata: Any
) -> tuple[OurTokenizer, ChatTemplate]:
    """A SentencePiece tokenizer as a GGUF file of that model has it, with `marks` as control tokens behind PIECES."""
    config = {
        "llama": tiny.CONFIG,
        "gemma3_text": tiny.CONFIG | {"model_type": "gemma3_text", "rms_norm_eps": 1e-6},
        "phi3": tiny.CONFIG | {"model_type": "phi3"},
    }[model_type] | {"tie_word_embeddings": True}
    kinds = [TokenType.CONTROL] * 3 + [TokenType.UNKNOWN] + [TokenType.BYTE] * 256 + [TokenType.NORMAL] * 5
    n = len(PIECES)
    about = {
        "model": "llama", "pre": "default", "tokens": [*PIECES, *marks], "merges": None,
        "scores": [0.0] * 260 + [-9.0, -3.0, -3.0, -2.0, -1.0] + [-1000.0] * len(marks),
        "token_type": [int(kind) for kind in kinds] + [int(TokenType.CONTROL)] * len(marks),
        "bos_token_id": 2, "eos_token_id": 1, "padding_token_id": 0, "unknown_token_id": 3, "eot_token_id": n + 1,
    } | metadata  # fmt: skip
    keys = {f"tokenizer.ggml.{key}": value for key, value in about.items()} | {"tokenizer.chat_template": template}
    keys |= {"gemma3.attention.sliding_window": 16} if model_type == "gemma3_text" else {}
    with open_source(tiny.write_gguf(path / "m.gguf", config, tiny.tensors(config), metadata=keys)) as source:
        assert source.config.eos_ids == (1, n + 1)
        for name, content in source.tokenizer_files.items():
            assert isinstance(content, bytes)
            (path / name).write_bytes(content)
    template_of = ChatTemplate.from_directory(path)
    assert template_of is not None
    return OurTokenizer.from_directory(path), template_of


def test_the_turns_of_gemma(tmp_path: Path) -> None:
    """In the manner of its own: a text begins without a space, and a line's end is a token."""
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] }}"
        "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>a\n' }}{% endif %}"
    )
    marks = ("<start_of_turn>", "<end_of_turn>")
    tokenizer, chat = turns(tmp_path, "gemma3_text", template, *marks, add_space_prefix=False)
    prompt = chat.render([{"role": "b", "content": "a a"}])
    n = len(PIECES)
    a, b, with_space, line = (PIECES.index(piece) for piece in ("a", "b", "▁a", "\n"))
    expected = [2, n, b, line, a, with_space, n + 1, line, n, a, line]
    assert tokenizer.encode(prompt, add_special_tokens=False) == expected
    assert tokenizer.encode("a a") == [2, a, with_space]
    assert tokenizer.decode(expected) == "b\na a\na\n"


def test_the_turns_of_phi3_drop_the_lines_ends_between_them(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ '<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n' }}{% endfor %}"
    marks = ("<|user|>", "<|end|>", "<|assistant|>")
    tokenizer, chat = turns(tmp_path, "phi3", template, *marks)
    n, with_space = len(PIECES), PIECES.index("▁a")
    prompt = chat.render([{"role": "user", "content": "a"}])
    assert tokenizer.encode(prompt, add_special_tokens=False) == [n, with_space, n + 1, n + 2]
    llama, _ = turns(tmp_path, "llama", template, *marks)
    assert len(llama.encode(prompt, add_special_tokens=False)) > 4
