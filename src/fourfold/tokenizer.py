"""Text to ids and back, and ids to text as they arrive: `tokenizer.json` or SentencePiece's `tokenizer.model`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from fourfold.checkpoint.source import optional_json
from fourfold.errors import CheckpointError, UserError
from fourfold.vocabulary import SPACE, Vocabulary, from_pieces, of_library

# Yuan 2.0 adds these to its SentencePiece model in this order; those that the model lacks get the ids after its last.
YUAN_EOS = "<eod>"
YUAN_SPECIALS = (
    *("<sep>", "<pad>", "<mask>", "<predict>", "<FIM_SUFFIX>", "<FIM_PREFIX>", "<FIM_MIDDLE>"),
    *("<commit_before>", "<commit_msg>", "<commit_after>"),
    *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>"),
)
REPLACEMENT = "\ufffd"  # what bytes that are not UTF-8 decode to


class Tokenizer:
    """The tokenizer of one model, and the ids that begin and end its texts."""

    def __init__(self, backend: Backend, *, bos_id: int | None = None, eos_ids: Sequence[int] = ()) -> None:
        """From parts; `from_directory` is the usual way in."""
        self._backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.vocab_size = backend.vocab_size  # one more than the largest id that it can produce

    @staticmethod
    def is_in(path: str | Path) -> bool:
        """Whether a directory has a tokenizer."""
        return any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read a fourfold or Hugging Face directory. Raises CheckpointError for a missing or damaged file."""
        root = Path(path)
        facts = _Facts.read(root)
        fast, slow = root / "tokenizer.json", root / "tokenizer.model"
        if not cls.is_in(root):
            raise CheckpointError(f"{root} has neither tokenizer.json nor tokenizer.model; copy the model's there")
        if facts.model_type == "yuan" and slow.is_file():
            return _yuan(slow)
        backend: Backend
        if fast.is_file():
            backend, bos, eos = _Fast(fast), facts.bos_token, facts.eos_token
        else:
            processor = _load_sentencepiece(slow)
            backend = _SentencePiece(
                processor,
                _config_specials(processor, root, facts),
                add_bos=bool(facts.tokenizer.get("add_bos_token", True)),
                add_eos=bool(facts.tokenizer.get("add_eos_token", False)),
                prefix_every_text=bool(facts.tokenizer.get("legacy", True)),
            )
            bos, eos = facts.bos_token or _piece(processor, "bos"), facts.eos_token or _piece(processor, "eos")
        bos_id = backend.id_of(bos) if bos else None
        eos_id = backend.id_of(eos) if eos else None
        eos_ids = (*facts.eos_ids, *([] if eos_id is None else [eos_id]))
        return cls(backend, bos_id=facts.bos_id if bos_id is None else bos_id, eos_ids=eos_ids)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; special tokens written in it count as such.

        `add_special_tokens`: put in front and behind what the model expects there (nothing, for Yuan). Text from a chat
        template has it already.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not valid Unicode at character {error.start}; pass it as UTF-8") from None
        return self._backend.encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Raises UserError for an id outside the vocabulary."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"id {i} is not the tokenizer's, whose ids are 0 to {self.vocab_size - 1}")
        return self._backend.decode(ids, skip_special)

    def id_of(self, token: str) -> int | None:
        """The id of the token that is written so; None where there is none."""
        return self._backend.id_of(token)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The bytes of every id; made when it is first asked for, in a fraction of a second."""
        return self._backend.vocabulary()

    def stream(self, after: Sequence[int] = ()) -> StreamDecoder:
        """A decoder for ids that arrive one at a time, and whose text continues that of `after`."""
        return StreamDecoder(self.decode, self._backend.byte_ids, after)

    def check_fits(self, vocab_size: int) -> None:
        """Raises CheckpointError where the tokenizer can produce ids that the model has no row for."""
        if self.vocab_size > vocab_size:
            raise CheckpointError(
                f"the tokenizer has {self.vocab_size} ids but the model's vocabulary only {vocab_size}; "
                "they belong to different models"
            )


class NoTokenizer:
    """What a model without a tokenizer has in its place: its ids, as numbers with a space after each."""

    def __init__(self, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self.vocab_size, self.eos_ids = vocab_size, tuple(eos_ids)

    def stream(self, after: Sequence[int] = ()) -> NoTokenizer:
        return self

    def push(self, token_id: int) -> str:
        return f"{token_id} "

    def flush(self) -> str:
        return ""


class StreamDecoder:
    """Whole characters as early as they are certain.

    What all `push`es and the last `flush` return is, joined, what `decode` adds to the text of `after`.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], byte_ids: frozenset[int], after: Sequence[int]) -> None:
        self._decode, self._byte_ids = decode, byte_ids
        self._pending: list[int] = []  # ids whose text is not out yet
        self._in_run = False
        # A text's beginning decodes differently from its middle, so the ids of the last piece stay, as context.
        self._context, self._context_text = list(after), decode(after)

    def push(self, token_id: int) -> str:
        """The text that this id makes certain, often none."""
        self._pending.append(token_id)
        if token_id in self._byte_ids or self._decode([token_id]):  # a token without text does not end a run
            self._in_run = token_id in self._byte_ids
        text = self._decode(self._context + self._pending)
        if text.endswith(REPLACEMENT) or self._in_run:
            return ""  # half a character, or a run of bytes that the next one may make invalid as a whole
        return self._emit(text)

    def flush(self) -> str:
        """The rest, after the last id; half a character comes out as U+FFFD."""
        return self._emit(self._decode(self._context + self._pending))

    def _emit(self, text: str) -> str:
        known = self._context_text
        while not text.startswith(known):  # only where `after` ends in half a character
            known = known[:-1]
        new = text[len(known) :]
        if new:
            self._context, self._pending = self._pending, []
            self._context_text = self._decode(self._context)
        return new


