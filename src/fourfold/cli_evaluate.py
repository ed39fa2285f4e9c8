"""`fourfold eval`: loads what the command names, and measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourfold.errors import UserError
from fourfold.evaluate import evaluate as measure
from fourfold.lambada import last_words, read_texts
from fourfold.llm import LLM
from fourfold.progress import bar

MODEL_OPTIONS = ("ranks", "threads", "kv", "rope_angles", "weights")
TEXT_OPTIONS = ("against", "against_format", "window", "max_tokens")


def evaluate(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `fourfold.evaluate.evaluate` or `fourfold.lambada.last_words` says, and what was measured."""
    if sum(options[name] is not None for name in ("text", "ids", "lambada")) != 1:
        raise UserError("give one of --text FILE, --ids FILE.npy and --lambada FILE.jsonl")
    measured = _of_text(options) if options["lambada"] is None else _of_last_words(options)
    names = {name: options[name] for name in ("model", "format", "against", "against_format")}
    return {name: value for name, value in names.items() if value is not None} | measured


def _of_text(options: Mapping[str, Any]) -> dict[str, Any]:
    if options["passages"] is not None:
        raise UserError("--passages is for --lambada; of a text, --max-tokens takes the first tokens only")
    if options["against_format"] is not None and options["against"] is None:
        raise UserError("--against-format is the format of the model to compare with; name that with --against")
    text = None if options["text"] is None else _read_text(options["text"])
    ids = None if options["ids"] is None else _read_ids(options["ids"])
    shared = {name: options[name] for name in MODEL_OPTIONS}
    reference: LLM | None = None
    with LLM(options["model"], format=options["format"], **shared) as llm:
        try:
            if options["against"] is not None:
                reference = LLM(options["against"], format=options["against_format"], **shared)
            with bar("evaluating", unit="tokens") as report:
                return measure(
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


def _of_last_words(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in TEXT_OPTIONS:
        if options[name] is not None:
            raise UserError(f"--{name.replace('_', '-')} is for --text and --ids, not for --lambada")
    texts = read_texts(options["lambada"], options["passages"])
    shared = {name: options[name] for name in ("format", *MODEL_OPTIONS)}
    with LLM(options["model"], **shared) as llm, bar("guessing last words", unit="passages") as report:
        return last_words(llm, texts, report)


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
