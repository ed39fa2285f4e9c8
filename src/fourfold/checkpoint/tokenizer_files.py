"""The files beside a model that say how its texts become ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

VOCABULARIES = ("tokenizer.json", "tokenizer.model")
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def find_tokenizer(folders: Sequence[Path]) -> dict[str, Path]:
    """The files, by name, of the first folder that has a vocabulary; else what else the last one has of them."""
    chosen = next(
        (folder for folder in folders if any((folder / name).is_file() for name in VOCABULARIES)), folders[-1]
    )
    return {name: chosen / name for name in TOKENIZER_FILES if (chosen / name).is_file()}
