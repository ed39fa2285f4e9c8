"""Which modules of a model are matrices that their model only multiplies by."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

PLAIN = {"FalconLinear": "input @ self.weight.T"}  # subclasses of nn.Linear that compute as it does, and their product
READ = (
    r"self\.{0}\.weight(?:\.(?:t|T|type|view|reshape|unsqueeze|clamp)\b| @)"  # the weight's numbers
    r"|(?:@ |_proj_weight=)self\.{0}\.weight\b"
)
READ_TYPE = r"self\.{0}\.weight\.dtype\b"  # to cast inputs to, where nothing below stands beside it
ASKS_FOR_BYTES = ("torch.uint8", "is_floating_point")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear that could be exchanged."""
    kind = type(module)
    return kind is nn.Linear or isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and _is_plain(kind))


def is_read(model: nn.Module, name: str) -> bool:
    """Whether the module that holds `name` has code that uses the weight's numbers or type itself: Mamba's dt_proj."""
    holder, _, own = name.rpartition(".")
    return _reads(type(model.get_submodule(holder)), own)


def _is_plain(kind: Any) -> bool:
    product = PLAIN.get(kind.__name__)
    return product is not None and product in _source(kind)


def _reads(holder: Any, own: str) -> bool:
    for kind in holder.__mro__:
        source = "" if kind in PreTrainedModel.__mro__ else _source(kind)
        if re.search(READ.format(re.escape(own)), source):
            return True
        asks = any(guard in source for guard in ASKS_FOR_BYTES)
        if not asks and re.search(READ_TYPE.format(re.escape(own)), source):
            return True
    return False


@cache
def _source(kind: Any) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made without a file
        return ""
