"""`fourfold bench`: one thin command for each measurement of fourfold.bench."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from fourfold.cli_options import (
    MODEL,
    Attend,
    Format,
    Isa,
    Json,
    Kv,
    Model,
    Ranks,
    Repeats,
    Start,
    Threads,
    Tokens,
    Weights,
    show,
)

app = typer.Typer(help="Measure this machine, as fractions of its own limits.")


@app.command(name="linear")
def bench_linear(
    format: Format = None,
    threads: Threads = None,
    ranks: Ranks = None,
    k: Annotated[int | None, typer.Option(help="Inputs.")] = None,
    n: Annotated[int | None, typer.Option(help="Outputs.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens at once, several with commas: 1,4,16.")] = None,
    gigabytes: Annotated[float | None, typer.Option(help="Weights to rotate over.")] = None,
    repeats: Repeats = None,
    isa: Isa = None,
    kernel: Annotated[str | None, typer.Option(help="Force a linear kernel by its name.")] = None,
    json: Json = False,
) -> None:
    """One matrix: GB/s against the read bandwidth, FLOP/s against the peak."""
    _bench("linear", locals())


@app.command(name="decode")
def bench_decode(
    model: Model = MODEL,
    format: Format = None,
    threads: Threads = None,
    ranks: Ranks = None,
    context: Start = None,
    kv: Kv = None,
    weights: Weights = None,
    tokens: Tokens = None,
    batch: Annotated[
        int | None, typer.Option(help="Texts that each step continues. [default: 1]", show_default=False)
    ] = None,
    repeats: Repeats = None,
    isa: Isa = None,
    attend: Attend = None,
    json: Json = False,
) -> None:
    """A model, token by token: ms a step and GB/s against the read bandwidth."""
    _bench("decode", locals())


@app.command(name="prefill")
def bench_prefill(
    model: Model = MODEL,
    format: Format = None,
    threads: Threads = None,
    ranks: Ranks = None,
    context: Start = None,
    kv: Kv = None,
    weights: Weights = None,
    tokens: Tokens = None,
    repeats: Repeats = None,
    isa: Isa = None,
    attend: Attend = None,
    json: Json = False,
) -> None:
    """A model over a whole prompt: tokens/s and FLOP/s against the peak."""
    _bench("prefill", locals())


@app.command(name="speculate")
def bench_speculate(
    model: Model = MODEL,
    format: Format = None,
    threads: Threads = None,
    ranks: Ranks = None,
    draft: Annotated[str | None, typer.Option(help="A smaller model of the same tokenizer; else look-up.")] = None,
    tokens: Tokens = None,
    repeats: Repeats = None,
    json: Json = False,
) -> None:
    """Texts with drafts and without: tokens/s, where they repeat themselves and where they do not."""
    _bench("speculate", locals())


@app.command(name="reduce")
def bench_reduce(
    ranks: Annotated[int | None, typer.Option(help="Whose sums are added (default: 2).", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(help="Of all ranks together; one a rank by default.")] = None,
    kb: Annotated[int | None, typer.Option(help="Of each rank's sums (default: 16).", show_default=False)] = None,
    repeats: Repeats = None,
    json: Json = False,
) -> None:
    """The sums of all ranks: latency against that of the hand-over from core to core."""
    _bench("reduce", locals())


@app.command(name="load")
def bench_load(
    model: Model = MODEL,
    format: Format = None,
    threads: Threads = None,
    ranks: Ranks = None,
    repeats: Repeats = None,
    json: Json = False,
) -> None:
    """A model from the page cache into memory: GB/s against the copy bandwidth, peak memory against the weights."""
    _bench("load", locals())


@app.command(name="quantize")
def bench_quantize(
    format: Format = None,
    threads: Threads = None,
    gigabytes: Annotated[float | None, typer.Option(help="Of the bfloat16 checkpoint that is made for it.")] = None,
    directory: Annotated[str | None, typer.Option(help="Where it is made, and taken away again.")] = None,
    repeats: Repeats = None,
    json: Json = False,
) -> None:
    """A conversion from a warm checkpoint to the disk: GB/s of source against the packer's and the disk's."""
    _bench("quantize", locals())


@app.command(name="plan")
def bench_plan(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models as `bench decode` takes them.")],
    format: Format = None,
    ranks: Annotated[
        str | None, typer.Option(help="Ranks, several with commas (default: 1,2).", show_default=False)
    ] = None,
    context: Start = None,
    kv: Kv = None,
    tokens: Tokens = None,
    repeats: Repeats = None,
    json: Json = False,
) -> None:
    """Whether `fourfold plan` is right here: ms a token as planned beside ms a token as measured."""
    _bench("plan", locals())


@app.callback(invoke_without_command=True)
def bench_top(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def _bench(kind: str, options: Mapping[str, Any]) -> None:
    measurements = importlib.import_module("fourfold.bench")
    options = dict(options)
    json = options.pop("json")
    result = getattr(measurements, kind)(**{name: value for name, value in options.items() if value is not None})
    show(result, json, measurements.render)
