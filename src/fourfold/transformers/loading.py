"""What happens to a weight on its way from a checkpoint into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from fourfold.errors import CheckpointError, UserError
from fourfold.matrix import quantize
from fourfold.torch.linear import Linear
from fourfold.transformers.experts import experts_format, is_quantized_experts, quantize_experts

FORMAT_SUFFIX = "weight_format"
READ = "_is_hf_initialized"  # what Transformers marks tensors with that it has read, and modules that need no more


class Quantize(ConversionOps):
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


def check_files(files: Sequence[str], formats: set[str]) -> None:
    """Raises CheckpointError where a saved model's files are not what its config says."""
    for file in files:
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{file} is no safetensors file; fourfold's weights are kept in nothing else")
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a mapping
                if name.endswith(FORMAT_SUFFIX) and (found := _text(tensors.get_tensor(name))) not in formats:
                    raise _disagree(name.removesuffix(FORMAT_SUFFIX), " or ".join(sorted(formats)), found)


def check_all_read(model: nn.Module) -> None:
    """Raises CheckpointError where a tensor of a quantized module was in no file, or is of another format.

    Transformers gives such tensors random numbers, with a warning, but can do that to floating-point numbers only.
    """
    for path, module in model.named_modules():
        if not (isinstance(module, Linear) or is_quantized_experts(module, "down_proj")):
            continue
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for name, tensor in tensors.items():
            if not getattr(tensor, READ, False):
                raise CheckpointError(f"{path}.{name} is not in the checkpoint, so {path} cannot be computed with")
        format = module.format if isinstance(module, Linear) else experts_format(module)
        if (found := _text(module.weight_format)) != format:
            raise _disagree(f"{path}.", format, found)


def _disagree(prefix: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(f"config.json says that the weights are {expected}, and {prefix}weight is {found}")


def _text(tensor: Tensor) -> str:
    return bytes(tensor.flatten().to(torch.uint8).tolist()).rstrip(b"\0").decode("ascii", "replace")
