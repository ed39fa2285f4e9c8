"""Products by many matrices in one call, rows of a head, and the way past PyTorch's dispatcher."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest

from fourfold.errors import UserError

torch = pytest.importorskip("torch", reason="torch is not installed: `make frameworks`")
from torch.nn.utils import parametrize, prune  # noqa: E402

from fourfold.torch import Linear, direct  # noqa: E402
from fourfold.torch import grouped as _grouped  # noqa: E402, F401  # defines the operator
from fourfold.torch.embedding import TiedEmbedding  # noqa: E402

K, N, E = 70, 40, 3
FORMATS = ["nf4", "f32"]  # with scales, and without


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def made(format: str, n: int = N, *, bias: bool = True) -> Linear:
    return Linear.from_float(torch.nn.Linear(K, n, bias=bias), format=format).requires_grad_(False)


def stacked(matrices: list[Linear]) -> tuple[Any, ...]:
    """weight, weight_scale, bias, format, out_features, as the operator takes them."""
    scales = None if matrices[0].weight_scale is None else torch.stack([m.weight_scale for m in matrices])
    biases = torch.stack([m.bias for m in matrices])
    return torch.stack([m.weight for m in matrices]), scales, biases, matrices[0].format, N


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 5], [1, 1, 1], [0, 0, 0]])
def test_each_group_is_multiplied_by_its_matrix(format: str, counts: list[int]) -> None:
    matrices = [made(format) for _ in range(E)]
    x = torch.randn(5, K, requires_grad=True)
    y = torch.ops.fourfold.grouped_linear(x, torch.tensor(counts), *stacked(matrices))
    groups = x.split([*counts, 5 - sum(counts)])
    expected = torch.cat([matrix(group) for matrix, group in zip(matrices, groups, strict=False)])
    assert torch.equal(y[: sum(counts)], expected)
    assert not y[sum(counts) :].any()
    y.square().sum().backward()
    grad, x.grad = x.grad, None
    expected.square().sum().backward()
    assert torch.equal(grad, x.grad)


@pytest.mark.parametrize("format", FORMATS)
def test_pytorch_knows_the_operators(format: str) -> None:
    matrices = [made(format) for _ in range(E)]
    x, counts = torch.randn(5, K, requires_grad=True), torch.tensor([2, 0, 3])
    torch.library.opcheck(torch.ops.fourfold.grouped_linear.default, (x, counts, *stacked(matrices)))
    head = matrices[0]
    ids = torch.tensor([[0, 3], [N - 1, 3]])
    args = (ids, head.weight, head.weight_scale, format, N, K)
    torch.library.opcheck(torch.ops.fourfold.rows.default, args)


def test_groups_that_do_not_fit_are_refused() -> None:
    weight, scales, bias, format, n = stacked([made("nf4") for _ in range(E)])
    x = torch.randn(5, K)
    product, counts = torch.ops.fourfold.grouped_linear, torch.tensor([2, 0, 3])
    for wrong in ([2, 0, 4], [-1, 3, 3]):
        with pytest.raises(UserError, match="counts must share out the 5 rows"):
            product(x, torch.tensor(wrong), weight, scales, bias, format, n)
    with pytest.raises(UserError, match="one integer for each of the 3 matrices"):
        product(x, torch.tensor([5]), weight, scales, bias, format, n)
    with pytest.raises(UserError, match=r"a nf4 weight of 40 outputs and 60 inputs is .* uint8 tensor \(3, 3, "):
        product(x[:, :60], counts, weight, scales, bias, format, n)
    with pytest.raises(UserError, match="scales of 40 outputs in nf4 are"):
        product(x, counts, weight, None, bias, format, n)
    with pytest.raises(UserError, match=r"scales of 40 outputs in nf4 are a contiguous uint8 tensor \(3, 3, 4\)"):
        product(x, counts, weight, scales[:, :1], bias, format, n)
    with pytest.raises(UserError, match=r"bias must be floating-point numbers \(3, 40\)"):
        product(x, counts, weight, scales, bias[:, :3], format, n)
    with pytest.raises(UserError, match="x must be rows of float32"):
        product(x.double(), counts, weight, scales, bias, format, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_reads_the_rows_of_its_head(dtype: torch.dtype) -> None:
    head = made("nf4", bias=False)
    embedding = TiedEmbedding(head, dtype)
    assert list(embedding.state_dict()) == []
    assert list(embedding.parameters()) == []
    ids = torch.tensor([[5, 0], [39, 5]])
    assert torch.equal(embedding(ids), head.dequantize()[ids].to(dtype))
    assert embedding(ids[:0]).shape == (0, 2, K)
    for wrong in (-1, N):
        with pytest.raises(UserError, match=r"ids must be in 0\.\.39"):
            embedding(torch.tensor([wrong]))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_past_the_dispatcher_there_are_the_same_bits(
    format: str, bias: bool, dtype: torch.dtype, past: list[bool]
) -> None:
    linear = made(format, bias=bias)
    for shape in ((2, 3, K), (K,), (0, K), (2, 3, K, 2)):
        x = torch.randn(shape).to(dtype)
        if shape[-1] == 2:
            x = x[..., 0]
        expected = linear(x)
        for unobserved in (torch.no_grad(), torch.inference_mode()):
            with unobserved:
                y = linear(x)
            assert past.pop() == (shape[-1] == K)
            assert y.dtype == x.dtype
            assert torch.equal(y, expected)
    assert not past


@torch.no_grad()
def test_whoever_wants_to_see_a_call_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = made("nf4"), torch.randn(2, K)
    monkeypatch.setattr(direct, "_linear", _never)
    with torch.enable_grad():
        assert linear(x.requires_grad_()).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
    with torch.profiler.profile() as profile:
        linear(x)
    assert "fourfold::linear" in {event.key for event in profile.key_averages()}
    assert torch.compile(linear, backend="eager", fullgraph=True)(x).shape == (2, N)
    assert torch.fx.experimental.proxy_tensor.make_fx(linear)(x).graph.find_nodes(
        op="call_function", target=torch.ops.fourfold.linear.default
    )
    with pytest.raises(AssertionError, match="seen"):
        linear(x.detach())


@pytest.fixture
def past(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call that is made past the dispatcher gives a product."""
    made: list[bool] = []
    native = direct._linear

    def noted(*args: Any) -> Any:
        y = native(*args)
        made.append(y is not None)
        return y

    monkeypatch.setattr(direct, "_linear", noted)
    return made


