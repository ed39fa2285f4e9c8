"""fourfold.deepspeed: two processes as DeepSpeed's users start them, against one process.

The processes run once, for all tests (deepspeed_worker.py). Three things are compared with them: the model whole, in
its own numbers, within what rounding explains; DeepSpeed's own layers; and, to the bit, one process that holds the
shards of both, since a matrix that is quantized after it was cut has other scales than one quantized before.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: `make frameworks`")
pytest.importorskip("deepspeed", reason="deepspeed is not installed: `make frameworks`")
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from deepspeed_cases import CASES, GOLDEN, MODELS, PLAIN_LLAMA, PROMPTS, SAVED, built, logits  # noqa: E402

from fourfold.checkpoint import check_complete, open_source  # noqa: E402
from fourfold.deepspeed.convolution import TapConv2d  # noqa: E402
from fourfold.errors import UnsupportedError, UserError  # noqa: E402
from fourfold.models import weight_specs  # noqa: E402
from fourfold.torch import Linear, quantize_  # noqa: E402

Case = tuple[str, str, str]
TIMEOUT = 400  # seconds: 20 here, and the first time DeepSpeed compiles its shared-memory sums
EXACT = [case for case in CASES if case[2] != "nf4"]
QUANTIZED = [case for case in CASES if case[2] == "nf4"]
CUT_BY_INPUTS = ("o_proj", "down_proj", "lm_head", "dense", "dense_4h_to_h", "embed_out")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which two processes, started as a user starts them, left what they found."""
    directory = tmp_path_factory.mktemp("deepspeed")
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
    bound = ["--bind_cores_to_rank"] if shutil.which("numactl") and len(os.sched_getaffinity(0)) >= 2 else []
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # DeepSpeed compiles with ninja
    process = subprocess.Popen(
        [*launcher, *bound, Path(__file__).parent / "deepspeed_worker.py", directory],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PATH": path} | ({} if bound else {"OMP_NUM_THREADS": "1"}),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        left = [p.pid for p in psutil.process_iter() if session(p) == process.pid and p.pid != process.pid]
        for pid in (*left, *([process.pid] if process.poll() is None else [])):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, output[-4000:]
    assert not left
    return directory


@pytest.fixture(scope="module")
def reports(written: Path) -> list[dict[str, Any]]:
    return [torch.load(written / f"{rank}.pt") for rank in range(2)]


def session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


# ---- the model whole, in one process


def rounded(model: nn.Module, unit: float) -> Callable[[], None]:
    """Puts a random rounding error on what every module of `model` computes; the function returned ends that.

    Of a linear, each of two partial sums and their sum are rounded to the model's type, after K products that were
    added in float32; of anything else its result.
    """

    def off(y: Tensor, by: Tensor) -> Tensor:
        return y + by * (2 * torch.rand_like(y) - 1)

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(module, nn.Linear):
            x, w, half = inputs[0], module.weight, module.in_features // 2
            parts = (x[..., :half] @ w[:, :half].T).abs() + (x[..., half:] @ w[:, half:].T).abs()
            sums = (x.abs() @ w.abs().T) * module.in_features**0.5 * 2.0**-24
            first = off(first, unit * (parts + first.abs()) + sums)
        else:
            first = off(first, unit * first.abs())
        return (first, *output[1:]) if isinstance(output, tuple) else first

    computing = [m for m in model.modules() if not isinstance(m, nn.ModuleList | nn.Embedding) and m is not model]
    handles = [module.register_forward_hook(hook) for module in computing if not is_wrapper(module)]
    return lambda: [handle.remove() for handle in handles]  # type: ignore[func-returns-value]


def is_wrapper(module: nn.Module) -> bool:
    """Those that only pass their last module's result on, and rotary angles, which are tables."""
    return type(module).__name__.endswith(("Model", "RotaryEmbedding", "MLP"))


@cache
def tolerance(build: Callable[[], nn.Module], dtype: torch.dtype, n: int) -> float:
    """Four times the most that rounding errors moved a logit in eight draws: both sides have them, eight are few."""
    model, unit = build().to(dtype).float(), torch.finfo(dtype).eps / 2
    exact = logits(model, n)
    torch.manual_seed(2)
    stop = rounded(model, unit)
    most = max(float((logits(model, n) - exact).abs().max()) for _ in range(8))
    stop()
    assert 4 * most < exact.std() / 2, "nothing could fail"
    return 4 * most


@pytest.mark.parametrize("case", EXACT, ids="-".join)
def test_two_processes_compute_what_one_does(case: Case, reports: list[dict[str, Any]]) -> None:
    name, dtype, _ = case
    model = built(name, dtype)
    for i, n in enumerate(PROMPTS):
        alone, most = logits(model, n), tolerance(MODELS[name], getattr(torch, dtype), n)
        ours = [report["cases"][case]["ours"][i] for report in reports]
        assert torch.equal(ours[0], ours[1])  # every process has the same logits
        assert float((ours[0] - alone).abs().max()) <= most
        assert float((reports[0]["cases"][case]["theirs"][i] - alone).abs().max()) <= most  # DeepSpeed's own, too


def test_yuan_is_the_golden(reports: list[dict[str, Any]]) -> None:
    if not GOLDEN.is_dir():
        pytest.skip("the goldens are not here")
    expected = load_file(GOLDEN / "logits.safetensors")
    found = logits_of(built("yuan", "float32"), expected["tokens"])
    assert float((found - expected["prefill"]).abs().max()) <= 1e-3  # the model of this test is Yuan


@torch.inference_mode()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids[None].long())[0]


