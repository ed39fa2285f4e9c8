"""Which of EinsumDense's equations are one matrix product over whole trailing axes, as in attention's projections."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fourfold.errors import UnsupportedError


@dataclass(frozen=True)
class Product:
    """(..., inputs) times the kernel to (..., outputs)."""

    n_inputs: int  # last axes of the input, which are summed over
    n_outputs: int  # last axes of the output, which are the kernel's
    first_output: int  # where the first of those stands in Keras' `output_shape`, which lacks the batch
    order: tuple[int, ...]  # the kernel's axes so that its outputs come first, then its inputs, each as above
    n_axes: int | None = None  # of the whole input; None where it may have any axes before its inputs


def plain_product(equation: str, bias_axes: str | None) -> Product:
    """What an equation such as "abc,cde->abde" says.

    Raises UnsupportedError where an axis is kept that is not the input's first or the output's last, where the kernel
    shares one with both, and where the bias is not one value an output.
    """
    labels = re.fullmatch(r"(\.\.\.)?([a-zA-Z]+),([a-zA-Z]+)->(\.\.\.)?([a-zA-Z]+)", equation.replace(" ", ""))
    refusal = UnsupportedError(f"'{equation}' is not one product over the input's last axes into the output's last")
    if labels is None or labels[1] != labels[4]:
        raise refusal
    x, kernel, y = labels[2], labels[3], labels[5]
    inputs = "".join(axis for axis in x if axis in kernel)
    outputs = "".join(axis for axis in y if axis in kernel)
    kept = x.removesuffix(inputs)
    has_batch = bool(labels[1]) or bool(kept)
    repeats = any(len(set(axes)) < len(axes) for axes in (x, kernel, y))
    if repeats or not has_batch or not inputs or not outputs or x != kept + inputs or y != kept + outputs:
        raise refusal
    if sorted(inputs + outputs) != sorted(kernel):
        raise refusal
    if bias_axes is not None and bias_axes != outputs:
        raise UnsupportedError(f"its bias over the axes '{bias_axes}' of '{equation}' is not one value an output")
    first_output = len(kept) if labels[1] else len(kept) - 1
    order = tuple(kernel.index(axis) for axis in outputs + inputs)
    return Product(len(inputs), len(outputs), first_output, order, None if labels[1] else len(x))
