"""4-bit checkpoints that other libraries wrote, against those libraries' own dequantization, to the bit, and logits.

bitsandbytes through Transformers, compressed-tensors, and GPTQModel for GPTQ and AWQ. The last is skipped where it is
not installed: it asks for a newer torch than its layers need, so it goes in without what it asks for, `pip install
--no-deps gptqmodel==7.7.0 pypcre logbar device-smi tokenicer threadpoolctl defuser datasets pyarrow dill multiprocess
xxhash torchao`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from fourbit_writers import awq_config, compressed_config, gptq_config  # noqa: E402
from fourfold.checkpoint import open_source  # noqa: E402
from fourfold.checkpoint.coded import CodedTensor  # noqa: E402
from fourfold.format import CODEBOOKS  # noqa: E402
from fourfold.llm import LLM  # noqa: E402
from test_fourbit_models import off_by_half_a_step, rms  # noqa: E402

IDS = [5, 77, 123, 299, 0, 41, 7, 7, 260, 18]
Weights = dict[str, NDArray[np.float32]]
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in bfloat16, as Transformers saves it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.08,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("plain")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def logits(path: Path, weights: Weights) -> NDArray[np.float32]:
    """Of Transformers' own model in float32 with these weights in place of its own, where there are any."""
    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, weight in weights.items():
        model.get_parameter(name).data = torch.from_numpy(weight)
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.tensor([IDS])).logits[0].numpy()
    return found


