"""`fourfold plan`: the answer, its picture, and the machine kept for another time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourfold.errors import UserError
from fourfold.plan.answer import PROMPT_TOKENS, plan_with_machine
from fourfold.plan.machines import format_machine
from fourfold.plan.picture import check_picture, draw


def plan(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the options ask for; what cannot be written is refused before anything is measured."""
    picture, save = options["picture"], options["save"]
    if picture is not None:
        check_picture(picture)
    if save is not None:
        if options["machine"] is not None:
            raise UserError("--save keeps this machine as measured; leave --machine out")
        if not save.parent.is_dir():
            raise UserError(f"there is no directory {save.parent} to write {save.name} in")
    prompt = options["prompt_tokens"]
    answer, machine = plan_with_machine(
        options["model"],
        prompt=PROMPT_TOKENS if prompt is None else prompt,
        **{name: options[name] for name in ("machine", "ranks", "context", "kv", "format")},
    )
    if save is not None:
        _write(save, format_machine(machine))
    if picture is not None:
        draw(answer, picture)
    return answer


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
