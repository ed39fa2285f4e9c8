"""OpenVINO: a matrix of nf4 or i4 codes in groups of 64 with f16 scales, as NNCF compresses weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from orders import pin, serve

THREADS = pin(sys.argv[1])

import numpy as np  # noqa: E402
import openvino as ov  # noqa: E402
from matrices import ROWS, Floats, Rotation, block, copies_for  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from openvino import opset15 as ops  # noqa: E402

GROUP = 64
# QLoRA, arXiv 2305.14314, appendix E
NF4 = np.array(
    [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
     0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0], np.float32,
)  # fmt: skip


class CompiledMatrices:
    """A compiled model for each copy, each with its own packed weights."""

    def __init__(self, format: str, k: int, n: int, rotating_bytes: int) -> None:
        codes, scales = _quantized(format, k)
        codes, scales = np.tile(codes, (n // ROWS, 1, 1)), np.tile(scales, (n // ROWS, 1, 1))
        packed = (codes[..., 0::2] | codes[..., 1::2] * np.uint8(16)).reshape(-1)
        self._kept = packed, scales  # read, not copied, until each model has packed them at its first inference
        self.n_bytes = packed.nbytes + scales.nbytes
        self.n_copies = copies_for(rotating_bytes, self.n_bytes)
        self.path, self.version = f"MatMul of {format} in groups of 64", ov.__version__.split("-")[0]
        core = ov.Core()
        core.set_property("CPU", {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"})
        self._requests = []
        for _ in range(self.n_copies):
            model = _model(format, k, packed, scales)
            self._requests.append(core.compile_model(model, "CPU").create_infer_request())

    def activations(self, x: Floats) -> Any:
        return ov.Tensor(x)

    def multiply(self, copy: int, x: Any) -> Any:
        request = self._requests[copy]
        request.set_input_tensor(x)
        request.infer()
        return request

    def floats(self, y: Any) -> Floats:
        return np.asarray(y.get_output_tensor().data)


def _quantized(format: str, k: int) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Codes (ROWS, K / GROUP, GROUP) and scales (ROWS, K / GROUP, 1) of the repeated rows."""
    groups = block(k).reshape(ROWS, k // GROUP, GROUP)
    if format == "nf4":
        scales = np.abs(groups).max(axis=2, keepdims=True).astype(np.float16)
        return np.searchsorted((NF4[1:] + NF4[:-1]) / 2, groups / scales).astype(np.uint8), scales
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[..., None], axis=2)
    scales = (largest / -8).astype(np.float16)  # the largest becomes -8 exactly: the one code without a mirror
    return (np.clip(np.round(groups / scales), -8, 7).astype(np.int8) & 15).astype(np.uint8), scales


def _model(format: str, k: int, packed: NDArray[np.uint8], scales: NDArray[np.float16]) -> Any:
    n = len(scales)
    type = {"nf4": ov.Type.nf4, "int4": ov.Type.i4}[format]
    codes = ops.constant(ov.Tensor(packed, ov.Shape([n, k // GROUP, GROUP]), type))
    grouped = ops.multiply(ops.convert(codes, "f16"), ops.constant(scales))
    weight = ops.convert(ops.reshape(grouped, ops.constant(np.array([n, k])), False), "f32")
    x = ops.parameter([-1, k], ov.Type.f32)
    return ov.Model([ops.matmul(x, weight, False, True)], [x], "matrix")


def load(subject: Mapping[str, Any]) -> Rotation:
    return Rotation(CompiledMatrices(sys.argv[2], subject["k"], subject["n"], subject["rotating_bytes"]), subject)


serve(load)
