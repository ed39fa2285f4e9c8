"""Values as JSON that every reader takes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def json_text(value: Any, default: Callable[[Any], str] | None = None) -> str:
    """A value on one line. NaN and infinities, which JSON does not have (RFC 8259, section 6), become null.

    `default` makes text of what JSON has no form for. Raises TypeError without it.
    """
    try:
        return _dumps(value, default)
    except ValueError:  # most have none, and are walked once
        return _dumps(_with_nulls(value), default)


def _dumps(value: Any, default: Callable[[Any], str] | None) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=default)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _with_nulls(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(each) for each in value]
    return value
