"""A SentencePiece model from its parts: the few fields of its protocol buffer that an encoder reads."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from enum import IntEnum


class TokenType(IntEnum):
    """SentencePiece's numbers, and GGUF's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_BPE = 2  # TrainerSpec.ModelType
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # ModelProto
_PIECE, _SCORE, _TYPE = 1, 2, 3  # ModelProto.SentencePiece
_MODEL_TYPE, _BYTE_FALLBACK, _NAMES = 3, 35, {"unk_token": 45, "bos_token": 46, "eos_token": 47, "pad_token": 48}
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_WHITESPACES = 2, 3, 4  # NormalizerSpec


def model_proto(
    pieces: Iterable[tuple[str, float, int]],
    special: Mapping[str, str | None],
    *,
    dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    charsmap: bytes,
) -> bytes:
    """A serialized BPE model.

    `pieces` are (text, score, TokenType) by id; `special` gives the text of `unk_token`, `bos_token`, `eos_token` and
    `pad_token`; `charsmap` is SentencePiece's compiled normalization, empty for none.
    """
    out, byte_fallback = bytearray(), False
    for text, score, kind in pieces:
        byte_fallback |= kind == TokenType.BYTE
        out += _bytes(_PIECES, _bytes(_PIECE, text.encode()) + _float(_SCORE, score) + _int(_TYPE, kind))
    names = b"".join(_bytes(_NAMES[name], text.encode()) for name, text in special.items() if text)
    out += _bytes(_TRAINER, _int(_MODEL_TYPE, _BPE) + _int(_BYTE_FALLBACK, byte_fallback) + names)
    flags = _int(_DUMMY_PREFIX, dummy_prefix) + _int(_EXTRA_WHITESPACES, remove_extra_whitespaces)
    return bytes(out + _bytes(_NORMALIZER, _bytes(_CHARSMAP, charsmap) + flags))


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def _int(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)
