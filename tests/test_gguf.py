"""GGUF files: every quantization read by rows, the bundled model right, damaged files refused in a sentence."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from fourfold.checkpoint import Source, check_complete, open_source
from fourfold.checkpoint.gguf_file import QuantizedTensor
from fourfold.checkpoint.gguf_header import read_header
from fourfold.checkpoint.source import SourceFile
from fourfold.config import RopeScaling
from fourfold.errors import CheckpointError, UnsupportedError
from fourfold.models import weight_specs
from reference import forward

REFUSALS = (CheckpointError, UnsupportedError)
CANNOT_DEQUANTIZE = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K", "Q1_0"}
QUANTIZED = [kind for kind in GGMLQuantizationType if kind.name not in {"F32", "F16", "BF16", *CANNOT_DEQUANTIZE}]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sound file."""
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf").read_bytes()


def write(path: Path, config: dict[str, Any] = tiny.CONFIG, **options: Any) -> Path:
    return tiny.write_gguf(path, config, tiny.tensors(config), **options)


def whole(source: Source) -> tiny.Tensors:
    return {name: tensor.rows(0, tensor.shape[0]) for name, tensor in source.tensors.items()}


def complete(source: Source) -> None:
    check_complete(weight_specs(source.config), source)


# ---- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.QWEN2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_the_same_model_as_its_hugging_face_directory(tmp_path: Path, config: dict[str, Any], kind: str) -> None:
    weights = tiny.tensors(config)
    path = write(tmp_path / "model.gguf", config, kind=GGMLQuantizationType[kind])
    directory = tiny.write_huggingface(tmp_path / "model", config, weights)
    with open_source(path) as source, open_source(directory) as theirs:
        assert source.config == theirs.config
        assert source.tensors.keys() == theirs.tensors.keys()
        complete(source)
        for name, weight in weights.items():
            read = source.tensors[name].rows(0, len(weight)).astype(np.float32)
            tolerance = {"F32": 0.0, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 2e-2}[kind]
            np.testing.assert_allclose(read, weight, atol=tolerance, rtol=tolerance)
            np.testing.assert_array_equal(source.tensors[name].rows(5, 31).astype(np.float32), read[5:31])


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_every_quantization_is_read_by_rows(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(3)
    packed = rng.integers(0, 0x38, (40, 2 * block_bytes), dtype=np.uint8)  # no byte of a scale makes it infinite
    file = tmp_path / "rows.bin"
    file.write_bytes(bytes(7) + packed.tobytes())
    expected = gguf.quants.dequantize(packed, kind)
    tensor = QuantizedTensor(SourceFile(file), 7, kind, expected.shape)
    assert tensor.shape == (40, 2 * block)
    for start, stop in ((0, 40), (0, 1), (17, 35), (39, 40), (8, 8)):
        rows = tensor.rows(start, stop)
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, expected[start:stop])
    vector = QuantizedTensor(SourceFile(file), 7, kind, (40 * 2 * block,))
    np.testing.assert_array_equal(vector.rows(3, 3 + block), expected.ravel()[3 : 3 + block])


