"""The quantizer: how Transformers loads, saves and restores a model whose matrices are in fourfold's formats."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from fourfold.errors import CheckpointError, UnsupportedError, UserError
from fourfold.format import SCALED
from fourfold.torch.embedding import TiedEmbedding
from fourfold.torch.linear import Linear
from fourfold.torch.ops import NUMBER_TYPES
from fourfold.transformers.choosing import is_linear, is_read
from fourfold.transformers.config import AUTO, AUTO_HEAD, METHOD, FourfoldConfig
from fourfold.transformers.experts import (
    are_experts,
    check_choice,
    dequantize_experts,
    is_quantized_experts,
    leave_experts,
    prepare_experts,
)
from fourfold.transformers.loading import READ, Quantize, check_all_read, check_files

WORTH_SAYING = 1 << 20  # numbers in a matrix that is left as it is

RESIZE = "resize_token_embeddings"

log = logging.getLogger("fourfold.transformers")


@register_quantizer(METHOD)
class FourfoldQuantizer(HfQuantizer):
    """Exchanges the linears of a model (GPT-2's Conv1D too) and its experts, before its weights are read.

    Weights are quantized one after another as they are read; of a mixture's layer all experts are read at once. A head
    that shares its weight with an embedding is quantized last, from it. Large matrices that are left as they are,
    though nobody asked for that, are named in a warning of the logger `fourfold.transformers`.

    Everything lies in CPU memory. Raises UserError (UnsupportedError, CheckpointError) for another device or dtype, for
    `modules_to_not_convert` that names nothing, for weights that are not finite, and for files that are damaged or in
    another format than their config says.
    """

    requires_calibration = False
    is_qat_trainable = False
    is_compileable = True
    is_trainable = True
    quantization_config: FourfoldConfig

    def __init__(self, quantization_config: FourfoldConfig, **kwargs: Any) -> None:
        quantization_config.check_given()
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._transposed: set[str] = set()  # modules whose weights are read as (inputs, outputs)
        self._tied: list[str] = []  # modules to be quantized when their weights have been read
        self._failures: list[str] = []
        self._head = ""  # the output head's name, where it has a format of its own

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        devices = device_map.values() if isinstance(device_map, Mapping) else ()
        for device in devices:
            if torch.device(device if device != "disk" else "meta").type != "cpu":
                raise UnsupportedError(f"fourfold computes on the CPU, from memory; device_map says {device}")

    def update_device_map(self, device_map: Any) -> Any:
        return {"": "cpu"} if isinstance(device_map, str) else device_map  # "auto" and its like

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in NUMBER_TYPES:
            raise UnsupportedError(f"fourfold's linears take float32, float16 and bfloat16, not {dtype}")
        return dtype

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self._transposed, self._failures)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        if self.pre_quantized:
            return False
        path, _, tensor = param_name.rpartition(".")
        module = model.get_submodule(path)
        return (isinstance(module, Linear) and tensor == "weight") or is_quantized_experts(module, tensor)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        given = self.quantization_config.modules_to_not_convert
        names = [name for name, _ in model.named_modules()]
        for pattern in [] if self.pre_quantized else given or []:
            if all(should_convert_module(name, [pattern]) for name in names):
                raise UserError(f"{pattern!r} in modules_to_not_convert is no module of {type(model).__name__}")
        kept = self.get_modules_to_not_convert(model, given, model._keep_in_fp32_modules)
        is_auto = self.quantization_config.head == AUTO
        if is_auto:
            self.quantization_config.head = AUTO_HEAD if given is None and self._may_take_head(model) else None
        if self.quantization_config.head is not None and not self._is_headless(model):
            self._head = _head_of(model)
            kept = [name for name in kept if name != self._head]
            if not should_convert_module(self._head, given or []):
                raise UserError(f"{self._head} is to be left by modules_to_not_convert, and quantized by head")
            if is_read(model, self._head):
                raise UnsupportedError(
                    f"{type(model).__name__} uses {self._head}.weight itself, so {self._head} must stay as it is"
                )
        found = self._exchange(model, kept) + self._exchange_experts(model, kept)
        only_head = all(model.get_submodule(name) is model.get_output_embeddings() for name in found)
        if not found or (is_auto and only_head):
            known = ", ".join([*sorted({*kept, *found}), *_left(model, kept, found, 1)])
            raise UserError(f"{type(model).__name__} has no matrix to quantize beside {known}")
        if self.pre_quantized and checkpoint_files:
            check_files(checkpoint_files, self.quantization_config.formats)
        if not self.pre_quantized:
            worth_saying = 1 if only_head else WORTH_SAYING
            if left := _left(model, kept, self._tied, worth_saying):
                which = ", ".join(left)
                log.warning("left as they are, for fourfold does not know how they are computed with: %s", which)

    def _may_take_head(self, model: PreTrainedModel) -> bool:
        """Whether a head in int8 is no coarser than the rest, and takes the place of all that it is tied to."""
        if self.pre_quantized or self.quantization_config.format not in SCALED:
            return False
        if model.get_output_embeddings() is None:
            return False
        name = _head_of(model)
        others = _sharing(model, name) - {name}
        return (
            is_linear(model.get_submodule(name))
            and not any(is_read(model, shared) for shared in (name, *others))
            and all(type(model.get_submodule(other)) is nn.Embedding for other in others)
        )

    def _is_headless(self, model: PreTrainedModel) -> bool:
        """Whether this is the body of a saved model, which does without the head that was saved.

        Raises UnsupportedError where the embedding is in the head.
        """
        if not self.pre_quantized or model.get_output_embeddings() is not None:
            return False
        if model.config.get_text_config().tie_word_embeddings:
            raise UnsupportedError(
                f"{type(model).__name__} has no output head, and this model's embedding was saved as its head: "
                "quantize the model that it was made from with head=None"
            )
        return True

    def _exchange(self, model: PreTrainedModel, kept: list[str]) -> list[str]:
        """Puts empty quantized modules in their places; the names of these, and of those that will be."""
        found = []
        dtype = model.dtype
        for name, module in list(model.named_modules()):
            if not should_convert_module(name, kept):
                continue
            if is_linear(module) and not is_read(model, name):
                if not self.pre_quantized and len(_sharing(model, name)) > 1:
                    self._tied.append(name)
                else:
                    _put(model, name, self._empty(name, module), dtype)
                found.append(name)
        return found

    def _exchange_experts(self, model: PreTrainedModel, kept: list[str]) -> list[str]:
        experts = {name: module for name, module in model.named_modules() if are_experts(module)}
        taken = {name for name in experts if should_convert_module(name, kept)}
        default = model.get_correct_experts_implementation(None)
        for name, module in experts.items() if taken else ():
            check_choice(module, default)
            if name in taken:
                prepare_experts(module, self.quantization_config.format, default)
                setattr(module, READ, True)
            else:
                leave_experts(module, default)
        return sorted(taken)

    def _empty(self, name: str, module: nn.Module) -> Linear:
        transposed = isinstance(module, Conv1D)
        n, k = reversed(module.weight.shape) if transposed else module.weight.shape
        if transposed:
            self._transposed.add(name)
        bias = module.bias
        dtype = None if bias is None else bias.dtype
        empty = Linear(k, n, bias is not None, "meta", dtype, format=self._format(name))
        setattr(empty, READ, True)
        return empty

    def _format(self, name: str) -> str:
        config = self.quantization_config
        format: str = config.head if config.head is not None and name == self._head else config.format
        return format

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        conversions = super().update_weight_conversions(weight_conversions, model)
        return _sparing(conversions, model) if self.pre_quantized else conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._failures:
            raise CheckpointError("; ".join(self._failures[:3]))
        check_all_read(model)
        for name in self._tied:
            head = Linear.from_float(model.get_submodule(name), format=self._format(name))
            head.bias = None if head.bias is None else nn.Parameter(head.bias.detach().clone(), requires_grad=False)
            _put(model, name, head, model.dtype)
        for part in _parts_of(model):
            if isinstance(part.get_output_embeddings(), Linear) or isinstance(_embedding_of(part), TiedEmbedding):
                vars(part)[RESIZE] = _refuse_to_resize
        # What a saved model's tensors were read from is not theirs any more: they are saved as they lie.
        model._weight_conversions = _sparing(model._weight_conversions, model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        for part in _parts_of(model):
            vars(part).pop(RESIZE, None)
        weights: dict[Linear, nn.Parameter] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear):
                plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                plain.weight = weights[module] = nn.Parameter(module.dequantize().to(wanted), requires_grad=False)
                plain.bias = module.bias
                model.set_submodule(name, plain.train(module.training))
            elif is_quantized_experts(module, "down_proj"):
                dequantize_experts(module, wanted)
        for name, module in list(model.named_modules()):
            if isinstance(module, TiedEmbedding):
                embedding = nn.Embedding(*weights[module.head].shape, device="meta")
                embedding.weight = weights[module.head]
                model.set_submodule(name, embedding.train(module.training))
        _tie_again(model)
        return model


def _parts_of(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


def _embedding_of(model: PreTrainedModel) -> nn.Module | None:
    with suppress(NotImplementedError):  # images have none
        return model.get_input_embeddings()
    return None


def _refuse_to_resize(*_: Any, **__: Any) -> nn.Embedding:
    raise UnsupportedError(
        "a quantized head, and an embedding that is read from it, cannot be resized; quantize the model with "
        "FourfoldConfig(head=None), or dequantize() it first"
    )


def _head_of(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            return str(name)
    raise UserError(f"{type(model).__name__} has no output head to be quantized")


def _sharing(model: PreTrainedModel, name: str) -> set[str]:
    """The modules whose weights are that of the module of this name, itself included."""
    own, ties = f"{name}.weight", model.all_tied_weights_keys
    source = ties.get(own, own)
    return {module.rpartition(".")[0] for module in (own, source, *(a for a, b in ties.items() if b == source))}


def _put(model: PreTrainedModel, name: str, linear: Linear, dtype: torch.dtype) -> None:
    """Puts a quantized linear in its place, and lets plain embeddings that share its weight read from it."""
    for other in sorted(_sharing(model, name) - {name}):
        if type(model.get_submodule(other)) is nn.Embedding:
            _untie(model, other)
            model.set_submodule(other, TiedEmbedding(linear, dtype))
    _untie(model, name)
    model.set_submodule(name, linear)


def _untie(model: PreTrainedModel, name: str) -> None:
    """The module's tensors are nobody else's any more, and Transformers knows it."""
    prefix = f"{name}."
    for path, part in model.named_modules():
        if not isinstance(part, PreTrainedModel):
            continue
        within = prefix.removeprefix(f"{path}.") if path else prefix
        ties = part.get_expanded_tied_weights_keys()
        if any(key.startswith(within) for pair in ties.items() for key in pair):
            part._tied_weights_keys = _without(ties, within)
    model.all_tied_weights_keys = _without(model.all_tied_weights_keys, prefix)


def _tie_again(model: PreTrainedModel) -> None:
    """Transformers knows again of the tensors that are one after all."""
    for part in _parts_of(model):
        if vars(part).pop("_tied_weights_keys", None) is not None:
            tensors, ties = dict(part.named_parameters(remove_duplicate=False)), part.get_expanded_tied_weights_keys()
            part._tied_weights_keys = {a: b for a, b in ties.items() if tensors[a] is tensors[b]}
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _without(ties: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {a: b for a, b in ties.items() if not a.startswith(prefix) and not b.startswith(prefix)}


def _sparing(conversions: list[Any], model: nn.Module) -> list[Any]:
    """Those that do not reshape a quantized tensor, on its way in or, reversed, out."""
    names = [
        f"{path}.{tensor}"
        for path, module in model.named_modules()
        for tensor, _ in module.named_parameters(recurse=False)
        if (isinstance(module, Linear) and tensor == "weight") or is_quantized_experts(module, tensor)
    ]
    return [
        conversion
        for conversion in conversions
        if not isinstance(conversion, WeightConverter) or not any(_touches(conversion, name) for name in names)
    ]


def _touches(conversion: Any, name: str) -> bool:
    ways = [conversion]
    with suppress(NotImplementedError):  # one that is never undone
        ways.append(conversion.reverse_transform())
    return any(copy.copy(way).rename_source_key(name)[1] is not None for way in ways)


def _left(model: nn.Module, kept: list[str], waiting: Sequence[str], size: int) -> list[str]:
    """Matrices of this many numbers that nobody wanted to be left: names, of all layers at once, with their classes."""
    left: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) or path in waiting or not should_convert_module(path, kept):
            continue
        for name, tensor in module.named_parameters(recurse=False):
            if tensor.is_floating_point() and tensor.dim() > 1 and tensor.numel() >= size:
                left[re.sub(r"(?<=\.)\d+(?=\.)", "*", f"{path}.{name}")] = type(module).__name__
    return [f"{name} ({kind})" for name, kind in left.items()]
