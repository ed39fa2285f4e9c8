"""The tokenizer inside a GGUF file, as the files that a Hugging Face directory would have.

Byte-level BPE ("gpt2") becomes a `tokenizer.json`, and SentencePiece ("llama") a `tokenizer.model`; both get a
`tokenizer_config.json` with the chat template and the special tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from fourfold.checkpoint.fields import Fields
from fourfold.checkpoint.sentencepiece_model import TokenType, model_proto
from fourfold.checkpoint.source import one_line
from fourfold.config import ModelConfig
from fourfold.errors import CheckpointError, UnsupportedError

KEY = "tokenizer.ggml."
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_ADDED: dict[int, bool] = {  # types of token that text is searched for, and whether such a token is special
    TokenType.CONTROL: True,
    TokenType.UNKNOWN: True,
    TokenType.USER_DEFINED: False,
}
_PLAIN = ("<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True)
class Vocabulary:
    """Each token's text, type and score, by id."""

    tokens: list[str]
    types: list[int]
    scores: list[float]

    def added(self, takes_space: bool = False) -> dict[int, dict[str, Any]]:
        """By id, the tokens that are found in a text before it is cut any further, in Hugging Face's words.

        `takes_space`: white space behind them belongs to them, but for Phi-3's _PLAIN.
        """
        return {
            i: {
                "content": token,
                "special": special,
                "normalized": False,
                "lstrip": False,
                "rstrip": takes_space and token not in _PLAIN,
            }
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if token and (special := _ADDED.get(kind)) is not None
        }


@dataclass(frozen=True)
class PreTokenizer:
    """How a text is cut before byte-level BPE; `tokenizer.ggml.pre` names one, and does not define it."""

    split: str | None = None  # GPT-2's own where there is none
    nfc: bool = False  # canonical composition first
    lone_digits: bool = False
    whole_words: bool = False  # a piece that is a token stays one, whatever its merges
    add_bos: bool = False  # where the file does not say


_TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words in which capitals come first, with what follows an apostrophe or without.
_CASED = (
    r"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{ending}"
    r"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{ending}"
    r"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = PreTokenizer(_TIKTOKEN.format(digits="{1,3}"), whole_words=True, add_bos=True)
_QWEN2 = PreTokenizer(_TIKTOKEN.format(digits=""), nfc=True)
PRE_TOKENIZERS = {
    "default": PreTokenizer(),
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(lone_digits=True),
    "starcoder": PreTokenizer(lone_digits=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": PreTokenizer(_TIKTOKEN.format(digits="{1,3}")),  # Phi-4
    "gpt-4o": PreTokenizer(_CASED.format(ending="(?i:'s|'t|'re|'ve|'m|'ll|'d)?", digits="{1,3}")),  # Phi-4-mini
    "tekken": PreTokenizer(_CASED.format(ending="", digits=""), whole_words=True, add_bos=True),  # Mistral Nemo, Small
}


def tokenizer_files(metadata: Mapping[str, Any], config: ModelConfig, where: str) -> dict[str, bytes]:
    """Contents by file name; empty where the file carries no tokenizer.

    Raises UnsupportedError, by name, for a kind of tokenizer or pre-tokenizer that fourfold cannot rebuild, and
    CheckpointError for one that contradicts itself or has more tokens than the model.
    """
    f = Fields({k.removeprefix(KEY): v for k, v in metadata.items() if k.startswith(KEY)}, f"{where}, {KEY}*,")
    kind = f.text("model", "none")
    if kind in ("none", "no_vocab"):
        return {}
    if kind not in ("gpt2", "llama"):
        raise UnsupportedError(f"{where}: tokenizer {kind!r} is not supported in GGUF; fourfold reads gpt2 and llama")
    v = _vocabulary(f, config.vocab_size, where)
    special = {name: _token(f, v, f"{key}_token_id") for name, key in _SPECIAL.items()}
    f.ignore("token_type_count", *(key for key in f if key.endswith("_token_id")))
    add_eos = f.flag("add_eos_token", False)
    if kind == "gpt2":
        pre = _pre_tokenizer(f, where)
        add_bos = f.flag("add_bos_token", pre.add_bos)
        ends = (special["bos_token"] if add_bos else None, special["eos_token"] if add_eos else None)
        files = {"tokenizer.json": _byte_level_bpe(f, pre, v, *ends)}
    else:
        add_bos = f.flag("add_bos_token", True)
        files = {"tokenizer.model": _sentencepiece(f, v, special, where)}
    f.finish()
    template = metadata.get("tokenizer.chat_template")
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast" if kind == "gpt2" else "LlamaTokenizer",
        "model_max_length": config.max_context,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        **{name: token for name, token in special.items() if token is not None},
        **({"chat_template": template} if isinstance(template, str) else {}),
        # Phi-3's turns are separated by white space that its tokenizer drops; GGUF does not say so.
        "added_tokens_decoder": {
            str(i): token for i, token in v.added(kind == "llama" and config.model_type == "phi3").items()
        },
    }
    return {**files, "tokenizer_config.json": json.dumps(about, ensure_ascii=False, indent=1).encode()}


def _vocabulary(f: Fields, vocab_size: int, where: str) -> Vocabulary:
    """The tokens, without the unused ones that only fill the embedding up."""
    tokens = f.many("tokens", str)
    n = len(tokens)
    types = f.many("token_type", int) if "token_type" in f else [int(TokenType.NORMAL)] * n
    scores = f.many("scores", float) if "scores" in f else [0.0] * n
    if not n == len(types) == len(scores):
        raise CheckpointError(f"{where} has {n} tokens, but {len(types)} types and {len(scores)} scores of them")
    if n > vocab_size:
        raise CheckpointError(f"{where} has {n} tokens, and an embedding for only {vocab_size}")
    if strange := set(types) - set(TokenType):
        raise CheckpointError(f"{where} has a token of the unknown type {min(strange)}")
    while n and types[n - 1] == TokenType.UNUSED:
        n -= 1
    if len(set(tokens[:n])) != n:
        raise CheckpointError(f"{where} has the same token twice in its vocabulary")
    return Vocabulary(tokens[:n], types[:n], scores[:n])


def _token(f: Fields, v: Vocabulary, key: str) -> str | None:
    for i in f.ids(key):
        if i >= len(v.tokens):
            raise CheckpointError(f"{f.where} sets {key} to {i}, and there are {len(v.tokens)} tokens")
        return v.tokens[i]
    return None


def _pre_tokenizer(f: Fields, where: str) -> PreTokenizer:
    name = f.text("pre")
    if name not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{where}: pre-tokenizer {name!r} is not supported; fourfold knows {', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]


def _byte_level_bpe(f: Fields, pre: PreTokenizer, v: Vocabulary, add_bos: str | None, add_eos: str | None) -> bytes:
    """A `tokenizer.json`; `add_bos` and `add_eos` are put in front of and behind every text."""
    f.only("add_space_prefix", False)
    ids = {token: i for i, token in enumerate(v.tokens)}
    cuts: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if pre.lone_digits else []
    if pre.split:
        cuts.append({"type": "Split", "pattern": {"Regex": pre.split}, "behavior": "Isolated", "invert": False})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not pre.split}
    document = {
        "version": "1.0",
        "added_tokens": [{"id": i, "single_word": False, **token} for i, token in v.added().items()],
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, byte_level]},
        "post_processor": _template(ids, add_bos, add_eos),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": pre.whole_words,
            "vocab": ids,
            "merges": [merge.partition(" ")[::2] for merge in f.many("merges", str)],
        },
    }
    text = json.dumps(document, ensure_ascii=False)
    try:
        Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise _contradiction(f, error) from error
    return text.encode()


def _template(ids: Mapping[str, int], bos: str | None, eos: str | None) -> dict[str, Any] | None:
    """What frames a text, and each text of a pair."""
    ends = [[{"SpecialToken": {"id": token, "type_id": 0}}] if token else [] for token in (bos, eos)]
    framed = [[*ends[0], {"Sequence": {"id": name, "type_id": 0}}, *ends[1]] for name in "AB"]
    if not (bos or eos):
        return None
    return {
        "type": "TemplateProcessing",
        "single": framed[0],
        "pair": framed[0] + framed[1],
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (bos, eos) if t},
    }


def _contradiction(f: Fields, error: Exception) -> CheckpointError:
    return CheckpointError(f"{f.where} describe a tokenizer that contradicts itself: {one_line(error)}")


def _sentencepiece(f: Fields, v: Vocabulary, special: Mapping[str, str | None], where: str) -> bytes:
    """A `tokenizer.model`."""
    f.ignore("pre", "merges")  # a text is cut by scores alone
    if "scores" not in f or not all(map(math.isfinite, v.scores)):
        raise CheckpointError(f"{where} has a SentencePiece tokenizer without a finite score for each token")
    unknown = [token for token, kind in zip(v.tokens, v.types, strict=True) if kind == TokenType.UNKNOWN]
    proto = model_proto(
        zip(v.tokens, v.scores, v.types, strict=True),
        {**special, "unk_token": unknown[0] if unknown else None},
        dummy_prefix=f.flag("add_space_prefix", True),
        remove_extra_whitespaces=f.flag("remove_extra_whitespaces", False),
        charsmap=bytes(i & 0xFF for i in f.many("precompiled_charsmap", int)) if "precompiled_charsmap" in f else b"",
    )
    try:
        SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise _contradiction(f, error) from error
    return proto