class Backend(Protocol):
    """What a tokenizer library is to `Tokenizer`."""

    vocab_size: int
    byte_ids: frozenset[int]  # tokens of one byte that decode as a run: valid UTF-8 as a whole, or not at all

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...
    def id_of(self, token: str) -> int | None: ...
    def vocabulary(self) -> Vocabulary: ...


class _Fast:
    """`tokenizer.json`, whose own normalizer, post-processor and decoder are honoured."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Library

        self._path = path
        with _quiet(), self._sound("is not a tokenizer that can be read"):
            self._library = Library.from_file(str(path))
            self._library.no_truncation()
            self._library.no_padding()
            probe = self._library.encode("a b").ids  # with what the post-processor adds
            self._library.decode(probe)
        vocab = self._library.get_vocab(with_added_tokens=True)
        if not vocab:
            raise CheckpointError(f"{path} has an empty vocabulary")
        self.vocab_size = max([*vocab.values(), *probe]) + 1
        self.byte_ids = frozenset(vocab[piece] for piece in map(_byte_piece, range(256)) if piece in vocab)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        with self._sound("cannot encode this text"):
            return list(self._library.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        with self._sound("cannot decode these ids"):
            return str(self._library.decode(list(ids), skip_special_tokens=skip_special))

    def id_of(self, token: str) -> int | None:
        found: int | None = self._library.token_to_id(token)
        return found

    def vocabulary(self) -> Vocabulary:
        with self._sound("has a vocabulary that cannot be read"):
            return of_library(self._library, self.vocab_size)

    @contextmanager
    def _sound(self, otherwise: str) -> Iterator[None]:
        """Whatever the library raises is the file's fault; where it panics, that is not even an Exception."""
        try:
            yield
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:
            raise CheckpointError(f"{self._path} {otherwise} ({_line(error)}); copy it from the model again") from None


