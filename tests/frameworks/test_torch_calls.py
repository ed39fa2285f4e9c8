"""How fourfold.torch's operators may be called: devices, derivatives, autocast, and inputs that are none."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

import pytest

from fourfold.errors import UnsupportedError, UserError

torch = pytest.importorskip("torch", reason="torch is not installed: `make frameworks`")
from torch.autograd import forward_ad  # noqa: E402

from fourfold.torch import Linear  # noqa: E402
from fourfold.torch import grouped as _grouped  # noqa: E402, F401  # defines the operator
from fourfold.torch.embedding import TiedEmbedding  # noqa: E402

K, N = 70, 40
MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def made(format: str = "f32", *, bias: bool = True) -> Linear:
    return Linear.from_float(torch.nn.Linear(K, N, bias=bias), format=format)


def stack(linear: Linear) -> tuple[Any, ...]:
    """weight, weight_scale, of two matrices, as the grouped operators take them."""
    scale = linear.weight_scale
    return torch.stack([linear.weight] * 2), None if scale is None else torch.stack([scale] * 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", ["nf4", "f32"])
def test_weights_that_have_not_been_read_give_no_product(format: str, mode: Any) -> None:
    unread, ops = Linear(K, N, format=format, device="meta"), torch.ops.fourfold
    weight, scale = unread.weight, unread.weight_scale
    both, scales = stack(unread)
    x, grad, counts = torch.ones(2, K), torch.ones(2, N), torch.tensor([1, 1])
    calls = [
        lambda: unread(x),
        lambda: TiedEmbedding(unread, torch.float32)(torch.tensor([1])),
        lambda: ops.linear_input_grad(grad, weight, scale, format, K),
        lambda: ops.grouped_linear(x, counts, both, scales, None, format, N),
        lambda: ops.grouped_linear_input_grad(grad, counts, both, scales, format, K),
    ]
    for call in calls:
        with (
            mode(),
            pytest.raises(UserError, match=r"one device: .* on cpu.*weight on meta.*; weights on meta have not"),
        ):
            call()
    with mode():
        assert unread(x.to("meta")).shape == (2, N)
        assert unread.dequantize().is_meta
        with pytest.raises(UserError, match="x on meta, weight on cpu"):
            made(format)(x.to("meta"))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's own
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_forward_mode_is_refused(grad_mode: Any) -> None:
    linear, x, counts = made(), torch.randn(2, K), torch.tensor([1, 1])
    with grad_mode(), pytest.raises(UnsupportedError, match="no forward-mode derivative"):
        torch.func.jvp(linear, (x,), (x,))
    both = stack(linear)
    with grad_mode(), forward_ad.dual_level():
        dual, dual_grad = forward_ad.make_dual(x, x), forward_ad.make_dual(x[:, :N], x[:, :N])
        calls = [
            lambda: linear(dual),
            lambda: torch.ops.fourfold.linear_input_grad(dual_grad, linear.weight, None, "f32", K),
            lambda: torch.ops.fourfold.grouped_linear(dual, counts, *both, None, "f32", N),
            lambda: torch.ops.fourfold.grouped_linear_input_grad(dual_grad, counts, *both, "f32", K),
        ]
        for call in calls:
            with pytest.raises(UnsupportedError, match=r"torch\.autograd\.functional\.jvp takes it"):
                call()


@pytest.mark.parametrize("grouped", [False, True])
def test_a_gradient_has_a_gradient(grouped: bool) -> None:
    linear = made(bias=False)
    counts = torch.tensor([2, 1])

    def product(x: Any) -> Any:
        if grouped:
            return torch.ops.fourfold.grouped_linear(x, counts, *stack(linear), None, "f32", N)
        return linear(x)

    def penalty(multiply: Any) -> Any:
        x = torch.linspace(-1, 1, 3 * K).reshape(3, K).requires_grad_()
        (slope,) = torch.autograd.grad(multiply(x).sin().sum(), x, create_graph=True)
        slope.square().sum().backward()
        return x.grad

    weight = linear.dequantize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(penalty(product), penalty(lambda x: x @ weight.T), rtol=1e-4, atol=1e-4)
    x, v = torch.randn(3, K), torch.randn(3, K)
    _, tangent = torch.autograd.functional.jvp(product, (x,), (v,))
    torch.testing.assert_close(tangent, v @ weight.T, rtol=1e-5, atol=1e-5)


def test_autocast_leaves_what_pytorchs_linear_leaves() -> None:
    linear = made()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(2, K, dtype=torch.float16)).dtype == torch.bfloat16
        with pytest.raises(UserError, match=r"not torch\.float64"):
            linear(torch.randn(2, K).double())
        with pytest.raises(UserError, match=r"not torch\.int64"):
            linear(torch.ones(2, K, dtype=torch.int64))


@pytest.mark.parametrize("mode", [*MODES, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_inputs_that_are_none_are_refused(mode: Any) -> None:
    linear = made()
    around: AbstractContextManager[Any] = mode()
    with around:
        with pytest.raises(UserError, match=r"must be the 70 inputs; this input is \(\)"):
            linear(torch.tensor(1.0))
        with pytest.raises(UserError, match="the last axis must be the inputs"):
            torch.ops.fourfold.linear(torch.tensor(1.0), linear.weight, None, None, "f32", N)
        with pytest.raises(UserError, match="casts inputs to the type of the linear's weight, so leave the linear out"):
            linear(torch.randn(2, K).to(linear.weight.dtype))