def test_the_header_says_what_the_gguf_package_reads(smollm2: Path) -> None:
    theirs = gguf.GGUFReader(smollm2)
    file = SourceFile(smollm2)
    header = read_header(file)
    assert list(header.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = header.tensors[tensor.name]
        assert (info.offset, info.n_bytes, info.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
    for name, field in theirs.fields.items():
        assert name.startswith("GGUF.") or header.metadata[name] == field.contents()


def test_smollm2_logits(shared: Path, smollm2: Path) -> None:
    with open_source(smollm2) as source:
        complete(source)
        logits = forward(source.config, whole(source), np.load(shared / "smollm2" / "ref_ids.npy").ravel())
    expected = np.load(shared / "smollm2" / "ref_logits.npy").reshape(logits.shape)
    np.testing.assert_array_equal(logits.argmax(axis=1), expected.argmax(axis=1))
    assert np.sqrt(np.mean((logits - expected) ** 2) / np.mean(expected**2)) < 1e-5


def test_smollm2_configuration(smollm2: Path) -> None:
    config = open_source(smollm2).config
    assert (config.n_layers, config.dim, config.n_heads, config.n_kv_heads, config.hidden_dim) == (30, 576, 9, 3, 1536)
    assert (config.vocab_size, config.max_context, config.rope_theta, config.norm_eps) == (49152, 8192, 1e5, 1e-5)
    assert config.tie_embeddings
    assert config.eos_ids == (2,)


def divisors(factor: float, head_dim: int = 16, theta: float = 10000.0) -> np.ndarray:
    """What llama.cpp's converter stores for Llama 3: one branch for each band of wavelengths."""
    result = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            result.append(1.0)
        elif wavelength > 8192 / 1:
            result.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)


def test_llama3s_scaling_is_recognised(tmp_path: Path) -> None:
    for factor, expected in ((8.0, RopeScaling(8.0, 1.0, 4.0, 8192)), (1.0, None)):
        weights = tiny.tensors(tiny.CONFIG) | {"rope_freqs.weight": divisors(factor)}
        with open_source(tiny.write_gguf(tmp_path / "model.gguf", tiny.CONFIG, weights)) as source:
            assert source.config.rope_scaling == expected
            complete(source)


@pytest.mark.parametrize(
    ("stored", "error", "named"),
    [
        (divisors(8.0)[::-1].copy(), UnsupportedError, r"rope_freqs\.weight.*not Llama 3's"),
        (np.full(8, np.nan, np.float32), UnsupportedError, r"rope_freqs\.weight"),
        (np.full(8, np.inf, np.float32), UnsupportedError, r"rope_freqs\.weight"),
        (np.ones(9, np.float32), CheckpointError, r"rope_freqs\.weight should have shape \(8,\)"),
    ],
)
def test_other_scaling_is_refused(tmp_path: Path, stored: np.ndarray, error: type[Exception], named: str) -> None:
    weights = tiny.tensors(tiny.CONFIG) | {"rope_freqs.weight": stored}
    with pytest.raises(error, match=named):
        open_source(tiny.write_gguf(tmp_path / "model.gguf", tiny.CONFIG, weights))


# ---- what is refused by name ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"general.architecture": "mamba"}, "'mamba'"),
        ({"general.type": "adapter"}, r"general\.type"),
        ({"split.count": 3}, r"split\.count"),
        ({"llama.expert_count": 8}, "expert_count"),
        ({"llama.rope.scaling.type": "yarn"}, r"rope\.scaling\.type to 'yarn'"),
        ({"llama.rope.scale_linear": 4.0}, r"rope\.scale_linear"),
        ({"llama.rope.dimension_count": 8}, r"rope\.dimension_count to 8"),
        ({"llama.attention.value_length": 8}, r"attention\.value_length"),
        (
            {"general.architecture": "mistral3"},
            "architecture 'mistral3' is not supported in GGUF; fourfold reads llama",
        ),
        ({"general.architecture": "clip"}, "'clip'"),
        ({"general.type": "mmproj"}, r"general\.type to 'mmproj'"),
        ({"llama.logit_scale": 2.0}, "logit_scale"),
        ({"tokenizer.ggml.pre": "klingon"}, "pre-tokenizer 'klingon'"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer 't5'"),
        ({"tokenizer.ggml.normalizer": "x"}, "normalizer"),
    ],
)
def test_unsupported_metadata(tmp_path: Path, metadata: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        open_source(write(tmp_path / "model.gguf", metadata=metadata))


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"llama.block_count": None}, r"does not say block_count"),
        ({"llama.block_count": "two"}, r"block_count to 'two'"),
        ({"llama.block_count": 2**31}, r"block_count"),
        ({"llama.block_count": 20_000}, r"20000 layers"),
        ({"llama.attention.head_count": [4, 4]}, r"attention\.head_count"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon"),
        ({"llama.vocab_size": 301}, "vocab_size is 301"),
        ({"general.alignment": 48}, r"general\.alignment"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "2 tokens, but 264 types"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "same token twice"),
        ({"tokenizer.ggml.token_type": [9] * 264}, "unknown type 9"),
        ({"tokenizer.ggml.tokens": [f"t{i}" for i in range(301)], "tokenizer.ggml.token_type": None}, "only 300"),
        ({"tokenizer.ggml.tokens": 5}, r"tokens to 5"),
        ({"tokenizer.ggml.merges": ["nowhere to be_found"]}, "contradicts itself"),
        ({"tokenizer.ggml.merges": ["h"]}, "contradicts itself"),
        ({"tokenizer.ggml.merges": None}, "does not say merges"),
        ({"tokenizer.ggml.pre": None}, "does not say pre"),
        ({"tokenizer.ggml.eos_token_id": 299}, "eos_token_id to 299"),
        ({"tokenizer.ggml.eos_token_id": 300}, "token 300"),
        ({"tokenizer.ggml.model": "llama"}, "without a finite score"),
    ],
)
def test_contradictory_metadata(tmp_path: Path, metadata: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        open_source(write(tmp_path / "model.gguf", metadata=metadata))


@pytest.mark.parametrize("name", sorted(CANNOT_DEQUANTIZE))
def test_types_without_dequantization_are_named(tmp_path: Path, name: str) -> None:
    kind = GGMLQuantizationType[name]
    path = hostile(tmp_path, [("odd.weight", [256], int(kind), 0)], bytes(4096))
    with pytest.raises(UnsupportedError, match=rf"odd\.weight is {name}"):
        open_source(path)


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    weights = tiny.tensors(tiny.CONFIG)
    for change, named in (
        ({"blk.0.attn_q.bias": np.zeros(64, np.float32)}, "model.layers.0.self_attn.q_proj.bias"),
        ({"blk.0.ffn_gate.scale": np.zeros(1, np.float32)}, "blk.0.ffn_gate.scale"),
        ({"blk.7.ffn_norm.weight": np.zeros(64, np.float32)}, "model.layers.7.post_attention_layernorm.weight"),
    ):
        path = tiny.write_gguf(tmp_path / "model.gguf", tiny.CONFIG, weights | change)
        with pytest.raises(CheckpointError, match=f"holds the tensor {named}"):
            complete(open_source(path))
    del weights["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.1\.mlp\.down_proj\.weight"):
        complete(open_source(tiny.write_gguf(tmp_path / "model.gguf", tiny.CONFIG, weights)))
    del weights["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=r"lacks the tensor token_embd\.weight"):
        open_source(tiny.write_gguf(tmp_path / "model.gguf", tiny.CONFIG, weights))


# ---- hostile files -------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def hostile(
    folder: Path,
    tensors: list[tuple[str, list[int], int, int]],
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    keys: bytes | None = None,
) -> Path:
    """A file whose header may say anything: tensors are (name, dimensions, type, offset), `keys` are raw."""
    keys = text("general.architecture") + struct.pack("<I", 8) + text("llama") if keys is None else keys
    header = magic + struct.pack("<IQQ", version, len(tensors) if n_tensors is None else n_tensors, n_keys or 1) + keys
    for name, dims, kind, offset in tensors:
        header += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    path = folder / "hostile.gguf"
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ([("far", [32], 0, 2**40)], "truncated: tensor far reaches past its end"),
        ([("wraps", [32], 0, 2**64 - 32)], "tensor wraps reaches past"),
        ([("one", [32], 0, 0), ("two", [32], 0, 64)], "one and two overlap"),
        ([("one", [32], 0, 0), ("one", [32], 0, 128)], "holds the tensor one twice"),
        ([("odd", [4], 0, 3)], "odd does not start at a multiple of 32"),
        ([("vast", [10**6, 10**6], 0, 0)], "vast has dimensions"),
        ([("overflow", [2**32, 2**32], 0, 0)], "overflow has dimensions"),
        ([("overflow", [2**63, 2], 0, 0)], "overflow has dimensions"),
        ([("nothing", [0, 32], 0, 0)], "nothing has dimensions"),
        ([("flat", [], 0, 0)], "flat has dimensions"),
        ([("deep", [1] * 5, 0, 0)], "5 dimensions of deep"),
        ([("ragged", [33], 3, 0)], "ragged.*not whole Q4_1 blocks of 32"),
        ([("large", [2**20, 2**10], 0, 0)], "tensor large reaches past its end"),
    ],
)
def test_tensors_that_lie(tmp_path: Path, tensors: list[tuple[str, list[int], int, int]], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        open_source(hostile(tmp_path, tensors, bytes(256)))


def test_an_unknown_quantization_is_named(tmp_path: Path) -> None:
    for kind in (4, 99, 2**32 - 1):
        with pytest.raises(UnsupportedError, match=f"tensor new has the unknown quantization type {kind}"):
            open_source(hostile(tmp_path, [("new", [32], kind, 0)], bytes(256)))


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"magic": b"FUGG"}, CheckpointError, "is no GGUF file; of other models give the directory"),
        ({"version": 1}, UnsupportedError, "GGUF version 1"),
        ({"version": 4}, UnsupportedError, "GGUF version 4"),
        ({"version": 3 << 24}, UnsupportedError, "big-endian"),
        ({"n_tensors": 2**64 - 1}, CheckpointError, "claims 18446744073709551615 tensors"),
        ({"n_tensors": 2**20}, CheckpointError, "tensor  has dimensions"),
        ({"n_keys": 2**63}, CheckpointError, "claims 9223372036854775808 keys"),
        ({"n_keys": 60_000}, CheckpointError, "truncated"),
        ({"keys": struct.pack("<Q", 2**63) + b"abc"}, CheckpointError, "truncated"),
        ({"keys": text("k") + struct.pack("<I", 77)}, CheckpointError, "k has the unknown type 77"),
        ({"keys": text("k") + struct.pack("<IIQ", 9, 8, 2**62)}, CheckpointError, "items in k"),
        ({"keys": text("k") + struct.pack("<IIQ", 9, 10, 2**24)}, CheckpointError, "truncated"),
        ({"keys": text("k") + struct.pack("<IIQ", 9, 9, 1)}, UnsupportedError, "array of arrays in k"),
        ({"keys": text("\x1b[2J") + struct.pack("<II", 4, 0)}, CheckpointError, r"cannot be printed, '\\x1b\[2J'"),
        ({"keys": struct.pack("<Q", 2) + b"\xff\xfe"}, CheckpointError, "not UTF-8"),
        ({"keys": 2 * (text("k") + struct.pack("<II", 4, 0)), "n_keys": 2}, CheckpointError, "the key k twice"),
        ({"keys": text("k") + struct.pack("<II", 4, 0)}, CheckpointError, r"does not say general\.architecture"),
    ],
)
def test_headers_that_lie(tmp_path: Path, options: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        open_source(hostile(tmp_path, [("token_embd.weight", [8, 4], 0, 0)], bytes(256), **options))


def test_truncated_anywhere(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "short.gguf"
    header = len(content) - sum(weight.nbytes for weight in tiny.tensors(tiny.CONFIG).values())
    for length in {*range(4, 64), *range(64, header, 53), *range(header, len(content), 9973), len(content) - 64}:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            open_source(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_never_surprise(tmp_path: Path, content: bytes, data: st.DataObject) -> None:
    header = len(content) - sum(weight.nbytes for weight in tiny.tensors(tiny.CONFIG).values())
    changed = bytearray(content)
    for at in data.draw(st.lists(st.integers(4, header + 64), min_size=1, max_size=4)):
        changed[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "flipped.gguf"
    path.write_bytes(changed)
    said = ""
    try:
        with open_source(path) as source:
            complete(source)
            whole(source)
    except REFUSALS as refusal:
        said = str(refusal)
    assert "\n" not in said


def test_damaged_scales_read_without_a_warning(tmp_path: Path) -> None:
    for kind in QUANTIZED:
        file = tmp_path / "bad.bin"
        file.write_bytes(b"\xff\x7c" * GGML_QUANT_SIZES[kind][1])
        QuantizedTensor(SourceFile(file), 0, kind, (2, GGML_QUANT_SIZES[kind][0])).rows(0, 2)
