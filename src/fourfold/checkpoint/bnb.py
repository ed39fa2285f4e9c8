"""bitsandbytes' 4-bit weights, as Transformers saves them.

A matrix (N, K) named W is `W`, its codes two a byte, the first in the high nibble, row after row; `W.absmax`, a scale
for every `blocksize` of them; `W.quant_map`, the 16 values; and `W.quant_state.bitsandbytes__nf4` (or `__fp4`), bytes
of JSON. Nested scales are bytes themselves: `nested_quant_map[byte] · nested_absmax[of 256] + nested_offset`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourfold.checkpoint.coded import CodedTensor, Parts, block_type, misfit
from fourfold.checkpoint.fields import MAX_ELEMENTS, Fields
from fourfold.checkpoint.source import FileTensor
from fourfold.config import WeightFormat
from fourfold.errors import CheckpointError, UnsupportedError
from fourfold.format import CODEBOOKS, TILE_K

FORMATS: dict[str, WeightFormat] = {"nf4": "nf4", "fp4": "fp4_bnb"}
STATE = ".quant_state.bitsandbytes__"
MAX_STATE_BYTES = 1 << 16
_HARMLESS = """
    bnb_4bit_compute_dtype llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight llm_int8_skip_modules
    llm_int8_threshold"""
_STORAGE = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")  # bytes of codes, whatever they are called


@dataclass(frozen=True)
class CodebookTensor(CodedTensor):
    """Codes of a codebook under a scale for every `run` of them, in the order of the rows, whatever the rows' ends.

    `read_codes(a, b)` gives codes [a, b) of the matrix, uint8 below 16; `read_scales(a, b)` the float32 scales of its
    runs [a, b).
    """

    origin: str
    shape: tuple[int, int]
    codebook: NDArray[np.float32]  # (16,)
    run: int
    read_codes: Callable[[int, int], NDArray[np.uint8]]
    read_scales: Callable[[int, int], NDArray[np.float32]]

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        k = self.shape[1]
        first, last = start * k // self.run, -(-stop * k // self.run)
        scales = np.repeat(self.read_scales(first, last), self.run)[start * k - first * self.run :][
            : (stop - start) * k
        ]
        values: NDArray[np.float32] = self.codebook[self.read_codes(start * k, stop * k)] * scales
        return values.reshape(stop - start, k)

    @cached_property
    def formats(self) -> tuple[WeightFormat, ...]:
        if self.shape[1] % TILE_K or self.run % TILE_K or self.shape[1] % self.run:
            return ()
        return tuple(fmt for fmt, ours in CODEBOOKS.items() if np.array_equal(ours, self.codebook))

    @property
    def fault(self) -> str | None:
        return None if self.formats else misfit(self.run, self.shape[1])

    def blocks(self, fmt: WeightFormat, start: int, stop: int) -> NDArray[Any]:
        assert fmt in self.formats
        k = self.shape[1]
        rows = np.empty(stop - start, block_type(fmt, k))
        rows["codes"] = self.read_codes(start * k, stop * k).reshape(stop - start, k)
        scales = self.read_scales(start * k // self.run, stop * k // self.run)
        rows["scales"] = np.repeat(scales, self.run // TILE_K).reshape(stop - start, k // TILE_K)
        return rows


def read(f: Fields, parts: Parts) -> dict[str, CodedTensor]:
    """The coded matrices, by name. Raises UnsupportedError for LLM.int8 and CheckpointError for what does not fit."""
    f.only("load_in_8bit", False)
    f.only("_load_in_8bit", False)
    f.only("load_in_4bit", True)
    f.only("_load_in_4bit", True)
    f.only("bnb_4bit_quant_type", *FORMATS)
    f.ignore("bnb_4bit_use_double_quant", "bnb_4bit_quant_storage")  # the tensors say it themselves
    f.finish(_HARMLESS.split())
    found: dict[str, CodedTensor] = {}
    for kind in FORMATS:
        for name in parts.modules(STATE + kind):
            found[name] = _matrix(name, kind, parts)
    return found


def _matrix(name: str, kind: str, parts: Parts) -> CodedTensor:
    state = _state(name, kind, parts)
    state.only("quant_type", kind)
    shape, run = state.many("shape", int), state.size("blocksize")
    state.ignore("dtype")  # of what the library computes with
    if len(shape) != 2 or min(shape) < 1 or shape[0] * shape[1] >= MAX_ELEMENTS:
        raise CheckpointError(f"{state.where} has the shape {shape}, which is no matrix's")
    n = shape[0] * shape[1]
    packed = parts.take(name, _STORAGE)
    if packed.n_bytes != -(-n // 2):
        raise CheckpointError(
            f"{parts.where}: tensor {name} has {packed.n_bytes} bytes; codes of {shape} take {-(-n // 2)}"
        )
    values = parts.take(f"{name}.quant_map", ("float32",), (16,)).rows(0, 16)
    if not np.array_equal(values, CODEBOOKS[FORMATS[kind]]):
        raise UnsupportedError(f"{parts.where}: {name}.quant_map holds other values than bitsandbytes' {kind}")

    def codes(start: int, stop: int) -> NDArray[np.uint8]:
        octets = packed.octets(start // 2, -(-stop // 2))
        both = np.empty((len(octets), 2), np.uint8)
        both[:, 0], both[:, 1] = octets >> 4, octets & 15
        return both.reshape(-1)[start % 2 :][: stop - start]

    scales = _scales(name, -(-n // run), parts, state)
    state.finish()
    return CodebookTensor(
        f"bitsandbytes {kind.upper()}", (shape[0], shape[1]), values.astype(np.float32), run, codes, scales
    )


def _scales(name: str, count: int, parts: Parts, state: Fields) -> Any:
    """A function that reads `count` scales, [a, b) of them, as float32."""
    if f"{name}.nested_absmax" not in parts:
        plain = parts.take(f"{name}.absmax", ("float32",), (count,))
        return lambda start, stop: plain.rows(start, stop)
    of, offset = state.size("nested_blocksize"), np.float32(state.number("nested_offset"))
    state.only("nested_dtype", "float32")
    bytes_ = parts.take(f"{name}.absmax", ("uint8",), (count,))
    outer = parts.take(f"{name}.nested_absmax", ("float32",), (-(-count // of),))
    values = parts.take(f"{name}.nested_quant_map", ("float32",), (256,)).rows(0, 256)

    def nested(start: int, stop: int) -> NDArray[np.float32]:
        factors = np.repeat(outer.rows(start // of, -(-stop // of)), of)[start % of :][: stop - start]
        with np.errstate(all="ignore"):  # damaged ones may overflow: who uses them sees that they are not finite
            scales: NDArray[np.float32] = values[bytes_.rows(start, stop)] * factors + offset
        return scales

    return nested


def _state(name: str, kind: str, parts: Parts) -> Fields:
    tensor: FileTensor = parts.take(f"{name}{STATE}{kind}", ("uint8",))
    where = f"{parts.where}, {name}{STATE}{kind},"
    try:
        if tensor.n_bytes > MAX_STATE_BYTES:
            raise ValueError("it is too long")
        values = json.loads(tensor.octets(0, tensor.n_bytes).tobytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not the JSON that bitsandbytes writes") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} is no JSON object")
    return Fields(values, where)
