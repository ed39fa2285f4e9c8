"""What a model has around its linears stays what it was when `quantize_` exchanges them."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest

from fourfold.errors import UserError

torch = pytest.importorskip("torch", reason="torch is not installed: `make frameworks`")
from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

from fourfold.torch import Linear, quantize_  # noqa: E402

K, N = 64, 48


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def scaled(linear: nn.Linear) -> list[Any]:
    """Hooks of every kind, each of which changes what a call gives; their handles."""
    return [
        linear.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        linear.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True),
        linear.register_forward_hook(lambda module, args, y: y * 3, always_call=True),
        linear.register_forward_hook(lambda module, args, kwargs, y: y - 5, with_kwargs=True),
        linear.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 7,)),
        linear.register_full_backward_hook(lambda module, to_x, to_y: (to_x[0] + 11,)),
    ]


def both_ways(model: nn.Module) -> tuple[Any, Any]:
    x = torch.linspace(-1, 1, 2 * K).reshape(2, K).requires_grad_()
    y = model(x)
    y.sum().backward()
    return y.detach(), x.grad


def test_hooks_of_calls_stay_and_can_be_removed() -> None:
    model = nn.Sequential(nn.Linear(K, N))
    bare = both_ways(model)
    handles = scaled(model[0])
    hooked = both_ways(model)
    torch.testing.assert_close(both_ways(quantize_(model, "f32")), hooked)
    assert not torch.equal(hooked[0], bare[0])
    with torch.no_grad():
        torch.testing.assert_close(model(torch.linspace(-1, 1, 2 * K).reshape(2, K)), hooked[0])
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(both_ways(model), bare)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
        lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
        lambda linear: prune.l1_unstructured(linear, "bias", 0.5),
        lambda linear: prune.l1_unstructured(prune.random_unstructured(linear, "weight", 0.2), "weight", 0.5),
    ],
)
def test_a_weight_that_hooks_compute_is_computed_once(wrap: Any) -> None:
    plain = wrap(nn.Linear(K, N)).eval()
    plain.register_forward_hook(lambda module, args, y: y * 3)
    with torch.no_grad():
        for parameter in plain.parameters():  # as a checkpoint is read: `weight` is computed anew when it is called
            parameter.mul_(1.5)
    model = quantize_(nn.Sequential(plain), "f32")
    assert not model[0]._forward_pre_hooks
    x = torch.randn(2, K)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)  # u and v are random: weights are large
    assert torch.equal(model[0].dequantize(), plain.weight.detach())


def test_a_linear_is_left_with_its_hooks() -> None:
    plain = nn.utils.spectral_norm(nn.Linear(K, N))
    made = Linear.from_float(plain.eval(), format="f32")
    assert len(plain._forward_pre_hooks) == 1
    assert not made._forward_pre_hooks
    torch.testing.assert_close(made(torch.ones(1, K)), plain(torch.ones(1, K)))


def test_a_replaced_forward_is_refused_by_name() -> None:
    model = nn.ModuleDict({"up": nn.Linear(K, N)})
    model["up"].forward = types.MethodType(lambda self, x: x * 0, model["up"])
    with pytest.raises(UserError, match=r"up of ModuleDict: its forward was replaced .*: take that off first"):
        quantize_(model)
    assert type(quantize_(model, choose=lambda name, _: name != "up")["up"]) is nn.Linear


def test_float64_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(K, N)).double()
    with pytest.raises(UserError, match="0 of Sequential: products of float64 are not quantized"):
        quantize_(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("whole", [True, False])
def test_pytorchs_encoder_calls_the_linears(mode: Any, whole: bool) -> None:
    layer = nn.TransformerEncoderLayer(K, 4, 2 * K, batch_first=True)
    model = (nn.TransformerEncoder(layer, 2) if whole else layer).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x, padding = torch.randn(2, 5, K), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected, padded = model(x), model(x, src_key_padding_mask=padding)
    quantize_(model, "f32")
    first = model.layers[0] if whole else model
    assert type(first.linear1) is Linear
    assert not isinstance(first.self_attn.out_proj, Linear)
    with mode():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            model(x, src_key_padding_mask=padding)[~padding], padded[~padding], rtol=1e-4, atol=1e-5
        )
        assert copy.deepcopy(model)(x).shape == x.shape