# ---- one process with the shards of both


class Together(nn.Module):
    """The shards of a matrix: outputs side by side, or the sum of what each makes of its inputs.

    `order` is where outputs (or inputs) of the whole lie among those of the shards.
    """

    def __init__(self, shards: list[nn.Module], by_inputs: bool, axis: int = -1, order: Tensor | None = None) -> None:
        super().__init__()
        self.shards, self.by_inputs, self.axis, self.order = nn.ModuleList(shards), by_inputs, axis, order
        self.widths = [getattr(shard, "linear", shard).in_features // getattr(shard, "taps", 1) for shard in shards]
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.by_inputs:
            y = torch.cat([shard(x) for shard in self.shards], self.axis)
            return y if self.order is None else y[..., self.order]
        x = x if self.order is None else x[..., self.order.argsort()]
        first, second = (shard(part) for shard, part in zip(self.shards, x.split(self.widths, self.axis), strict=True))
        return first + second if self.bias is None else first + second + self.bias


def restored(found: dict[str, Any], path: str, fmt: str, *, bias: bool) -> Linear:
    shard = found["shards"][path]
    n, k = shard["shape"]
    made = Linear(k, n, bias=bias, format=fmt)
    made.load_state_dict({name: value for name, value in shard["state"].items() if bias or name != "bias"})
    if bias:
        made.bias.data = shard["state"]["bias"]  # in its own type
    return made


def put_together(case: Case, reports: list[dict[str, Any]]) -> nn.Module:
    """The model of a case with the shards that the processes had."""
    name, dtype, fmt = case
    model, both = built(name, dtype), [report["cases"][case] for report in reports]
    for path in both[0]["shards"]:
        has_bias = "bias" in both[0]["shards"][path]["state"]
        if path.endswith(".linear"):  # of a filter
            place = path.removesuffix(".linear").removesuffix(".conv")
            made = [TapConv2d(restored(one, path, fmt, bias=has_bias), 2, 1) for one in both]
            is_cut = path.endswith(".conv.linear")
            whole = Together(made, place.endswith("conv2"), axis=1) if is_cut else made[0]
        else:
            place, by_inputs = path, both[0]["shards"][path]["kind"] == "RowParallelLinear"
            assert by_inputs == place.endswith(CUT_BY_INPUTS)
            whole = Together(
                [restored(one, path, fmt, bias=has_bias and not by_inputs) for one in both], by_inputs,
                order=yuan_order(model, path) if name.startswith("yuan") else None,
            )  # fmt: skip
            if by_inputs and has_bias:
                whole.bias = both[0]["shards"][path]["state"]["bias"]
        parent, _, last = place.rpartition(".")
        setattr(model.get_submodule(parent), last, whole)
    return model


def yuan_order(model: nn.Module, path: str) -> Tensor | None:
    """DeepSpeed gives process 0 the value heads 0 and 2, of four, whose queries and keys it has."""
    if not path.endswith(("v_proj", "o_proj")):
        return None
    dim = model.config.hidden_size // 4
    return torch.arange(4 * dim).view(4, dim)[[0, 2, 1, 3]].flatten().argsort()


@pytest.mark.parametrize("case", QUANTIZED, ids="-".join)
def test_quantized_shards_are_joined_to_the_bit(case: Case, reports: list[dict[str, Any]]) -> None:
    model = put_together(case, reports)
    for i, n in enumerate(PROMPTS):
        assert torch.equal(reports[0]["cases"][case]["ours"][i], reports[1]["cases"][case]["ours"][i])
        assert torch.equal(reports[0]["cases"][case]["ours"][i], logits(model, n))


def test_cutting_first_costs_no_accuracy(reports: list[dict[str, Any]]) -> None:
    """Rows cut at multiples of 16 keep their codes; columns get other scales, and blocks that begin elsewhere."""
    case = ("llama", "float32", "nf4")
    model = built("llama", "float32")
    before = quantize_(built("llama", "float32"))
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"):
        by_inputs = path.endswith(CUT_BY_INPUTS)
        parts = [restored(report["cases"][case], path, "nf4", bias=True).dequantize() for report in reports]
        after, weight = torch.cat(parts, 1 if by_inputs else 0), model.get_submodule(path).weight
        whole = before.get_submodule(path).dequantize()
        assert torch.equal(after, whole) != by_inputs
        assert (after - weight).norm() <= 1.02 * (whole - weight).norm()


# ---- what is exchanged, and by whom it is computed


def test_every_matrix_is_exchanged_and_its_memory_free(reports: list[dict[str, Any]]) -> None:
    kinds: set[str] = set()
    for case in CASES:
        found = reports[1]["cases"][case]
        assert found["left"] == []
        assert found["alive"] == sorted(found["alive"], reverse=True)
        assert found["alive"][-1] == 1
        assert len(set(found["alive"])) == found["alive"][0]  # each weight goes before the next is quantized
        kinds |= set(found["kinds"].values())
    assert kinds >= {
        *("LinearLayer", "LinearAllreduce", "LmHeadLinearAllreduce", "fused_LinearLayer"),
        *("Yuan_LinearLayer", "Yuan_LinearAllreduce", "TensorParallelOcShardConv2d", "TensorParallelIcShardConv2d"),
    }
    shapes = reports[0]["cases"]["llama", "float32", "nf4"]["shards"]
    assert shapes["model.layers.0.self_attn.o_proj"]["shape"] == (192, 160)  # no multiple of 64 inputs
    assert set(MODELS) == {case[0] for case in CASES}


def test_single_layers(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert len(report["layers"]) == 6
        for name, (theirs, ours) in report["layers"].items():
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=name)
    assert reports[1]["layers"]["no outputs"][0].shape == (2, 3, 0)
    assert reports[0]["layers"]["gathered"][0].shape == (2, 3, 100)


@pytest.mark.parametrize(("taps", "padding", "bias"), [(1, 0, True), (2, 1, True), (3, 0, False)])
def test_a_filter_is_a_matrix(taps: int, padding: int, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 10, (taps, 1), padding=(padding, 0), bias=bias)
    made, x = TapConv2d.from_float(plain, format="f32"), torch.randn(2, 6, 5, 3)
    assert made(x).is_contiguous()
    torch.testing.assert_close(made(x), plain(x), atol=1e-5, rtol=0)
    others = [{"stride": (2, 1)}, {"dilation": (2, 1)}, {"groups": 2}, {"padding": (0, 1)}, {"padding": "same"}]
    assert not any(TapConv2d.can_be(nn.Conv2d(6, 10, (2, 1), **other)) for other in others)
    assert not TapConv2d.can_be(nn.Conv2d(6, 10, (2, 1), padding=(1, 0), padding_mode="circular"))
    with pytest.raises(UserError, match="its kernel must be one wide"):
        TapConv2d.from_float(nn.Conv2d(6, 10, 3), format="f32")


def test_a_filter_keeps_its_hooks() -> None:
    plain = nn.Conv2d(6, 10, (2, 1)).eval()
    for name in ("weight", "bias"):
        prune.l1_unstructured(plain, name, 0.5)
    plain.register_forward_hook(lambda module, args, y: y * 3)
    made, x = TapConv2d.from_float(plain, format="f32"), torch.randn(2, 6, 5, 3)
    assert not made.training
    torch.testing.assert_close(made(x), plain(x), atol=1e-5, rtol=0)
    plain.forward = plain.forward
    with pytest.raises(UserError, match="its forward was replaced"):
        TapConv2d.from_float(plain, format="f32")


def test_a_choice_and_a_copy(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["chosen"] == {"0": "LinearLayer", "1": "RowParallelLinear", "2": "Linear"}
        assert report["copy is the same"]


def test_threads_are_those_that_torch_has(reports: list[dict[str, Any]]) -> None:
    """As many as torch says, none of ours: with core binding one of the two cores, and where two are asked for two."""
    for report in reports:
        found = report["threads"]
        assert found["at start"] == 1
        assert (found["1 new"], found["1 busy"]) == (0, 1)
        assert (found["2 new"], found["2 busy"]) == (0, 2)
    if shutil.which("numactl"):
        assert [report["threads"]["cores"] for report in reports] == [1, 1]


def test_sums_go_through_shared_memory(reports: list[dict[str, Any]]) -> None:
    assert reports[0]["shared memory"]


def test_refusals_are_one_sentence(reports: list[dict[str, Any]]) -> None:
    found = reports[0]["refusals"]
    assert found.pop("format").startswith("UserError: there is no format 'nf5'; choose one of nf4, ")
    assert found == {
        "unknown": "UnsupportedError: 0 of Sequential: it is DeepSpeed's NovelLinear, which fourfold does not know",
        "quantized first": "UserError: 0 of Sequential: its weight was quantized before it was cut; cut first, with "
        "deepspeed.init_inference",
        "not finite": "UserError: 0 of Sequential: weights must be finite numbers: row 0 holds NaN or infinity",
        "training": "UnsupportedError: 0 of Sequential: it is cut for training, and quantized weights do not train; "
        "use deepspeed.init_inference",
        "itself": "UserError: a matrix cannot be exchanged inside itself; give the model that holds it",
    }


# ---- what DeepSpeed saves, read by fourfold itself


def is_read(path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    (path / "config.json").write_text(json.dumps(config))
    with open_source(path) as source:
        check_complete(weight_specs(source.config), source)
        for name, weight in weights.items():
            if name in source.tensors or not name.endswith("inv_freq"):
                rows = source.tensors[name].rows(0, len(weight))
                assert np.array_equal(rows.astype(np.float32), weight.float().numpy()), name


LLAMA_CONFIG = PLAIN_LLAMA | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize("name", SAVED)
def test_saved_for_inference(name: str, written: Path) -> None:
    model = built(name, "float32")
    config = LLAMA_CONFIG
    if name.startswith("yuan"):
        more = {"model_type": "yuan", "tie_word_embeddings": True, "max_position_embeddings": 512}
        config = vars(model.config) | more
    is_read(written / f"{name}.saved", config, model.state_dict())


@pytest.mark.parametrize("stage", [0, 1])
def test_saved_amid_training(stage: int, written: Path) -> None:
    is_read(written / f"engine.{stage}", LLAMA_CONFIG, built("plain llama", "bfloat16").state_dict())


def test_pieces_of_zero_are_refused(written: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"as ZeRO stage 3 cuts them; .* with the zero_to_fp32\.py"):
        is_read(written / "engine.3", LLAMA_CONFIG, {})


def test_without_deepspeed_the_extra_is_named() -> None:
    script = """
import sys
sys.modules["deepspeed"] = None
try:
    import fourfold.deepspeed
except ImportError as error:
    print(type(error).__name__, error)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.startswith("MissingExtra fourfold.deepspeed needs DeepSpeed")
    assert "fourfold[deepspeed]" in found
