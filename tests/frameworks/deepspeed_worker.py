"""One of the processes that test_deepspeed.py has DeepSpeed start: python deepspeed_worker.py DIRECTORY.

Writes DIRECTORY/RANK.pt: of each case DeepSpeed's own logits, ours, and our shards; and what a process observed. Beside
it checkpoints as DeepSpeed saves them: NAME.saved for inference, engine.STAGE amid training.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.comm import comm
from deepspeed.module_inject import layers
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from deepspeed_cases import CASES, PROMPTS, SAVED, built, logits

import fourfold.deepspeed
from fourfold.errors import FourfoldError
from fourfold.torch import Linear, quantize_
from fourfold.torch import linear as linear_module


def run_case(name: str, dtype: str, fmt: str, directory: Path) -> dict[str, Any]:
    model = built(name, dtype)
    more: dict[str, Any] = {}
    if name == "yuan-cut-filters":  # DeepSpeed cuts them where it is given checkpoint files, which here change nothing
        if os.environ["RANK"] == "0":
            torch.save(model.state_dict(), directory / "checkpoint.pt")
        torch.distributed.barrier()
        files = [str(directory / "checkpoint.pt")]
        more = {"checkpoint": {"type": "ds_model", "checkpoints": files, "version": 1.0}, "base_dir": ""}
    if name in SAVED and fmt == "f32":
        more["save_mp_checkpoint_path"] = str(directory / f"{name}.saved")
    engine = deepspeed.init_inference(model, tensor_parallel={"tp_size": 2}, dtype=getattr(torch, dtype), **more)
    theirs = [logits(engine, n) for n in PROMPTS]
    kinds = {path: type(module).__name__ for path, module in engine.module.named_modules()}
    alive, restore = watch_memory(engine)
    try:
        assert fourfold.deepspeed.quantize_(engine, fmt) is engine
    finally:
        restore()
    ours = [logits(engine, n) for n in PROMPTS]
    linears = {path: module for path, module in engine.module.named_modules() if isinstance(module, Linear)}
    shards = {
        path: {"kind": type(m).__name__, "shape": (m.out_features, m.in_features), "state": m.state_dict()}
        for path, m in linears.items()
    }
    left = [path for path, module in engine.module.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
    return {"theirs": theirs, "ours": ours, "kinds": kinds, "shards": shards, "left": left, "alive": alive}


def watch_memory(engine: nn.Module) -> tuple[list[int], Any]:
    """How many of DeepSpeed's weights still have memory each time that one is quantized."""
    alive: list[int] = []
    weights = [weakref.ref(m.weight) for m in engine.modules() if isinstance(m, layers.TensorParallel_Layer)]
    real = linear_module.quantize

    def watched(*args: Any) -> Any:
        alive.append(sum(weight() is not None for weight in weights))
        return real(*args)

    linear_module.quantize = watched
    return alive, lambda: setattr(linear_module, "quantize", real)


def threads_that_ran(model: nn.Module, x: torch.Tensor) -> dict[int, float]:
    """Of each thread of this process, its share of the CPU time that all spent while `model` ran for a while."""

    def ticks() -> dict[int, int]:
        tasks = Path("/proc/self/task").iterdir()
        return {int(t.name): sum(map(int, (t / "stat").read_text().rpartition(")")[2].split()[11:13])) for t in tasks}

    before, end = ticks(), time.process_time() + 0.5
    with torch.inference_mode():
        while time.process_time() < end:
            model(x)
    spent = {task: now - before.get(task, 0) for task, now in ticks().items()}
    return {task: own / sum(spent.values()) for task, own in spent.items()}


def observe_threads() -> dict[str, Any]:
    """Our kernels on a matrix large enough for all threads, after PyTorch's own product has started all of its own."""
    at_start = torch.get_num_threads()
    found: dict[str, Any] = {"at start": at_start, "cores": len(os.sched_getaffinity(0))}
    plain, x = nn.Linear(2048, 2048).bfloat16(), torch.randn(4, 2048).bfloat16()
    ours = Linear.from_float(plain)
    for n in (at_start, 2):
        torch.set_num_threads(n)
        theirs = threads_that_ran(plain, x)
        mine = threads_that_ran(ours, x)
        found[f"{n} new"] = len(mine.keys() - theirs.keys())
        found[f"{n} busy"] = sum(share > 0.1 for share in mine.values())
    torch.set_num_threads(at_start)
    return found


