"""What an administrator may choose, by flags or in a TOML file of the same names; flags win."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fourfold.errors import UserError
from fourfold.scheduler import MOST_RUNNING
from fourfold.scheduler import Limits as StepLimits
from fourfold.server.errors import explain
from fourfold.server.limits import Limits
from fourfold.server.protocol import MOST_ENTRIES

DEFAULTS = Limits()


class ServeOptions(BaseModel):
    """Every flag of `fourfold serve`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: str
    # the model, as for `fourfold run`
    format: str | None = None
    ranks: int | None = None
    threads: int | None = None
    context: int | None = None
    kv: str | None = None
    rope_angles: str | None = None
    weights: str | None = None
    chat_template: str | None = None
    # where, and for whom
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)  # 0: any that is free
    name: str | None = Field(None, min_length=1)  # by which clients ask; the model's own
    api_key_file: str | None = None
    root_path: str = Field("", pattern=r"^(/[A-Za-z0-9._~-]+)*$")  # below which a proxy mounts the server
    cors_origin: list[str] = []
    allowed_host: list[str] = []
    # the step loop
    max_running: int = Field(32, ge=1, le=MOST_RUNNING)
    max_waiting: int = Field(128, ge=0, le=1_000_000)
    max_wait_seconds: float = Field(600.0, gt=0)
    prompt_chunk: int = Field(512, ge=64, le=512)
    stall_seconds: float = Field(0.25, gt=0)
    prefix_cache: Literal["all", "prompts", "off"] = "all"
    speculate: bool = True
    draft: str | None = None
    # limits of requests
    max_requests: int = Field(DEFAULTS.max_requests, ge=1)
    max_connections: int = Field(DEFAULTS.max_connections, ge=1)
    unread_seconds: float = Field(DEFAULTS.unread_seconds, gt=0)
    max_body_bytes: int = Field(DEFAULTS.max_body_bytes, ge=1024)
    body_seconds: float = Field(DEFAULTS.body_seconds, gt=0)
    max_texts: int = Field(DEFAULTS.max_texts, ge=1, le=MOST_ENTRIES)
    max_n: int = Field(DEFAULTS.max_n, ge=1)
    max_logprobs: int = Field(DEFAULTS.max_logprobs, ge=0)
    max_messages: int = Field(DEFAULTS.max_messages, ge=1)
    max_stops: int = Field(DEFAULTS.max_stops, ge=1)
    max_stop_chars: int = Field(DEFAULTS.max_stop_chars, ge=1)
    max_biases: int = Field(DEFAULTS.max_biases, ge=0, le=MOST_ENTRIES)
    max_tools: int = Field(DEFAULTS.max_tools, ge=0)
    max_schema_bytes: int = Field(DEFAULTS.max_schema_bytes, ge=0)
    max_schema_depth: int = Field(DEFAULTS.max_schema_depth, ge=1, le=100)
    # operation
    drain_seconds: float = Field(60.0, ge=0)
    measure: bool = True
    log_format: Literal["auto", "json", "text"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def limits(self) -> Limits:
        """Those of requests. Of more texts than may run and wait, a request could never be taken."""
        limits = Limits(**{name: getattr(self, name) for name in Limits.__dataclass_fields__})
        most = self.max_running + self.max_waiting
        return replace(limits, max_texts=min(limits.max_texts, most), max_n=min(limits.max_n, most))

    @property
    def step_limits(self) -> StepLimits:
        """Those of the step loop."""
        return StepLimits(**{name: getattr(self, name) for name in StepLimits.__dataclass_fields__})

    @property
    def served_name(self) -> str:
        """By which clients ask: that of the directory or file, also where it is given as `.` or `..`."""
        return self.name or Path(os.path.abspath(Path(self.model).expanduser())).name or "model"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def load_options(flags: Mapping[str, Any], config: Path | None) -> ServeOptions:
    """Flags that were given (None: it was not) over the file's keys over the defaults.

    Raises UserError for a file that cannot be read, a key that does not exist, and a value that is not possible.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    merged = (_read(config) if config is not None else {}) | given
    if "model" not in merged:
        raise UserError("there is no model to serve; name one: `fourfold serve MODEL`")
    try:
        return ServeOptions(**merged)
    except ValidationError as error:
        message, name = explain(error.errors())
        option = str(name).partition("[")[0]
        message = message.removeprefix(f"{name}: ")
        raise UserError(f"{option} cannot be {merged.get(option)!r}: {message}") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid TOML: {error}") from None
    keys: dict[str, Any] = {}
    for name, value in found.items():
        if (key := name.replace("-", "_")) in keys:
            raise UserError(f"{file} sets {key} twice, with - and with _; leave one out")
        keys[key] = value
    if unknown := sorted(set(keys) - set(ServeOptions.model_fields)):
        raise UserError(
            f"{file} has a key {unknown[0]!r}, which is no option of `fourfold serve`; its --help lists them"
        )
    return keys
