"""Checkpoints of others, all shown the same way: a `Source`.

`open_source` reads; `check_complete` compares what it found with what a model needs.
"""

from __future__ import annotations

from pathlib import Path

from fourfold.checkpoint.complete import check_complete
from fourfold.checkpoint.gguf_file import open_gguf
from fourfold.checkpoint.huggingface import open_huggingface
from fourfold.checkpoint.source import Source
from fourfold.errors import CheckpointError

__all__ = ["Source", "check_complete", "open_source"]


def open_source(path: str | Path) -> Source:
    """A Hugging Face directory or a GGUF file, told apart by what they are and not by their names.

    Raises CheckpointError where it is neither, or is damaged, and UnsupportedError where it is sound but asks for
    something that fourfold does not do.
    """
    path = Path(path)
    if path.is_dir():
        return open_huggingface(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise CheckpointError(f"{path} is neither a Hugging Face directory nor a GGUF file")
    return open_gguf(path)