class Own(torch.Tensor):
    """A type that may compute in a way of its own."""


@torch.no_grad()
def test_what_the_table_has_no_words_for_goes_through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = made("nf4"), torch.randn(2, K)
    expected = linear(x)
    assert torch.equal(linear(torch._neg_view(-x)), expected)  # its memory holds -x
    assert type(linear(x.as_subclass(Own))) is Own
    assert torch.equal(linear(x.t().contiguous().t()), expected)
    monkeypatch.setattr(direct, "HAS_TABLE", False)
    assert torch.equal(linear(x), expected)


@torch.no_grad()
def test_a_table_that_is_not_known_leaves_the_one_that_was_lent(past: list[bool]) -> None:
    assert direct.HAS_TABLE
    assert not direct._core.lend_tensors(int, torch.nn.Parameter)
    made("nf4")(torch.randn(2, K))
    assert past == [True]


@torch.no_grad()
@pytest.mark.parametrize("n_axes", [64, 65])
def test_a_product_has_any_number_of_axes(n_axes: int, past: list[bool]) -> None:
    linear, x = made("nf4"), torch.randn(K)
    y = linear(x.reshape([1] * (n_axes - 1) + [K]))
    assert past == [n_axes <= 64]
    assert y.shape == (*[1] * (n_axes - 1), N)
    assert torch.equal(y.flatten(), linear(x))


@torch.no_grad()
def test_zeros_that_are_nowhere_in_memory_are_multiplied() -> None:
    linear = made("nf4")
    assert torch.equal(linear(torch._efficientzerotensor((2, K))), linear(torch.zeros(2, K)))


@torch.no_grad()
def test_a_bias_that_is_computed_is_added() -> None:
    linear, x = made("nf4"), torch.randn(2, K)
    product, bias = linear(x) - linear.bias, linear.bias.clone()
    linear.bias = torch.nn.Parameter(torch._neg_view(-bias), requires_grad=False)
    torch.testing.assert_close(linear(x), product + bias)
    linear.bias, mask = torch.nn.Parameter(bias, requires_grad=False), torch.arange(N) % 2
    pruned = copy.deepcopy(linear)
    prune.custom_from_mask(pruned, "bias", mask)
    torch.testing.assert_close(pruned(x), product + bias * mask)
    parametrize.register_parametrization(linear, "bias", Doubled())
    torch.testing.assert_close(linear(x), product + 2 * bias)


@torch.no_grad()
def test_weights_that_are_computed_are_multiplied_by() -> None:
    linear, x = made("nf4"), torch.randn(2, K)
    expected = linear(x)
    for name in ("weight", "weight_scale"):
        parametrize.register_parametrization(linear, name, torch.nn.Identity())
    assert torch.equal(linear(x), expected)


class Doubled(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return 2 * x


@torch.no_grad()
def test_a_product_past_the_dispatcher_is_a_tensor_like_others_but_for_its_size() -> None:
    linear, x = made("nf4"), torch.randn(2, K)
    y = linear(x)
    assert y.is_contiguous()
    assert not y.requires_grad
    again = copy.deepcopy(y)
    y += 1
    assert torch.equal(y, again + 1)
    with pytest.raises(RuntimeError, match="not resizable"):
        y.resize_(100, 100)
    kept = [linear(x) for _ in range(100)]
    del linear
    gc.collect()
    assert all(torch.equal(one, again) for one in kept)
    with torch.inference_mode():
        assert made("nf4")(x).is_inference()


@torch.no_grad()
def test_what_is_wrong_is_still_refused_past_the_dispatcher() -> None:
    linear = made("nf4")
    with pytest.raises(UserError, match="last axis must be the 70 inputs"):
        linear(torch.randn(2, K + 1))
    with pytest.raises(UserError, match=r"not torch\.float64"):
        linear(torch.randn(2, K).double())
    linear.weight.data = linear.weight.data[:1]
    with pytest.raises(UserError, match="a contiguous uint8 tensor"):
        linear(torch.randn(2, K))


def _never(*args: Any) -> None:
    raise AssertionError("this call was to be seen")
