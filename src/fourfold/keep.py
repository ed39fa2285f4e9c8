"""Which format each matrix of a checkpoint gets, and whether the codes that the checkpoint has for it are kept.

Without a format, an unquantized source becomes nf4. Of a quantized one, codes stay as they are, in the smallest format
that holds them, and what its makers left unquantized (embedding and head, as a rule) becomes bf16. A format that is
asked for is every matrix's: codes that it holds are kept, others are dequantized and quantized anew.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from fourfold.checkpoint.coded import Coded, CodedTensor
from fourfold.config import WeightFormat
from fourfold.errors import UnsupportedError

if TYPE_CHECKING:
    from fourfold.checkpoint import Source
    from fourfold.models import WeightSpec

DEFAULT_FORMAT: WeightFormat = "nf4"
UNQUANTIZED: WeightFormat = "bf16"  # of what a quantized source leaves in 16 or 32 bits


@dataclass(frozen=True)
class Formats:
    """What becomes of each matrix."""

    main: WeightFormat  # of most of the weights
    of: Mapping[str, WeightFormat]  # by the matrix's name
    kept: frozenset[str]  # whose codes are the source's
    origin: str | None  # of the codes: "GPTQ int4"
    notes: tuple[str, ...]  # sentences: what is kept, what is not, and why


def is_coded(source: Source) -> bool:
    """Whether any of its matrices are codes."""
    return any(isinstance(tensor, CodedTensor) for tensor in source.tensors.values())


def choose_formats(specs: Sequence[WeightSpec], source: Source, asked: WeightFormat | None) -> Formats:
    """Of a source that is complete. Raises UnsupportedError for codes that no format holds, where none is asked for."""
    of: dict[str, WeightFormat] = {}
    kept: set[str] = set()
    anew: list[str] = []
    matrices = [spec for spec in specs if spec.is_matrix]
    coded = {spec.name: found for spec in matrices if (found := _coded(spec, source))}
    for spec in matrices:
        tensors = coded.get(spec.name)
        if tensors is None:
            of[spec.name] = asked or (UNQUANTIZED if coded else DEFAULT_FORMAT)
            continue
        holding = _common(tensors)
        if asked is None and not holding:
            raise UnsupportedError(_refusal(spec, source))
        of[spec.name] = asked or holding[0]
        (kept.add if of[spec.name] in holding else anew.append)(spec.name)
    weights: Counter[WeightFormat] = Counter()
    for spec in matrices:
        weights[of[spec.name]] += math.prod(spec.shape) if spec.name in kept or not kept else 0
    origins = sorted({tensor.origin for tensors in coded.values() for tensor in tensors})
    origin = " and ".join(origins) or None
    return Formats(weights.most_common(1)[0][0], of, frozenset(kept), origin, _notes(matrices, of, kept, anew, origin))


def read_blocks(spec: WeightSpec, source: Source, fmt: WeightFormat, start: int, stop: int) -> NDArray[Any]:
    """Rows [start, stop) of a kept matrix, as `coded.block_type`: a recipe that selects rows selects codes, too."""
    tensors = {name: source.tensors[name] for name in spec.rows.names}
    coded = {name: Coded(tensor, fmt) for name, tensor in tensors.items() if isinstance(tensor, CodedTensor)}
    return spec.rows.read(coded, start, stop)


def _coded(spec: WeightSpec, source: Source) -> list[CodedTensor] | None:
    """The tensors of a matrix, where all of them are codes."""
    tensors = [source.tensors[name] for name in spec.rows.names]
    coded = [tensor for tensor in tensors if isinstance(tensor, CodedTensor)]
    return coded if len(coded) == len(tensors) else None


def _common(tensors: Sequence[CodedTensor]) -> list[WeightFormat]:
    return [fmt for fmt in tensors[0].formats if all(fmt in tensor.formats for tensor in tensors)]


def _refusal(spec: WeightSpec, source: Source) -> str:
    for name in spec.rows.names:
        tensor = source.tensors[name]
        if isinstance(tensor, CodedTensor) and tensor.fault:
            return (
                f"{source.path}: {name}, {tensor.origin}, {tensor.fault}; name a format to have it"
                " dequantized and quantized anew (--format int8 loses least)"
            )
    return f"{source.path}: {' and '.join(spec.rows.names)} are codes of two kinds, and make one matrix; name a format"


def _notes(
    matrices: Sequence[WeightSpec], of: Mapping[str, WeightFormat], kept: set[str], anew: list[str], origin: str | None
) -> tuple[str, ...]:
    notes = []
    if kept:
        formats = sorted({of[name] for name in kept})
        rest = sorted({of[spec.name] for spec in matrices if spec.name not in kept})
        n_others = len(matrices) - len(kept)
        others = f"; {'1 other is' if n_others == 1 else f'{n_others} others are'} {' and '.join(rest)}" if rest else ""
        notes.append(f"the {origin} codes of {len(kept)} matrices are kept, as {' and '.join(formats)}{others}")
    if anew:
        notes.append(
            f"the {origin} codes of {_some(anew)} are not kept: dequantized, and quantized anew as {of[anew[0]]}"
        )
    return tuple(notes)


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} matrices ({names[0]} to {names[-1]})"
