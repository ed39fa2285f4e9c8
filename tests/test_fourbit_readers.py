"""Quantized checkpoints of other libraries: their codes and what they stand for, and what is refused, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import fourbit_writers as writers
from fourbit_writers import Written
from fourfold.checkpoint import Source, check_complete, open_source
from fourfold.checkpoint.coded import CodedTensor
from fourfold.errors import CheckpointError, UnsupportedError
from fourfold.format import CODEBOOKS
from fourfold.models import weight_specs

Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
SCHEMES: dict[str, tuple[dict[str, Any], Callable[..., Written], tuple[str, ...]]] = {
    "NF4, nested": (writers.bnb_config(), writers.bnb, ("nf4",)),
    "NF4": (writers.bnb_config("nf4", False), lambda *a: writers.bnb(*a, nested=False), ("nf4",)),
    "NF4, blocks of 128": (writers.bnb_config(), lambda *a: writers.bnb(*a, run=128), ("nf4",)),
    "FP4": (writers.bnb_config("fp4", False), lambda *a: writers.bnb(*a, kind="fp4", nested=False), ("fp4_bnb",)),
    "FP4, nested": (writers.bnb_config("fp4"), lambda *a: writers.bnb(*a, kind="fp4"), ("fp4_bnb",)),
    "GPTQ": (writers.gptq_config(), writers.gptq, ("int4", "uint4", "int8")),
    "GPTQ, groups of 64": (writers.gptq_config(64), lambda *a: writers.gptq(*a, group=64), ("int4", "uint4", "int8")),
    "GPTQ, a last group of fewer inputs": (
        writers.gptq_config(192),
        lambda *a: writers.gptq(*a, group=192),
        ("int4", "uint4", "int8"),
    ),
    "GPTQ, one scale an output": (
        writers.gptq_config(-1),
        lambda *a: writers.gptq(*a, group=1 << 30),
        ("int4", "uint4", "int8"),
    ),
    "GPTQ 2": (writers.gptq_config(version=2), lambda *a: writers.gptq(*a, version=2), ("int4", "uint4", "int8")),
    "GPTQ, zero points of 7": (
        writers.gptq_config(sym=False),
        lambda *a: writers.gptq(*a, zero=7),
        ("int4", "uint4", "int8"),
    ),
    "GPTQ, asymmetric": (writers.gptq_config(sym=False), lambda *a: writers.gptq(*a, zero=None), ("uint4", "int8")),
    "GPTQ 2, asymmetric, one scale an output": (
        writers.gptq_config(-1, sym=False, version=2),
        lambda *a: writers.gptq(*a, group=1 << 30, zero=None, version=2),
        ("uint4", "int8"),
    ),
    "AWQ": (writers.awq_config(), writers.awq, ("uint4", "int8")),
    "AWQ, groups of 64": (writers.awq_config(64), lambda *a: writers.awq(*a, group=64), ("uint4", "int8")),
    "AWQ, symmetric": (
        writers.awq_config() | {"zero_point": False},
        lambda *a: writers.awq(*a, zero=8),
        ("int4", "uint4", "int8"),
    ),
    "AWQ, zero points of 8": (writers.awq_config(), lambda *a: writers.awq(*a, zero=8), ("int4", "uint4", "int8")),
    "compressed-tensors": (writers.compressed_config(), writers.compressed, ("int4", "uint4", "int8")),
    "compressed-tensors, one scale an output": (
        writers.compressed_config(),
        lambda *a: writers.compressed(*a, group=1 << 30),
        ("int4", "uint4", "int8"),
    ),
    "compressed-tensors, groups of 64": (
        writers.compressed_config(64),
        lambda *a: writers.compressed(*a, group=64),
        ("int4", "uint4", "int8"),
    ),
    "compressed-tensors, asymmetric": (
        writers.compressed_config(64, symmetric=False),
        lambda *a: writers.compressed(*a, group=64, zero=None),
        ("uint4", "int8"),
    ),
}


def coded(source: Source, name: str) -> CodedTensor:
    tensor = source.tensors[name]
    assert isinstance(tensor, CodedTensor)
    return tensor


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_what_the_codes_stand_for(scheme: str, tmp_path: Path) -> None:
    quantization, write, formats = SCHEMES[scheme]
    path, meant = writers.checkpoint(tmp_path / "model", quantization, write)
    with open_source(path) as source:
        assert source.tensors.keys() == meant.keys()
        for name in (Q, DOWN):
            tensor = coded(source, name)
            n = tensor.shape[0]
            assert tensor.shape == meant[name].shape
            assert tensor.formats == formats
            assert tensor.fault is None
            for start, stop in ((0, n), (3, 21), (7, 8), (5, 5), (n - 1, n)):
                rows = tensor.rows(start, stop)
                assert rows.dtype == np.float32
                np.testing.assert_array_equal(rows, meant[name][start:stop])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_and_scales_stand_for_the_same(scheme: str, tmp_path: Path) -> None:
    quantization, write, formats = SCHEMES[scheme]
    path, meant = writers.checkpoint(tmp_path / "model", quantization, write)
    with open_source(path) as source:
        for name, fmt in ((name, fmt) for name in (Q, DOWN) for fmt in formats):
            for start, stop in ((0, meant[name].shape[0]), (16, 48), (3, 4)):
                blocks = coded(source, name).blocks(fmt, start, stop)
                points: NDArray[Any] = (
                    blocks["codes"].view(np.int8) / 127 if fmt == "int8" else CODEBOOKS[fmt][blocks["codes"]]
                )
                if fmt == "uint4":
                    points = points - np.repeat(blocks["zeros"], 64, axis=1)
                values = points.astype(np.float64) * np.repeat(blocks["scales"], 64, axis=1)
                np.testing.assert_allclose(values, meant[name][start:stop], rtol=3e-7, atol=0)


def test_bytes_of_codes_may_be_called_another_type(tmp_path: Path) -> None:
    """`bnb_4bit_quant_storage`: for sharded training the bytes go by the name of what the model computes in."""
    path, meant = writers.checkpoint(tmp_path / "model", writers.bnb_config(), writers.bnb)
    tensors = load_file(path / "model.safetensors")
    tensors[Q] = tensors[Q].reshape(-1).view(np.float32)[:, None]
    save_file(tensors, path / "model.safetensors")
    with open_source(path) as source:
        np.testing.assert_array_equal(source.tensors[Q].rows(0, 128), meant[Q])


@pytest.mark.parametrize("shape", [(128, 96), (5, 33)])
def test_blocks_that_run_over_the_ends_of_rows_are_read_but_not_kept(shape: tuple[int, int]) -> None:
    from fourfold.checkpoint.bnb import CodebookTensor

    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, shape[0] * shape[1]).astype(np.uint8)
    scales = rng.uniform(1, 2, -(-codes.size // 64)).astype(np.float32)
    book = CODEBOOKS["nf4"]
    tensor = CodebookTensor("NF4", shape, book, 64, lambda a, b: codes[a:b], lambda a, b: scales[a:b])
    expected = (book[codes] * np.repeat(scales, 64)[: codes.size]).reshape(shape)
    for start, stop in ((0, shape[0]), (1, 4), (2, 2)):
        np.testing.assert_array_equal(tensor.rows(start, stop), expected[start:stop])
    assert tensor.formats == ()
    assert f"64 of its {shape[1]} inputs" in (tensor.fault or "")


def test_groups_of_32_are_read_but_not_kept(tmp_path: Path) -> None:
    path, meant = writers.checkpoint(tmp_path / "model", writers.gptq_config(32), lambda *a: writers.gptq(*a, group=32))
    with open_source(path) as source:
        np.testing.assert_array_equal(source.tensors[Q].rows(0, 128), meant[Q])
        assert coded(source, Q).formats == ()
        assert "one scale for 32 of its 128 inputs" in (coded(source, Q).fault or "")


def test_what_happens_to_fit_int4_is_held_by_it(tmp_path: Path) -> None:
    """Zero points of any kind, but codes that keep to one side of them."""

    def write(module: str, shape: tuple[int, int], seed: int) -> Written:
        tensors, _ = writers.gptq(module, shape, seed, zero=5, group=64)
        codes = np.random.default_rng(seed).integers(0, 13, shape)  # -5 .. 7
        codes[:, 64:128] += 1  # -4 .. 8: mirrored
        scales = np.repeat(tensors[f"{module}.scales"].T.astype(np.float32), 64, axis=1)
        tensors[f"{module}.qweight"] = np.ascontiguousarray(writers.words(codes).T)
        return tensors, (codes - 5).astype(np.float32) * scales

    path, meant = writers.checkpoint(tmp_path / "model", writers.gptq_config(64, sym=False), write)
    with open_source(path) as source:
        tensor = coded(source, Q)
        assert tensor.formats == ("int4", "uint4", "int8")
        blocks = tensor.blocks("int4", 0, 128)
        values = CODEBOOKS["int4"][blocks["codes"]] * np.repeat(blocks["scales"], 64, axis=1)
        np.testing.assert_array_equal(values, meant[Q])
        assert (blocks["scales"] < 0).any()


# ---- what is refused ----------------------------------------------------------------------------


def changed(path: Path, change: Callable[[dict[str, Any], dict[str, NDArray[Any]]], Any]) -> Path:
    """The checkpoint with its quantization_config and its tensors changed."""
    config = json.loads((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    change(config["quantization_config"], tensors)
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


MODULE = Q.removesuffix(".weight")
Change = Callable[[dict[str, Any], dict[str, NDArray[Any]]], Any]
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def state(**values: Any) -> Change:
    """A change of the JSON that goes with a matrix of bitsandbytes."""

    def change(_: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> None:
        fields = json.loads(tensors[STATE].tobytes()) | values
        tensors[STATE] = np.frombuffer(json.dumps(fields).encode(), np.uint8)

    return change


def option(**values: Any) -> Change:
    return lambda q, t: q.update(values)


def option_without(name: str, **values: Any) -> Change:
    return lambda q, t: (q.update(values), t.pop(name))


def of_weights(**values: Any) -> Change:
    """A change of what compressed-tensors' config says of the weights of its one group."""
    return lambda q, t: q["config_groups"]["group_0"]["weights"].update(values)


