"""fourfold.torch inside PyTorch: its compiler, its autograd, its threads, its files."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fourfold
from fourfold.config import FORMATS
from fourfold.errors import UserError

torch = pytest.importorskip("torch", reason="torch is not installed: `make frameworks`")
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

from fourfold.torch import Linear, quantize_  # noqa: E402
from fourfold.torch import linear as linear_module  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def float_linear(k: int = 100, n: int = 50, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(k, n, bias=bias)


def dequantized(linear: Linear) -> nn.Linear:
    """nn.Linear over the values that `linear` multiplies by."""
    plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    plain.weight.data = linear.dequantize()
    if linear.bias is not None:
        plain.bias.data = linear.bias.data.float()
    return plain


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_linear_of_arrays(fmt: str, dtype: torch.dtype) -> None:
    plain = float_linear().to(dtype)
    made = Linear.from_float(plain, format=fmt)
    matrix = fourfold.quantize(plain.weight.detach(), fmt)  # through DLPack
    assert torch.equal(made.dequantize(), torch.from_numpy(matrix.dequantize()))
    for shape in ((100,), (1, 100), (3, 40, 100), (0, 100), (2, 0, 100)):
        x = torch.randn(shape, dtype=dtype)
        y = made(x)
        assert y.dtype == dtype
        assert y.shape == (*shape[:-1], 50)
        expected = fourfold.linear(x, matrix, plain.bias.detach())
        assert np.array_equal(y.detach().float().numpy(), expected.astype(np.float32))


def test_rows_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = fourfold.torch.ops._core.matmul

    def matmul(*args: Any) -> None:
        seen.append(args[5])
        real(*args)

    monkeypatch.setattr(fourfold.torch.ops._core, "matmul", matmul)
    made, x = Linear.from_float(float_linear()), torch.randn(4, 3, 100)  # few rows: all numbers of them by one kernel
    expected = made(x)
    assert torch.equal(made(x[:, -1]), expected[:, -1])  # rows apart: the last token of each text
    assert torch.equal(made(x.transpose(0, 1)), expected.transpose(0, 1))
    assert seen[:2] == [x.data_ptr(), x[:, -1].data_ptr()]
    assert torch.equal(made(x[:1, :1].expand(3, 2, 100)), expected[:1, :1].expand(3, 2, 50))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", ["nf4", "bf16"])
def test_the_operators_keep_the_dispatchers_rules(fmt: str, dtype: torch.dtype) -> None:
    made = Linear.from_float(float_linear().to(dtype), format=fmt)
    x = torch.randn(3, 100, dtype=dtype, requires_grad=True)
    arguments = (x, made.weight, made.weight_scale, made.bias, fmt, 50)
    torch.library.opcheck(torch.ops.fourfold.linear.default, arguments)
    grad = torch.randn(3, 50, dtype=dtype)
    torch.library.opcheck(
        torch.ops.fourfold.linear_input_grad.default, (grad, made.weight, made.weight_scale, fmt, 100)
    )
    torch.library.opcheck(torch.ops.fourfold.dequantize.default, (made.weight, made.weight_scale, fmt, 50, 100))


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(100, 64), nn.GELU(), nn.Linear(64, 50, bias=False))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # the compiler's own
def test_compile_and_export() -> None:
    model, x = quantize_(small_model()), torch.randn(5, 100)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x[:3]), model(x[:3]))
    rows = torch.export.Dim("rows", min=1, max=100)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    again = exported.module()
    assert torch.equal(again(x[:2]), model(x[:2]))


def test_gradients_reach_the_input_and_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fourfold.torch.ops, "GRAD_ROWS_BYTES", 4 * 100 * 17)  # some rows at a time
    made = Linear.from_float(float_linear())
    x = torch.randn(3, 4, 100, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    plain = dequantized(made)
    upstream = torch.randn(3, 4, 50)
    made(x).backward(upstream)
    plain(other).backward(upstream)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.bias.grad, plain.bias.grad)
    assert made.weight.grad is None


def test_an_adapter_on_top_trains() -> None:
    base = quantize_(small_model())
    before = [p.detach().clone() for p in base.parameters()]
    for p in base.parameters():
        p.requires_grad_(False)
    down, up = nn.Linear(100, 4, bias=False), nn.Linear(4, 100, bias=False)
    nn.init.zeros_(up.weight)
    x, target = torch.randn(64, 100), torch.randn(64, 50)
    optimizer = torch.optim.Adam([*down.parameters(), *up.parameters()], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (base(x + up(down(x))) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, base.parameters(), strict=True))


def test_inference_mode_and_autocast() -> None:
    model, x = quantize_(small_model()), torch.randn(5, 100)
    with torch.inference_mode():
        assert torch.equal(model(x), model(x.clone()))
    with torch.autocast("cpu", torch.bfloat16):
        y = model[0](x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.ops.fourfold.linear(
        x.bfloat16(), model[0].weight, model[0].weight_scale, model[0].bias.bfloat16(), "nf4", 64
    ))  # fmt: skip


def test_no_cast_of_the_model_reaches_a_weight() -> None:
    model = quantize_(small_model())
    expected = model[0].dequantize()
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float, copy.deepcopy):
        model = change(model)
        assert torch.equal(model[0].dequantize(), expected)
    assert model.half()(torch.randn(2, 100).half()).dtype == torch.float16


@pytest.mark.parametrize("fmt", FORMATS)
def test_state_dicts_go_through_safetensors(fmt: str, tmp_path: Path) -> None:
    model, x = quantize_(small_model(), fmt), torch.randn(5, 100)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    empty = nn.Sequential(Linear(100, 64, format=fmt), nn.GELU(), Linear(64, 50, bias=False, format=fmt))
    state = load_file(tmp_path / "model.safetensors")
    empty.load_state_dict(state)
    assert torch.equal(empty(x), model(x))
    on_meta = nn.Sequential(Linear(100, 64, format=fmt, device="meta"), nn.GELU())
    on_meta.load_state_dict({k: v for k, v in state.items() if k.startswith("0.")}, assign=True)
    assert torch.equal(on_meta[0](x), model[0](x))


def test_weights_are_never_read_as_another_formats() -> None:
    state = Linear.from_float(float_linear(), format="int4").state_dict()
    with pytest.raises(UserError, match="this linear is nf4, and its weights are int4"):
        Linear(100, 50).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        Linear(200, 50, format="int4").load_state_dict(state)


def test_one_linear_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    weights = [weakref.ref(linear.weight) for linear in model]
    alive = []
    real = Linear.from_float.__func__

    def from_float(cls: type[Linear], linear: nn.Linear, **options: Any) -> Linear:
        gc.collect()
        alive.append(sum(weight() is not None for weight in weights))
        return real(cls, linear, **options)

    monkeypatch.setattr(linear_module.Linear, "from_float", classmethod(from_float))
    quantize_(model)
    assert alive == [5, 4, 3, 2, 1]


def test_what_is_exchanged() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 64)
            self.first = nn.Linear(64, 64)
            self.again = self.first
            self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(64, 64)})])
            self.attention = nn.MultiheadAttention(64, 2)
            self.head = nn.Linear(64, 50, bias=False)
            self.head.weight = self.embed.weight

    model = Model()
    embedding = model.embed.weight
    names = []
    assert quantize_(model, "int8", choose=lambda name, _: names.append(name) or name != "blocks.0.up") is model
    assert sorted(names) == ["again", "blocks.0.up", "first", "head"]
    assert type(model.first) is Linear
    assert model.first is model.again
    assert type(model.blocks[0]["up"]) is nn.Linear
    assert not isinstance(model.attention.out_proj, Linear)  # its parent reads its weight
    assert model.embed.weight is embedding
    assert "format=int8" in repr(model.head)


def test_our_own_are_left_as_they_are() -> None:
    model = quantize_(small_model())
    linears = [model[0], model[2]]
    quantize_(model, "int8")
    assert [model[0], model[2]] == linears


THREADS = """
import os, torch
import fourfold.torch
made = fourfold.torch.Linear.from_float(torch.nn.Linear(2048, 2048))
x = torch.randn(200, 2048)
tasks = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
torch.mm(torch.randn(500, 500), torch.randn(500, 500)) + torch.randn(2000, 2000).add(1).sum()
before = tasks()
first = made(x)
assert fourfold.torch.ops.HAS_TORCH_THREADS
assert tasks() == before, (before, tasks())  # PyTorch's threads were there already: none are added
torch.set_num_threads(1)
assert torch.equal(made(x), first)
"""


def test_it_computes_with_pytorchs_threads() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_without_its_openmp_our_own_threads_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = Linear.from_float(nn.Linear(512, 512)), torch.randn(100, 512)
    expected = made(x)
    monkeypatch.setattr(fourfold.torch.ops, "HAS_TORCH_THREADS", False)
    assert torch.equal(made(x), expected)


LAYER = Linear.from_float(nn.Linear(100, 50))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: LAYER(torch.randn(3, 99)), UserError, r"must be the 100 inputs; this input is \(3, 99\)"),
        (lambda: LAYER(torch.ones(3, 100, dtype=torch.int64)), UserError, "not torch.int64"),
        (lambda: LAYER(torch.randn(3, 100).double()), UserError, "not torch.float64"),
        (lambda: Linear(100, 50, format="nf5"), UserError, "there is no format 'nf5'"),
        (lambda: Linear(0, 50), UserError, "needs inputs and outputs"),
        (lambda: quantize_(nn.Linear(4, 4)), UserError, "use Linear.from_float"),
        (lambda: quantize_(small_model(), "q4"), UserError, "there is no format 'q4'"),
        (lambda: quantize_(nn.Sequential(nn.Linear(4, 4, device="meta"))), UserError, "0 of Sequential: .* on meta"),
        (
            lambda: torch.ops.fourfold.linear(torch.randn(3, 100), LAYER.weight, None, None, "nf4", 50),
            UserError,
            r"scales of 50 outputs in nf4 are a contiguous uint8 tensor \(4, 4\)",
        ),
        (
            lambda: torch.ops.fourfold.linear(
                torch.randn(3, 100), LAYER.weight, LAYER.weight_scale, torch.zeros(3), "nf4", 50
            ),
            UserError,
            r"one value for each of the 50 outputs; it is \(3,\)",
        ),
    ],
)
def test_what_is_wrong_is_said(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = small_model()
    model[2].weight.data[3, 4] = float("nan")
    with pytest.raises(UserError, match="2 of Sequential: weights must be finite numbers: row 3 holds NaN"):
        quantize_(model)


def test_a_missing_torch_is_named() -> None:
    script = "import sys; sys.modules['torch'] = None\nimport fourfold.torch"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "MissingExtra: fourfold.torch needs PyTorch; install it with `pip install 'fourfold[torch]'`" in done.stderr
