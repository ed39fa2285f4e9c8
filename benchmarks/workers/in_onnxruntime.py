"""ONNX Runtime: one MatMulNBits node, int4 in blocks of 64, computing in int8 (accuracy_level 4)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from orders import pin, serve

THREADS = pin(sys.argv[1])

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from matrices import ROWS, Floats, Rotation, block, copies_for  # noqa: E402
from onnxruntime.capi._pybind_state import quantize_matmul_4bits  # noqa: E402

GROUP = 64
onnxruntime.set_global_thread_pool_sizes(THREADS, 1)


class Sessions:
    """A session for each copy, each with its own packed weights."""

    def __init__(self, k: int, n: int, rotating_bytes: int) -> None:
        codes, scales = _quantized(k)
        codes, scales = (np.tile(part, (n // ROWS, 1, 1)[: part.ndim]) for part in (codes, scales))
        self.n_bytes = codes.nbytes + scales.nbytes
        self.n_copies = copies_for(rotating_bytes, self.n_bytes)
        self.path, self.version = "MatMulNBits, groups of 64, int8 products", onnxruntime.__version__
        model = _model(k, n, codes, scales)
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False  # each session's own would go on spinning beside the next one's
        self._sessions = [
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            for _ in range(self.n_copies)
        ]

    def activations(self, x: Floats) -> Floats:
        return x

    def multiply(self, copy: int, x: Floats) -> Any:
        return self._sessions[copy].run(None, {"x": x})[0]

    def floats(self, y: Any) -> Floats:
        return np.asarray(y)


def _quantized(k: int) -> tuple[Any, Any]:
    """Codes (ROWS, K / GROUP, GROUP / 2) and scales (ROWS, K / GROUP) of the repeated rows, symmetric."""
    codes = np.zeros((ROWS, k // GROUP, GROUP // 2), np.uint8)
    scales = np.zeros((ROWS, k // GROUP), np.float32)
    zeros = np.zeros((ROWS, (k // GROUP + 1) // 2), np.uint8)
    rows = np.ascontiguousarray(block(k).T)  # (K, N), as the operator's weight is given
    quantize_matmul_4bits(codes, rows, scales, zeros, GROUP, ROWS, k, True)
    return codes, scales


def _model(k: int, n: int, codes: Any, scales: Any) -> bytes:
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=GROUP,
        accuracy_level=4,
    )  # fmt: skip
    graph = onnx.helper.make_graph(
        [node],
        "matrix",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["m", k])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["m", n])],
        [onnx.numpy_helper.from_array(codes, "w"), onnx.numpy_helper.from_array(scales, "s")],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    return bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def load(subject: Mapping[str, Any]) -> Rotation:
    return Rotation(Sessions(subject["k"], subject["n"], subject["rotating_bytes"]), subject)


serve(load)
