"""Checkpoints of others, all shown the same way: a `Source`.

`open_source` reads, in the forms that docs/checkpoints.md lists; `check_complete` compares with what a model needs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from fourfold.checkpoint.complete import check_complete, check_copied_head
from fourfold.checkpoint.deepspeed import is_deepspeed, open_deepspeed
from fourfold.checkpoint.gguf_file import open_gguf
from fourfold.checkpoint.huggingface import open_huggingface
from fourfold.checkpoint.megatron import is_megatron, open_megatron
from fourfold.checkpoint.source import Source, fingerprint
from fourfold.checkpoint.tokenizer_files import VOCABULARIES, find_tokenizer
from fourfold.errors import CheckpointError

__all__ = ["Source", "check_complete", "check_copied_head", "open_source"]


def open_source(path: str | Path, tokenizer: str | Path | None = None) -> Source:
    """A Hugging Face, Megatron or DeepSpeed directory or a GGUF file, told apart by what they are, not by their names.

    `tokenizer` is a directory whose tokenizer counts in place of the checkpoint's own. Raises CheckpointError where
    there is no checkpoint or it is damaged, and UnsupportedError where it is sound but asks for something that fourfold
    does not do.
    """
    files = find_tokenizer([Path(tokenizer)]) if tokenizer is not None else {}
    if tokenizer is not None and not files.keys() & set(VOCABULARIES):
        raise CheckpointError(f"{tokenizer} has neither {' nor '.join(VOCABULARIES)}, so it holds no tokenizer")
    source = _open(Path(path))
    if tokenizer is None:
        return source
    both = source.fingerprint + fingerprint(source.config, files.values())
    return dataclasses.replace(source, tokenizer_files=files, fingerprint=hashlib.sha256(both.encode()).hexdigest())


def _open(path: Path) -> Source:
    if path.is_dir():
        if is_megatron(path):
            return open_megatron(path)
        return open_deepspeed(path) if is_deepspeed(path) else open_huggingface(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise CheckpointError(f"{path} is no GGUF file; of other models give the directory, not a file in it")
    return open_gguf(path)
