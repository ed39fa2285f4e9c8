"""`fourfold eval`: loads what the command names, and measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourfold.errors import UserError
from fourfold.evaluate import evaluate as measure
from fourfold.llm import LLM
from fourfold.progress import bar


def evaluate(options: Mapping[str, Any]) -> dict[str, Any]:
    """The result of `fourfold.evaluate.evaluate`, and what was measured."""
    if (options["text"] is None) == (options["ids"] is None):
        raise UserError("give either --text FILE or --ids FILE.npy")
    if options["against_format"] is not None and options["against"] is None:
        raise UserError("--against-format is the format of the model to compare with; name that with --against")
    text = None if options["text"] is None else _read_text(options["text"])
    ids = None if options["ids"] is None else _read_ids(options["ids"])
    shared = {name: options[name] for name in ("ranks", "threads", "kv", "rope_angles", "weights")}
    reference: LLM | None = None
    with LLM(options["model"], format=options["format"], **shared) as llm:
        try:
            if options["against"] is not None:
                reference = LLM(options["against"], format=options["against_format"], **shared)
            with bar("evaluating", unit="tokens") as report:
                result = measure(
                    llm,
                    text=text,
                    ids=ids,
                    against=reference,
                    window=options["window"],
                    max_tokens=options["max_tokens"],
                    report=report,
                )
        finally:
            if reference is not None:
                reference.close()
    names = {"model": options["model"], "format": options["format"]}
    if options["against"] is not None:
        names |= {"against": options["against"], "against_format": options["against_format"]}
    return {name: value for name, value in names.items() if value is not None} | result


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from None


def _read_ids(path: Path) -> NDArray[Any]:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a .npy file of ids ({error})") from None