@dataclass(frozen=True)
class _Special:
    """A token that is cut out of the text before SentencePiece sees it."""

    id: int
    lstrip: bool = False  # takes the white space before it along
    rstrip: bool = False


class _SentencePiece:
    """`tokenizer.model`, with the special tokens that SentencePiece itself would spell out in pieces."""

    byte_ids: frozenset[int] = frozenset()  # none: `decode` reads a run byte by byte

    def __init__(
        self,
        processor: Any,
        specials: Mapping[str, _Special],
        *,
        add_bos: bool,
        add_eos: bool,
        prefix_every_text: bool,  # text after a special token gets a space in front as well ("legacy" behaviour)
    ) -> None:
        self._processor, self._specials = processor, specials
        self._add_bos = add_bos and processor.bos_id() >= 0
        self._add_eos = add_eos and processor.eos_id() >= 0
        self._prefix_every_text = prefix_every_text
        size = int(processor.get_piece_size())
        self.vocab_size = max(size, *(special.id + 1 for special in specials.values()), 0)
        self._bytes = {processor.piece_to_id(_byte_piece(b)): bytes([b]) for b in range(256)}
        self._bytes.pop(processor.unk_id(), None)
        ends = (processor.bos_id(), processor.eos_id(), processor.unk_id(), processor.pad_id())
        self._special_text = {i: str(processor.id_to_piece(i)) for i in ends if i >= 0}
        self._special_text |= {special.id: text for text, special in specials.items()}
        self._has_prefix = str(processor.id_to_piece(processor.encode("a")[0])).startswith(SPACE)
        by_length = sorted(specials, key=len, reverse=True)
        self._splitter = re.compile("|".join(map(re.escape, by_length)) or "(?!)")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = [self._processor.bos_id()] if add_special_tokens and self._add_bos else []
        end, strip = 0, False
        for match in self._splitter.finditer(text):
            special = self._specials[match[0]]
            between = text[end : match.start()]
            ids += self._encode_text(between.rstrip() if special.lstrip else between, strip, first=end == 0)
            ids.append(special.id)
            end, strip = match.end(), special.rstrip
        ids += self._encode_text(text[end:], strip, first=end == 0)
        return ids + ([self._processor.eos_id()] if add_special_tokens and self._add_eos else [])

    def _encode_text(self, text: str, strip: bool, first: bool) -> list[int]:
        text = text.lstrip() if strip else text
        if not text:
            return []
        if first or self._prefix_every_text or not self._has_prefix:
            return list(self._processor.encode(text))
        # SentencePiece always adds its space, so let it add it to something that is cut off again.
        lead = str(self._processor.id_to_piece(self._processor.unk_id()))
        return list(self._processor.encode(lead + text)[len(self._processor.encode(lead)) :])

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        parts: list[str] = []
        run: list[bytes] = []
        first = True

        def end_run() -> None:
            text = b"".join(run).decode("utf-8", errors="replace")
            prefixed = self._has_prefix and (first or self._prefix_every_text)
            parts.append(text.removeprefix(" ") if prefixed else text)
            run.clear()

        for i in ids:
            if i in self._special_text:
                end_run()
                parts.append("" if skip_special else self._special_text[i])
                first = first and i == self._processor.bos_id()
            else:
                piece = self._bytes.get(i)
                run.append(self._processor.id_to_piece(i).replace(SPACE, " ").encode() if piece is None else piece)
        end_run()
        return "".join(parts)

    def id_of(self, token: str) -> int | None:
        if token in self._specials:
            return self._specials[token].id
        found = int(self._processor.piece_to_id(token))
        return found if self._processor.id_to_piece(found) == token else None

    def vocabulary(self) -> Vocabulary:
        pieces = {i: str(self._processor.id_to_piece(i)) for i in range(int(self._processor.get_piece_size()))}
        return from_pieces(pieces | self._special_text, self._special_text, self.vocab_size, byte_level=False)


