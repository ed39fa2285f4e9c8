"""The bytes that each id of a tokenizer stands for: what a grammar matches, and what log probabilities are shown of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fourfold.errors import CheckpointError

SPACE = "▁"  # SentencePiece's space


@dataclass(frozen=True)
class Vocabulary:
    """One entry for each id from 0 to the tokenizer's `vocab_size` - 1."""

    tokens: tuple[bytes, ...]  # what the id adds in the middle of a text; how it is written where it is special
    special: frozenset[int]  # ids that no text consists of: ends of texts and turns, padding

    def text(self, token_id: int) -> str:
        """The id's own text; bytes that are not UTF-8 by themselves become U+FFFD."""
        return self.tokens[token_id].decode(errors="replace")


def from_pieces(pieces: Mapping[int, str], special: Iterable[int], size: int, *, byte_level: bool) -> Vocabulary:
    """Of pieces as a tokenizer's file writes them: `byte_level` as GPT-2 does, else as SentencePiece does."""
    specials = frozenset(special)
    spell = _spelled_by_bytes if byte_level else _spelled_by_sentencepiece
    tokens = [b""] * size
    for token_id, piece in pieces.items():
        tokens[token_id] = piece.encode() if token_id in specials else spell(piece)
    return Vocabulary(tuple(tokens), specials)


def of_library(library: Any, size: int) -> Vocabulary:
    """Of a `tokenizers.Tokenizer`. Raises CheckpointError where its decoder is none whose pieces are understood."""
    added = library.get_added_tokens_decoder()
    pieces = {token_id: piece for piece, token_id in library.get_vocab(with_added_tokens=False).items()}
    kinds = _decoders(json.loads(library.to_str()).get("decoder") or {})
    if unknown := kinds - {"ByteLevel", "ByteFallback", "Fuse", "Strip", "Replace", "Metaspace"}:
        raise CheckpointError(f"the tokenizer's decoder {min(unknown)} is not understood, so its ids have no bytes")
    special = [token_id for token_id, token in added.items() if token.special]
    of_pieces = from_pieces(pieces, [], size, byte_level="ByteLevel" in kinds)
    tokens = list(of_pieces.tokens)
    for token_id, token in added.items():
        tokens[token_id] = token.content.encode()
    return Vocabulary(tuple(tokens), frozenset(special))


def _decoders(decoder: Mapping[str, Any]) -> set[str]:
    if decoder.get("type") == "Sequence":
        return {kind for part in decoder["decoders"] for kind in _decoders(part)}
    return {str(decoder["type"])} if decoder else set()


def _spelled_by_bytes(piece: str) -> bytes:
    """GPT-2 writes every byte as a character that is seen; what is not such a character stands for itself."""
    return b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode() for c in piece)


def _spelled_by_sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: bytes that are seen in Latin-1 as themselves, the rest in order from U+0100."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


_BYTES = _byte_characters()
