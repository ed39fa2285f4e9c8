"""`FourfoldConfig`: what a user asks for, and what a saved model's config.json says of itself."""

from __future__ import annotations

import re
from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from fourfold.errors import UnsupportedError, UserError
from fourfold.matrix import check_format

METHOD = "fourfold"
GIVEN = "given_config"
AUTO = "auto"
AUTO_HEAD = "int8"


@register_quantization_config(METHOD)
class FourfoldConfig(QuantizationConfigMixin):
    """Quantize the matrices of a model to a weight format of fourfold.

    - `format`: nf4 (default), int4, fp4, uint4, int8, bf16, f32: any that docs/format.md describes.
    - `modules_to_not_convert`: modules that stay as they are, as Transformers names and matches them (a path's
      beginning, its end, or a regular expression). None (default) leaves what is tied to the output head, and the head
      to `head`. A list takes the place of that: with [] the head is quantized like everything else.
    - `head`: the output head's format. "auto" (default) is int8, which is as good as unquantized and read in half the
      time, where there is no list, the format is no finer (bf16, f32), the model only calls its head, and what is tied
      to it can be read from it; else None. With None the head stays as it is, or is treated as the list says. A saved
      model's config says what "auto" became.

    An embedding that is tied to a quantized head is read from it, so that there is one matrix still.

    Raises UserError for an unknown format or key, and for patterns that are none.
    """

    def __init__(
        self,
        format: str = "nf4",
        modules_to_not_convert: list[str] | None = None,
        head: str | None = AUTO,
        *,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise UserError(
                f"a FourfoldConfig has no {', '.join(sorted(unknown))}; it has format, modules_to_not_convert and head"
            )
        if quant_method != METHOD:
            raise UserError(f"a FourfoldConfig's quant_method is {METHOD!r}, not {quant_method!r}")
        self.quant_method = METHOD
        self.format: str = check_format(format)
        self.modules_to_not_convert = _checked(modules_to_not_convert)
        self.head: str | None = head if head in (None, AUTO) else check_format(head)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What Transformers hands from the config that is given for a saved model to the one that was saved."""
        return {GIVEN: self.to_dict()}

    def check_given(self) -> None:
        """Raises UnsupportedError where this is a saved model's config, and another one was given for it."""
        given = self.__dict__.pop(GIVEN, None)
        if given is None:
            return
        saved = self.to_dict()
        if saved["head"] == AUTO:  # its file says nothing of a head, which stayed as it was
            saved["head"] = None
        if given["head"] == AUTO:  # whatever it became
            given = {**given, "head": saved["head"]}
        if different := [f"{key}={saved[key]!r}, not {given[key]!r}" for key in saved if given[key] != saved[key]]:
            raise UnsupportedError(
                f"this model was saved with {'; '.join(different)}: load it without a quantization_config, or quantize "
                "the model that it was made from"
            )

    @property
    def formats(self) -> set[str]:
        """Those that a model has."""
        return {self.format} | ({self.head} if self.head else set())


def _checked(patterns: Any) -> list[str] | None:
    if patterns is None:
        return None
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"modules_to_not_convert must be a list of names, or None; it is {patterns!r}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{pattern!r} in modules_to_not_convert is neither a name nor a regular expression: {error}"
            ) from None
    return list(patterns)


# Those whose `get_loading_attributes` is asked for; Transformers passes other configs by, with a warning.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (FourfoldConfig,)