def refusals() -> dict[str, str]:
    """What is wrong, in the words of the error."""
    group = deepspeed.inference.engine.InferenceEngine.inference_mp_group
    found = {}

    def refused(name: str, layer: nn.Module, **arguments: Any) -> None:
        try:
            fourfold.deepspeed.quantize_(nn.Sequential(layer), **arguments)
        except FourfoldError as error:
            found[name] = f"{type(error).__name__}: {error}"

    refused("format", nn.Linear(4, 4), format="nf5")
    refused("unknown", type("NovelLinear", (layers.LinearLayer,), {})(nn.Linear(128, 128), group))
    quantized = quantize_(nn.Sequential(nn.Linear(128, 128, bias=False)))[0]
    refused("quantized first", layers.LinearLayer(quantized, group))
    holed = layers.LinearAllreduce(nn.Linear(128, 128), group)
    holed.weight.data[0, 0] = float("nan")
    refused("not finite", holed)
    training = layers.LinearLayer(nn.Linear(128, 128), group)
    layers.set_autotp_mode(training=True)
    refused("training", training)
    layers.set_autotp_mode(training=False)
    try:
        fourfold.deepspeed.quantize_(layers.LinearLayer(nn.Linear(128, 128), group))
    except FourfoldError as error:
        found["itself"] = f"{type(error).__name__}: {error}"
    return found


@torch.inference_mode()
def single_layers() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What no model above has, DeepSpeed's layer and ours on the same input: gathers, GPT-2's transposed weights."""
    from transformers.pytorch_utils import Conv1D

    group = deepspeed.inference.engine.InferenceEngine.inference_mp_group
    torch.manual_seed(1)
    x, rank = torch.randn(2, 3, 128), int(os.environ["RANK"])
    row = Conv1D(128, 128)
    row.bias = None
    cases = {
        "gathered": (layers.LinearLayer(nn.Linear(128, 100), group, gather_output=True), x),
        "transposed": (layers.Conv_LinearALlreduce(row, group, name="c_proj"), x.chunk(2, -1)[rank]),
        "parts": (layers.SubParamLinearLayer(nn.Linear(128, 96), group, ((48, 48), -1), name="qkv"), x),
        "parts, rows": (
            layers.SubParamLinearAllreduce(nn.Linear(128, 96), group, (96, -1), name="o"),
            x.chunk(2, -1)[rank],
        ),
        "no outputs": (layers.LinearLayer(nn.Linear(128, 1), group), x),
        "gate and up": (layers.GateUpPack_LinearLayer(nn.Linear(128, 160), group), x),
    }
    found = {}
    for name, (layer, input) in cases.items():
        model = nn.Sequential(layer)
        theirs = model(input)
        fourfold.deepspeed.quantize_(model, "f32")
        found[name] = (theirs, model(input))
    return found


@torch.inference_mode()
def chosen_and_copied(report: dict[str, Any]) -> None:
    """A model of which one linear is to stay as it is, and a copy of it."""
    group = deepspeed.inference.engine.InferenceEngine.inference_mp_group
    made = [layers.LinearLayer(nn.Linear(64, 64), group), layers.LinearAllreduce(nn.Linear(64, 64), group)]
    model = nn.Sequential(*made, nn.Linear(64, 64))
    fourfold.deepspeed.quantize_(model, choose=lambda name, module: name != "0")
    report["chosen"] = {name: type(module).__name__ for name, module in model.named_children()}
    x = torch.randn(3, 64)
    report["copy is the same"] = torch.equal(copy.deepcopy(model)(x), model(x))


def save_engines(directory: Path) -> None:
    """What DeepSpeed leaves of a training, without ZeRO, with its stage 1, and with its stage 3."""
    for stage in (0, 1, 3):
        model = built("plain llama", "bfloat16")
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            config={
                "train_batch_size": 2,
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
            },
        )
        engine.save_checkpoint(str(directory / f"engine.{stage}"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--local_rank")
    directory = parser.parse_args().directory
    deepspeed.init_distributed(dist_backend="gloo")
    report: dict[str, Any] = {"cases": {}}
    for name, dtype, fmt in CASES:
        report["cases"][name, dtype, fmt] = run_case(name, dtype, fmt, directory)
    report["shared memory"] = hasattr(torch.ops.deepspeed, "inference_all_reduce_") and comm.cdb.shm_vector_kernel_level
    report["refusals"] = refusals()
    report["layers"] = single_layers()
    chosen_and_copied(report)
    report["threads"] = observe_threads()
    save_engines(directory)
    torch.save(report, directory / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
