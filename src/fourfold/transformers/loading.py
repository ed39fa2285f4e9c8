"""What happens to a weight on its way from a checkpoint into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from fourfold.errors import CheckpointError, UserError
from fourfold.format import SCALED
from fourfold.matrix import quantize
from fourfold.torch.linear import Linear
from fourfold.transformers.experts import expert_scales, is_quantized_experts, quantize_experts

FORMAT_SUFFIX = "weight_format"


class Quantize(ConversionOps):  # type: ignore[misc]  # Transformers is not there to be checked
    """Makes of one weight, just read, what a quantized module holds instead of it.

    Transformers reports whatever an operation raises as a trace in a table and goes on. What is the user's to know is
    kept in `failures` instead, for whoever asks when all is read.
    """

    def __init__(self, transposed: set[str], failures: list[str]) -> None:
        """`transposed`: names of the modules whose weights the checkpoint holds as (inputs, outputs)."""
        self._transposed, self._failures = transposed, failures

    def convert(
        self, input_dict: Mapping[str, Any], *args: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        assert model is not None
        made: dict[str, Any] = {}
        for name, value in input_dict.items():
            path, _, parameter = name.rpartition(".")
            module, tensor = model.get_submodule(path), value[0] if isinstance(value, list) else value
            try:
                if isinstance(module, Linear) and parameter == "weight":
                    made |= _parts(path, tensor.T if path in self._transposed else tensor, module.format)
                elif is_quantized_experts(module, parameter):
                    made |= quantize_experts(module, path, parameter, tensor)
                else:
                    made[name] = value
            except UserError as error:
                self._failures.append(f"{name}: {error}")
        return made


def _parts(path: str, weight: Tensor, format: str) -> dict[str, Tensor]:
    quantized = Linear.from_matrix(quantize(weight.detach(), format))
    return {f"{path}.{name}": tensor for name, tensor in quantized.state_dict().items()}


def check_files(files: Sequence[str], format: str, n_modules: int) -> None:
    """Raises CheckpointError where a saved model's files are not of this format, or lack some of it.

    `n_modules` of the model are quantized. They may be fewer than in the files, which then hold a head besides; their
    names may differ, so they are counted.
    """
    names: set[str] = set()
    formats: dict[str, str] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{file} is no safetensors file; fourfold reads its weights from nothing else")
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a mapping
                names.add(name)
                if name.endswith(FORMAT_SUFFIX):
                    formats[name.removesuffix(FORMAT_SUFFIX)] = _text(tensors.get_tensor(name))
    for prefix, found in formats.items():
        if found != format:
            raise CheckpointError(f"config.json says that the weights are {format}; {prefix}weight is {found}")
        if format in SCALED and not any(scales in names for scales in _scales(prefix)):
            raise CheckpointError(f"{prefix}weight is in the checkpoint, and its scales are not")
    if len(formats) < n_modules:
        raise CheckpointError(
            f"the checkpoint holds {len(formats)} matrices in {format}, and the model needs {n_modules} of them"
        )


def _scales(prefix: str) -> list[str]:
    return [f"{prefix}weight_scale", *(prefix + name for name in expert_scales())]


def _text(tensor: Tensor) -> str:
    return bytes(tensor.flatten().to(torch.uint8).tolist()).rstrip(b"\0").decode("ascii", "replace")
