"""Who is compared, at which versions, and which worker speaks for whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["matrix", "model"]


@dataclass(frozen=True)
class Environment:
    """A virtual environment: what pip is asked for, and what pip's own environment gets; {HERE} is this folder."""

    name: str
    requirements: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    minutes: float = 20  # that setting it up may take


@dataclass(frozen=True)
class Peer:
    """One bar of the chart. `workers`: what it can be asked, and the script and arguments that do it."""

    name: str
    title: str
    environment: Environment | None  # None: the one that this runs in, which has fourfold
    workers: Mapping[Kind, tuple[str, ...]]
    note: str  # what its figures are of, for the report


_LLAMA = Environment(
    "llama",
    ("llama-cpp-python==0.3.36",),
    {
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS='-include {HERE}/tile_config.h'",
        "SKBUILD_BUILD_TARGETS": "llama;llama-common",  # all that it installs, and none of its tools
    },
    minutes=120,
)
_TORCH = Environment(
    "torch", ("torch==2.13.0", "bitsandbytes==0.50.2", "transformers==5.23.0", "accelerate==1.15.0", "gguf==0.19.0")
)
_OPENVINO = Environment("openvino", ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "numpy==2.4.6"))
_ONNXRUNTIME = Environment("onnxruntime", ("onnxruntime==1.31.1", "onnx==1.23.2", "numpy==2.4.6"))

FOURFOLD = Peer(
    "fourfold",
    "fourfold NF4",
    None,
    {"matrix": ("in_fourfold.py",), "model": ("in_fourfold.py",)},
    "the classes that `fourfold bench` measures; head and embedding in NF4 too",
)
PEERS = (
    FOURFOLD,
    Peer(
        "llama.cpp",
        "llama.cpp Q4",
        _LLAMA,
        {"model": ("in_llama.py",)},
        "compiled for this machine by its own compiler; SmolLM2's published Q4_1 file, Q4_0 for the random model",
    ),
    Peer(
        "bitsandbytes",
        "bitsandbytes NF4",
        _TORCH,
        {"matrix": ("in_torch.py", "nf4"), "model": ("in_torch.py", "nf4")},
        "`Linear4bit` with nested scales, which it un-nests for its CPU kernel; that of the wheel, another would be "
        "downloaded at run time; models are those of transformers, eager, the head in NF4 too",
    ),
    Peer(
        "pytorch",
        "PyTorch int4",
        _TORCH,
        {"matrix": ("in_torch.py", "int4"), "model": ("in_torch.py", "int4")},
        "its own int4 product, which torchao's weight-only int4 calls on CPUs; models as for bitsandbytes",
    ),
    Peer(
        "openvino",
        "OpenVINO int4",
        _OPENVINO,
        {"matrix": ("in_openvino.py", "int4"), "model": ("in_openvino_genai.py",)},
        "a matrix as NNCF would compress it, a model as OpenVINO GenAI reads it from the GGUF file of llama.cpp; its "
        "defaults, by which activations become int8",
    ),
    Peer(
        "openvino-nf4",
        "OpenVINO NF4",
        _OPENVINO,
        {"matrix": ("in_openvino.py", "nf4")},
        "the same with NF4 codes; one f16 scale for 64 inputs",
    ),
    Peer(
        "onnxruntime",
        "ONNX Runtime int4",
        _ONNXRUNTIME,
        {"matrix": ("in_onnxruntime.py",)},
        "`MatMulNBits` with accuracy_level 4, by which activations become int8",
    ),
)