def tensor(name: str, value: Callable[[NDArray[Any]], NDArray[Any]]) -> Change:
    return lambda q, t: t.update({name: value(t[name])})


def without(name: str) -> Change:
    return lambda q, t: t.pop(name)


REFUSED: list[tuple[str, Change, str]] = [
    ("NF4, nested", option(quant_method="quip"), "quant_method 'quip'; fourfold reads bitsandbytes, gptq"),
    ("NF4, nested", option(quant_method=None), "does not say quant_method"),
    ("NF4, nested", option(load_in_8bit=True), "load_in_8bit"),
    ("NF4, nested", option(bnb_4bit_quant_type="nf3"), "bnb_4bit_quant_type"),
    ("NF4, nested", option(bnb_4bit_blocks="odd"), "bnb_4bit_blocks: fourfold does not know this key"),
    ("NF4, nested", without(f"{Q}.absmax"), "lacks the tensor .*q_proj.weight.absmax"),
    ("NF4, nested", without(f"{Q}.quant_map"), "lacks the tensor .*quant_map"),
    ("NF4, nested", without(STATE), "q_proj.weight.* is U8|holds the tensor .*absmax|q_proj.weight is U8"),
    ("NF4, nested", tensor(Q, lambda t: t[:-1]), "has 8191 bytes; codes of"),
    ("NF4, nested", tensor(f"{Q}.absmax", lambda t: t[:-1]), r"absmax should be uint8 \(256,\)"),
    ("NF4, nested", tensor(f"{Q}.nested_absmax", lambda t: np.append(t, t)), "nested_absmax should be float32"),
    ("NF4, nested", tensor(f"{Q}.nested_quant_map", lambda t: t[:9]), "nested_quant_map should be float32"),
    ("NF4, nested", tensor(f"{Q}.quant_map", lambda t: t * 2), "quant_map holds other values than bitsandbytes' nf4"),
    ("NF4, nested", tensor(STATE, lambda t: t[:-3]), "not the JSON that bitsandbytes writes"),
    ("NF4, nested", tensor(STATE, lambda t: np.full(1 << 17, 32, np.uint8)), "not the JSON that bitsandbytes writes"),
    ("NF4, nested", state(shape=[128, -128]), "is no matrix's"),
    ("NF4, nested", state(shape=[1 << 31, 1 << 31]), "is no matrix's"),
    ("NF4, nested", state(shape=[128]), "is no matrix's"),
    ("NF4, nested", state(shape="large"), "must be a list of int"),
    ("NF4, nested", state(blocksize=0), "blocksize to 0; it must be an integer from 1"),
    ("NF4, nested", state(blocksize=10**30), "blocksize"),
    ("NF4, nested", state(nested_offset=float("nan")), "nested_offset to nan"),
    ("NF4, nested", state(nested_dtype="float16"), "nested_dtype"),
    ("NF4, nested", state(quant_type="fp4"), "quant_type"),
    ("NF4, nested", state(rotation=7), "rotation: fourfold does not know this key"),
    ("GPTQ", option(bits=8), "bits to 8"),
    ("GPTQ", option(checkpoint_format="marlin"), "checkpoint_format to 'marlin'"),
    ("GPTQ", option(group_size=0), "group_size to 0"),
    ("GPTQ", option(group_size=96), "down_proj.scales should be float16"),
    ("AWQ", option(group_size=96), "groups of 96 do not divide evenly"),
    ("GPTQ", option(group_size=2**31), "group_size"),
    ("GPTQ", option(group_size="all"), "group_size"),
    ("GPTQ", option(group_size=64), r"scales should be float16 or bfloat16 or float32 \(4, 128\)"),
    ("GPTQ", option(meta={"quantizer": [7]}), "quantizer to .7.; it must be a string or a list"),
    ("GPTQ", option(meta="gptqmodel"), "meta to 'gptqmodel'; it must be an object"),
    ("GPTQ", option(dynamic={"up_proj": {"bits": 8}}), "dynamic"),
    ("GPTQ", option(rotation="hadamard"), "rotation: fourfold does not know this key"),
    ("GPTQ", tensor(f"{MODULE}.g_idx", lambda t: (t + 1) % 2), "q_proj.g_idx does not deal 128 inputs out to groups"),
    ("GPTQ, groups of 64", tensor(f"{MODULE}.g_idx", lambda t: t - 1), "g_idx does not deal 128 inputs out to groups"),
    ("GPTQ, groups of 64", tensor(f"{MODULE}.g_idx", lambda t: t * 0), "g_idx does not deal 128 inputs out to groups"),
    ("GPTQ", tensor(f"{MODULE}.g_idx", lambda t: t[:-1]), "g_idx should be int32"),
    (
        "GPTQ, groups of 64",
        option_without(f"{MODULE}.g_idx", desc_act=True),
        r"lacks .*q_proj.g_idx, .*\(desc_act\); use",
    ),
    ("GPTQ", option(desc_act="yes"), "desc_act to 'yes'; it must be true or false"),
    ("GPTQ", tensor(f"{MODULE}.qzeros", lambda t: t[:, :-1]), "qzeros should be int32"),
    ("GPTQ", tensor(f"{MODULE}.qweight", lambda t: t[:, :-1]), "is no packed matrix"),
    ("GPTQ", tensor(f"{MODULE}.qweight", lambda t: t.astype(np.int64)), "qweight should be int32"),
    ("GPTQ", without(f"{MODULE}.scales"), "lacks the tensor .*q_proj.scales"),
    ("GPTQ", without(f"{MODULE}.qweight"), "is I32; fourfold reads only"),
    ("AWQ", option(version="gemv"), "version to 'gemv'"),
    ("AWQ", option(zero_point=0), "zero_point to 0; it must be true or false"),
    ("AWQ", option(bits=3), "bits to 3"),
    ("AWQ", tensor(f"{MODULE}.qzeros", lambda t: t[:0]), "qzeros should be int32"),
    ("AWQ", tensor(f"{MODULE}.scales", lambda t: t[:, :-8]), "scales should be"),
    ("compressed-tensors", option(format="nvfp4-pack-quantized"), "format to 'nvfp4-pack-quantized'"),
    (
        "compressed-tensors",
        option(kv_cache_scheme={"num_bits": 8}),
        "kv_cache_scheme: fourfold reads quantized weights",
    ),
    ("compressed-tensors", option(transform_config={"config_groups": {"u": 1}}), "transform_config"),
    ("compressed-tensors", option(config_groups={"g": {"weights": {"num_bits": 8}}}), "num_bits to 8"),
    (
        "compressed-tensors",
        option(config_groups={"g": {"weights": {}, "input_activations": {"num_bits": 8}}}),
        "input_activations: fourfold quantizes weights alone",
    ),
    ("compressed-tensors", tensor(f"{MODULE}.weight_shape", lambda t: t * 2), "weight_packed should be int32"),
    ("compressed-tensors", tensor(f"{MODULE}.weight_shape", lambda t: -t), "is no packed matrix"),
    ("compressed-tensors", tensor(f"{MODULE}.weight_scale", lambda t: t[:-1]), "weight_scale"),
    (
        "compressed-tensors",
        lambda q, t: t.update({f"{MODULE}.weight_g_idx": np.arange(128, dtype=np.int32)[::-1] // 64}),
        "weight_g_idx does not deal 128 inputs out to groups of 128",
    ),
    ("compressed-tensors, groups of 64", of_weights(actorder="group"), r"lacks .*weight_g_idx, .*\(actorder\); use"),
    ("compressed-tensors, groups of 64", of_weights(actorder=True), r"lacks .*weight_g_idx, .*\(actorder\); use"),
    ("compressed-tensors", of_weights(actorder="hessian"), "actorder to 'hessian'"),
    ("compressed-tensors", of_weights(symmetric=False), "lacks the tensor .*weight_zero_point"),
]


@pytest.mark.parametrize(
    ("scheme", "change", "sentence"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_not_read_is_refused_by_name(scheme: str, change: Change, sentence: str, tmp_path: Path) -> None:
    quantization, write, _ = SCHEMES[scheme]
    path, _ = writers.checkpoint(tmp_path / "model", quantization, write)
    with pytest.raises((CheckpointError, UnsupportedError), match=sentence) as refusal:
        open_source(changed(path, change))
    assert "\n" not in str(refusal.value)


SHUFFLED: dict[str, tuple[dict[str, Any], Callable[..., Written]]] = {
    "GPTQ": (
        writers.gptq_config(64, sym=False) | {"desc_act": True},
        lambda *a: writers.gptq(*a, group=64, zero=None, shuffled=True),
    ),
    "GPTQ, a last group of fewer inputs": (
        writers.gptq_config(192) | {"desc_act": True},
        lambda *a: writers.gptq(*a, group=192, shuffled=a[1][1] > 192),
    ),
    "compressed-tensors": (
        writers.compressed_config(64),
        lambda *a: writers.compressed(*a, group=64, shuffled=True),
    ),
}


@pytest.mark.parametrize("scheme", SHUFFLED)
def test_inputs_in_another_order_than_their_groups_have_no_format_that_holds_them(scheme: str, tmp_path: Path) -> None:
    path, meant = writers.checkpoint(tmp_path / "model", *SHUFFLED[scheme])
    with open_source(path) as source:
        tensor = coded(source, DOWN)
        np.testing.assert_array_equal(tensor.rows(3, 21), meant[DOWN][3:21])
        assert tensor.formats == ()
        assert tensor.fault is not None
        assert tensor.fault.startswith("has inputs in another order than that of their groups")


IN_ORDER: list[tuple[str, Change]] = [
    ("GPTQ, groups of 64", lambda q, t: [t.pop(name) for name in list(t) if name.endswith("g_idx")]),
    ("GPTQ, groups of 64", option(desc_act=True)),
    ("GPTQ, groups of 64", option_without(f"{MODULE}.g_idx", desc_act=True, static_groups=True)),
    ("GPTQ, one scale an output", option_without(f"{MODULE}.g_idx", desc_act=True)),
    ("compressed-tensors, groups of 64", of_weights(actorder="weight")),
    ("compressed-tensors, groups of 64", of_weights(actorder="static")),
    ("compressed-tensors, one scale an output", of_weights(actorder="group")),
]


@pytest.mark.parametrize(("scheme", "change"), IN_ORDER)
def test_inputs_in_the_order_of_their_groups_are_read_whatever_the_flags(
    scheme: str, change: Change, tmp_path: Path
) -> None:
    quantization, write, _ = SCHEMES[scheme]
    path, meant = writers.checkpoint(tmp_path / "model", quantization, write)
    with open_source(changed(path, change)) as source:
        np.testing.assert_array_equal(source.tensors[Q].rows(0, 128), meant[Q])


def test_symmetric_weights_of_awq_have_no_other_zero_point_than_8(tmp_path: Path) -> None:
    path, _ = writers.checkpoint(tmp_path / "model", writers.awq_config(), writers.awq)
    says = r"q_proj\.qzeros holds other zero points than 8, and zero_point is false"
    with open_source(changed(path, option(zero_point=False))) as source, pytest.raises(UnsupportedError, match=says):
        source.tensors[Q].rows(0, 128)


@pytest.mark.parametrize("value", [0, 1])
def test_a_bias_that_the_model_does_not_have_may_be_there_if_it_is_zero(value: int, tmp_path: Path) -> None:
    path, meant = writers.checkpoint(tmp_path / "model", writers.gptq_config(), writers.gptq)
    changed(path, lambda q, t: t.update({f"{MODULE}.bias": np.full(128, value, np.float16)}))
    with open_source(path) as source:
        if value == 0:
            assert source.tensors.keys() == meant.keys()
            check_complete(weight_specs(source.config), source)
        else:
            with pytest.raises(CheckpointError, match=r"holds the tensor .*q_proj.bias, which a llama model does not"):
                check_complete(weight_specs(source.config), source)


def test_a_zero_point_that_readers_differ_on_is_refused(tmp_path: Path) -> None:
    """Unless it is known that GPTQModel has written it: the zero points of `GPTQ, asymmetric` go down to 0."""
    config = writers.gptq_config(sym=False) | {"meta": {"quantizer": "autogptq:0.7"}}
    path, _ = writers.checkpoint(tmp_path / "model", config, lambda *a: writers.gptq(*a, zero=None))
    with (
        open_source(path) as source,
        pytest.raises(UnsupportedError, match=r"q_proj.qzeros holds a 15, which some .* gptq_v2"),
    ):
        coded(source, Q).formats  # noqa: B018


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path, _ = writers.checkpoint(tmp_path / "model", writers.gptq_config(), writers.gptq)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a sound safetensors file"):
        open_source(path)


def test_a_config_that_promises_codes_that_are_not_there(tmp_path: Path) -> None:
    path, _ = writers.checkpoint(tmp_path / "model", writers.gptq_config(), lambda *a: None)
    with pytest.raises(CheckpointError, match=r"says gptq, but .* has none of its tensors"):
        open_source(path)


def test_codes_without_a_config_are_refused(tmp_path: Path) -> None:
    path, _ = writers.checkpoint(tmp_path / "model", {}, writers.gptq)
    with pytest.raises(UnsupportedError, match=r"is I32; fourfold reads only F32, F16, BF16 and the codes of a quant"):
        open_source(path)


def test_a_quantized_head_that_is_the_embedding_is_refused(tmp_path: Path) -> None:
    path, _ = writers.checkpoint(tmp_path / "model", writers.gptq_config(), writers.gptq)
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors | writers.gptq("lm_head", (304, 128), 1)[0], path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"quantizes lm_head.weight, though its config.json ties it"):
        open_source(path)