def _yuan(path: Path) -> Tokenizer:
    """Yuan 2.0, whose tokenizer_config.json is wrong about it: nothing is added at either end, and <eod> ends a text.

    White space around a special token goes, and text after one gets its own space in front, as in training.
    """
    processor = _load_sentencepiece(path)
    size = int(processor.get_piece_size())
    specials: dict[str, _Special] = {}
    for token in (YUAN_EOS, *YUAN_SPECIALS):
        found = int(processor.piece_to_id(token))
        if processor.id_to_piece(found) != token:
            found, size = size, size + 1
        specials[token] = _Special(found, lstrip=True, rstrip=True)
    if specials[YUAN_EOS].id >= processor.get_piece_size():
        raise CheckpointError(f"{path} is not Yuan's tokenizer: it has no {YUAN_EOS}")
    backend = _SentencePiece(processor, specials, add_bos=False, add_eos=False, prefix_every_text=True)
    return Tokenizer(backend, bos_id=None, eos_ids=(specials[YUAN_EOS].id,))


@dataclass(frozen=True)
class _Facts:
    """What the JSON files beside a tokenizer say about it."""

    model_type: str
    tokenizer: dict[str, Any]  # tokenizer_config.json
    bos_token: str | None
    eos_token: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]

    @classmethod
    def read(cls, root: Path) -> _Facts:
        config = optional_json(root / "config.json")
        config = config["model"] if isinstance(config.get("model"), dict) else config  # a fourfold directory nests it
        tokenizer = optional_json(root / "tokenizer_config.json")
        names = optional_json(root / "special_tokens_map.json") | tokenizer
        generation = optional_json(root / "generation_config.json")
        eos = [config.get("eos_ids"), config.get("eos_token_id"), generation.get("eos_token_id")]
        bos = config.get("bos_id", config.get("bos_token_id"))
        return cls(
            model_type=str(config.get("model_type", "")),
            tokenizer=tokenizer,
            bos_token=token_text(names.get("bos_token")),
            eos_token=token_text(names.get("eos_token")),
            bos_id=bos if isinstance(bos, int) else None,
            eos_ids=tuple(i for ids in eos for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)),
        )


def _config_specials(processor: Any, root: Path, facts: _Facts) -> dict[str, _Special]:
    """Special tokens of a SentencePiece model in a Hugging Face directory."""
    names = (_piece(processor, "bos"), _piece(processor, "eos"), _piece(processor, "unk"))
    found = {name: _Special(processor.piece_to_id(name)) for name in names if name}
    try:
        found |= {name: _Special(int(i)) for name, i in optional_json(root / "added_tokens.json").items()}
        for i, token in facts.tokenizer.get("added_tokens_decoder", {}).items():
            found[str(token["content"])] = _Special(int(i), bool(token.get("lstrip")), bool(token.get("rstrip")))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{root} lists its added tokens in a form that cannot be read") from None
    if bad := [name for name, special in found.items() if special.id < 0 or not name]:
        raise CheckpointError(f"{root} has an added token {bad[0]!r} with id {found[bad[0]].id}")
    return found


def _load_sentencepiece(path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        proto = path.read_bytes()
        if not proto:
            raise CheckpointError(f"{path} is empty; copy it from the model again")
        return SentencePieceProcessor(model_proto=proto)
    except (RuntimeError, OSError):
        raise CheckpointError(f"{path} is not a SentencePiece model; copy it from the model again") from None


def _piece(processor: Any, name: str) -> str | None:
    i = getattr(processor, f"{name}_id")()
    return str(processor.id_to_piece(i)) if i >= 0 else None


def _byte_piece(byte: int) -> str:
    return f"<0x{byte:02X}>"


def token_text(token: object) -> str | None:
    """A token as the JSON files write it: its text, or an object with the text as `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing reaches stderr, where a Rust library that panics writes a backtrace of its own."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