def agrees(path: Path, plain: Path, theirs: Weights, fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are theirs to the bit, and so are codes in `fmt`; logits as near as scales of 8 bits allow.

    See `off_by_half_a_step`.
    """
    with open_source(path) as source:
        coded = {name for name, tensor in source.tensors.items() if isinstance(tensor, CodedTensor)}
        assert coded == theirs.keys()
        for name, weight in theirs.items():
            tensor = source.tensors[name]
            np.testing.assert_array_equal(tensor.rows(0, len(weight)), weight, err_msg=name)
            assert isinstance(tensor, CodedTensor)
            assert tensor.formats[0] == fmt
            np.testing.assert_allclose(values(tensor, fmt), weight, rtol=3e-7, atol=0, err_msg=name)
    exact = logits(plain, theirs)
    limit = max(rms(logits(plain, as_float32(weights)) - exact) for weights in off_by_half_a_step(theirs))
    monkeypatch.setenv("FOURFOLD_CACHE", str(path.parent / "cache"))
    with LLM(path) as llm:
        assert 0 < rms(llm.logits(IDS, step=True) - exact) <= limit


def values(tensor: CodedTensor, fmt: Any) -> NDArray[np.float64]:
    """What the codes that are kept stand for, scales not yet rounded."""
    blocks = tensor.blocks(fmt, 0, tensor.shape[0])
    points = CODEBOOKS[fmt].astype(np.float64)[blocks["codes"]]
    if fmt == "uint4":
        points -= np.repeat(blocks["zeros"], 64, axis=1)
    found: NDArray[np.float64] = points * np.repeat(blocks["scales"], 64, axis=1)
    return found


def as_float32(weights: dict[str, NDArray[Any]]) -> Weights:
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


# ---- bitsandbytes


@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)])
@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes(kind: str, nested: bool, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(path := tmp_path / "quantized")
    theirs: Weights = {}
    for name, parameter in model.named_parameters():
        if state := getattr(parameter, "quant_state", None):
            state.dtype = torch.float32  # not rounded to what the model computes in
            theirs[name] = functional.dequantize_4bit(parameter.data, state).numpy()
    assert len(theirs) == 14
    agrees(path, plain, theirs, "nf4" if kind == "nf4" else "fp4_bnb", monkeypatch)


# ---- the others: each projection of the plain model quantized by the library's own layer


def rewritten(
    plain: Path, path: Path, quantization: dict[str, Any], quantize: Callable[[str, Any], tuple[Tensors, Any]]
) -> Weights:
    """The plain model with its projections quantized: `quantize` (module, weight) gives tensors, and what they say."""
    path.mkdir()
    tensors = load_file(plain / "model.safetensors")
    theirs: Weights = {}
    for name in [name for name in tensors if "_proj." in name]:
        written, weight = quantize(name.removesuffix(".weight"), tensors.pop(name).float())
        theirs[name] = weight.float().numpy()
        tensors |= written
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return theirs


def scales_and_zeros(weight: Any, group: int, symmetric: bool) -> tuple[Any, Any]:
    """Round to nearest: float32 scales, representable in float16, and whole zero points from 0 to 15, (N, K/G) each.

    An asymmetric matrix has both of the outermost: blocks that are all negative, or all positive.
    """
    grouped = weight.reshape(len(weight), -1, group)
    if symmetric:
        scales = grouped.abs().amax(2) / 7.5
        zeros = torch.full_like(scales, 8)
    else:
        grouped[:9] = grouped[:9].abs()
        grouped[9:20] = -grouped[9:20].abs()
        scales = (grouped.amax(2) - grouped.amin(2)) / 15
        zeros = (-grouped.amin(2) / scales).round().clamp(0, 15)
        assert zeros.min() == 0
        assert zeros.max() == 15
    return scales.half().float(), zeros


@pytest.mark.parametrize(("group", "symmetric"), [(128, True), (64, True), (64, False), (None, True), (None, False)])
def test_compressed_tensors(
    group: int | None, symmetric: bool, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(
        num_bits=4, type="int", symmetric=symmetric, group_size=group, strategy="group" if group else "channel"
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)

    def quantize(module: str, weight: Any) -> tuple[Tensors, Any]:
        scales, zeros = scales_and_zeros(weight, group or weight.shape[1], symmetric)
        state = {"weight": weight, "weight_scale": scales}
        if not symmetric:
            state["weight_zero_point"] = (zeros - 8).to(torch.int8)
        compressed = pack.PackedQuantizationCompressor.compress(state, scheme)
        weight = pack.PackedQuantizationCompressor.decompress(compressed, scheme)["weight"]
        return {f"{module}.{name}": tensor for name, tensor in compressed.items()}, weight

    config = compressed_config(group or 128, symmetric)
    config["config_groups"] = {"group_0": scheme.model_dump(mode="json")}
    path = tmp_path / "quantized"
    agrees(path, plain, rewritten(plain, path, config, quantize), "int4" if symmetric else "uint4", monkeypatch)


def gptqmodel(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(f"gptqmodel.{module}", exc_type=ImportError)


def packed(layer: Any, weight: Any, group: int, symmetric: bool) -> Any:
    """One of GPTQModel's layers that holds `weight`, rounded to nearest."""
    scales, zeros = scales_and_zeros(weight, group, symmetric)
    n, k = weight.shape
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight.data = weight
    quantized = layer(bits=4, group_size=group, sym=symmetric, desc_act=False, in_features=k, out_features=n)
    quantized.pack(linear, scales, zeros, torch.arange(k, dtype=torch.int32) // group)
    return quantized


@pytest.mark.parametrize(("group", "symmetric"), [(128, True), (64, True), (64, False), (128, False)])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.filterwarnings("ignore")
def test_gptq(
    group: int, symmetric: bool, version: int, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, saving = gptqmodel("nn_modules.qlinear.torch"), gptqmodel("utils.model")

    def quantize(module: str, weight: Any) -> tuple[Tensors, Any]:
        layer = packed(layers.TorchLinear, weight, group, symmetric)
        layer.post_init()
        layer.scales = layer.scales.float()  # or its products are rounded to float16
        dequantized = layer.dequantize_weight().T
        if version == 1:
            saving.convert_gptq_v2_to_v1_format_module(layer, SimpleNamespace(bits=4, pack_dtype=torch.int32))
        names = ("qweight", "qzeros", "scales", "g_idx")
        return {f"{module}.{name}": getattr(layer, name).clone() for name in names}, dequantized

    path = tmp_path / "quantized"
    config = gptq_config(group, symmetric, version)
    agrees(path, plain, rewritten(plain, path, config, quantize), "int4" if symmetric else "uint4", monkeypatch)


@pytest.mark.parametrize("group", [128, 64])
@pytest.mark.filterwarnings("ignore")
def test_awq(group: int, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, packing = gptqmodel("nn_modules.qlinear.torch_awq"), gptqmodel("quantization.awq.utils.packing_utils")

    def quantize(module: str, weight: Any) -> tuple[Tensors, Any]:
        layer = packed(layers.AwqTorchLinear, weight, group, False)
        dequantized = packing.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, group).T
        return {
            f"{module}.{name}": getattr(layer, name).clone() for name in ("qweight", "qzeros", "scales")
        }, dequantized

    path = tmp_path / "quantized"
    agrees(path, plain, rewritten(plain, path, awq_config(group), quantize), "uint4", monkeypatch)
