"""The command line. Each command is a thin function that imports what it needs when it runs, so `--help` is quick.

A mistake of the user ends with status 2, any other failure with 1, both with one sentence on stderr;
`FOURFOLD_DEBUG=1` adds the traceback.
"""

from __future__ import annotations

import errno
import importlib
import json as json_format
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fourfold.errors import FourfoldError, UserError

if TYPE_CHECKING:
    from rich.console import Console

MODEL = "smollm2"  # the bundled real model

app = typer.Typer(
    help="100-billion-parameter language models on an ordinary multi-socket CPU server.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure this machine, as fractions of its own limits.")
app.add_typer(bench, name="bench")

Model = Annotated[str, typer.Argument(help="A fourfold, Hugging Face or Megatron directory, a GGUF file, or smollm2.")]
Format = Annotated[str | None, typer.Option(help="nf4 (default), int4, fp4, int8, bf16 or f32.", show_default=False)]
Ranks = Annotated[int | None, typer.Option(help="Slices of the model; one to a NUMA node by default.")]
Threads = Annotated[int | None, typer.Option(help="Threads of all ranks together; one to a core by default.")]
Context = Annotated[int | None, typer.Option(help="Positions to make room for; the model's own by default.")]
Kv = Annotated[str | None, typer.Option(help="Cache of keys and values: bf16 (default), int8 or f32.")]
RopeAngles = Annotated[str | None, typer.Option(help="f32 or bf16, as the model was trained.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document as the last line of stdout.")]
Prompt = Annotated[str | None, typer.Option("-p", "--prompt", help="What to ask; else stdin.", show_default=False)]
Ids = Annotated[str | None, typer.Option(help="Token ids in place of a prompt: 1,15043,29892.", show_default=False)]
System = Annotated[str | None, typer.Option(help="The system message.")]
Template = Annotated[str | None, typer.Option("--chat-template", help="In place of the model's: yuan-n, yuan-newline.")]
MaxTokens = Annotated[int | None, typer.Option(help="Stop after this many. [default: 512]", show_default=False)]
Temperature = Annotated[float | None, typer.Option(help="0 (default): always the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Choose among the likeliest that have this probability together.")]
MinP = Annotated[
    float | None, typer.Option(help="Choose among those at least this fraction as likely as the likeliest.")
]
Penalty = Annotated[float | None, typer.Option(help="Above 1: tokens that were there become less likely.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]
Seed = Annotated[int | None, typer.Option(help="The same seed, the same text.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it stands, without the chat template.")]
Trace = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write a trace of every thread for Perfetto, and show a table.")
]
Isa = Annotated[str | None, typer.Option(help="Force kernels: scalar, avx2, avx512 or amx.")]
Repeats = Annotated[int | None, typer.Option(help="Measurements to take the median of.")]
Tokens = Annotated[int | None, typer.Option(help="Tokens: at once (prefill), or one after another (decode).")]
Start = Annotated[int | None, typer.Option("--context", help="Random tokens that go before. [default: 0]")]


@app.callback(invoke_without_command=True)
def top(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show it.")] = False) -> None:
    if version:
        import fourfold

        print(f"fourfold {fourfold.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def run(
    model: Model = MODEL,
    prompt: Prompt = None,
    ids: Ids = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    stop: Stop = None,
    seed: Seed = None,
    ignore_eos: IgnoreEos = False,
    format: Format = None,
    ranks: Ranks = None,
    threads: Threads = None,
    context: Context = None,
    kv: Kv = None,
    rope_angles: RopeAngles = None,
    chat_template: Template = None,
    raw: Raw = False,
    profile: Trace = None,
    json: Json = False,
) -> int:
    """One answer, streamed to stdout."""
    options = dict(locals())
    from fourfold import cli_generate

    return cli_generate.run(options)


@app.command()
def chat(
    model: Model = MODEL,
    prompt: Prompt = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    stop: Stop = None,
    seed: Seed = None,
    ignore_eos: IgnoreEos = False,
    format: Format = None,
    ranks: Ranks = None,
    threads: Threads = None,
    context: Context = None,
    kv: Kv = None,
    rope_angles: RopeAngles = None,
    chat_template: Template = None,
    raw: Raw = False,
    json: Json = False,
) -> int:
    """Talk. Ctrl-C stops an answer; /exit or Ctrl-D leaves."""
    options = dict(locals())
    from fourfold import cli_generate

    return cli_generate.chat(options)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face or Megatron directory, or a GGUF file.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory to make.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A directory with the tokenizer, if it lies elsewhere.")
    ] = None,
    format: Format = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Convert a model once, in bounded memory; started again after an interruption, it resumes."""
    from fourfold.checkpoint import open_source
    from fourfold.cli_render import render_quality
    from fourfold.llm import check_text
    from fourfold.locate import DEFAULT_FORMAT, source_path
    from fourfold.progress import bar
    from fourfold.quantize import convert

    with open_source(source_path(source), tokenizer) as opened, bar(f"converting {source}") as report:
        check_text(opened)
        lost = convert(opened, destination, format or DEFAULT_FORMAT, threads=threads, progress=report)
        files = sorted(opened.tokenizer_files)
    _show({"path": str(destination), "tokenizer_files": files, **lost.to_dict()}, json, render_quality)


@app.command()
def synth(
    config: Annotated[str, typer.Argument(help="A config.json, or a shape; an unknown one lists them.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory to make.")],
    format: Format = None,
    layers: Annotated[int | None, typer.Option(help="So many layers, in place of the model's.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same weights. [default: 0]")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """A model of random weights in the quantized format, to measure with: no checkpoint is needed."""
    options = dict(locals())
    from fourfold import cli_synth
    from fourfold.cli_render import render_facts

    _show(cli_synth.synth(options), json, render_facts)


@app.command()
def inspect(model: Model = MODEL, format: Format = None, json: Json = False) -> None:
    """Tensors, bits per weight and recipe, of a model as fourfold runs it."""
    from fourfold.checkpoint import fourfold_dir
    from fourfold.cli_render import render_inspection

    _show(fourfold_dir.inspect(_directory(model, format)), json, render_inspection)


@app.command()
def verify(model: Model = MODEL, format: Format = None, json: Json = False) -> None:
    """Check every hash of a model as fourfold runs it."""
    from fourfold.checkpoint import fourfold_dir
    from fourfold.cli_render import render_facts
    from fourfold.progress import bar

    path = _directory(model, format)
    with bar(f"verifying {path.name}") as report:
        n_bytes = fourfold_dir.verify(path, report)
    _show({"path": str(path), "intact": True, "bytes": n_bytes}, json, render_facts)


@app.command()
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Leave the measurements out.")] = False, json: Json = False
) -> None:
    """This machine: kernels, AMX, nodes, limits, measured bandwidth and peak, and what will be used."""
    from fourfold import doctor as machine_doctor

    _show(machine_doctor.report(quick=quick), json, machine_doctor.render)


@app.command(name="plan")
def plan_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model, a config.json, or a shape: yuan2-102b.")],
    machine: Annotated[str | None, typer.Option(help="nf8260g7, or a TOML file; else this one, measured.")] = None,
    ranks: Ranks = None,
    context: Context = None,
    kv: Kv = None,
    format: Format = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Of a prompt. [default: 512]", show_default=False)] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it: FILE.svg or FILE.png.")] = None,
    save: Annotated[Path | None, typer.Option(help="Keep the machine, as measured, in a TOML file.")] = None,
    json: Json = False,
) -> None:
    """What a model takes and gives on a machine: bytes of each node, ms a token, what bounds it."""
    options = dict(locals())
    from fourfold import cli_plan, plan

    _show(cli_plan.plan(options), json, plan.render)


@app.command(name="eval")
def evaluate(
    model: Model,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file.")] = None,
    ids: Annotated[Path | None, typer.Option(help="A .npy file of ids, in place of a text.")] = None,
    against: Annotated[str | None, typer.Option(help="A model to compare with, token by token.")] = None,
    against_format: Annotated[str | None, typer.Option(help="Its format.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens a window. [default: 512]", show_default=False)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Measure on the first of the tokens only.")] = None,
    format: Format = None,
    ranks: Ranks = None,
    threads: Threads = None,
    kv: Kv = None,
    rope_angles: RopeAngles = None,
    json: Json = False,
) -> None:
    """Perplexity of a text; with --against also KL divergence and top-1 agreement."""
    options = dict(locals())
    from fourfold import cli_evaluate
    from fourfold.cli_render import render_facts

    _show(cli_evaluate.evaluate(options), json, render_facts)


@bench.command(name="linear")
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


@bench.command(name="decode")
def bench_decode(
    model: Model = MODEL,
    format: Format = None,
    threads: Threads = None,
    ranks: Ranks = None,
    context: Start = None,
    kv: Kv = None,
    tokens: Tokens = None,
    repeats: Repeats = None,
    isa: Isa = None,
    json: Json = False,
) -> None:
    """A model, token by token: ms a token and GB/s against the read bandwidth."""
    _bench("decode", locals())


@bench.command(name="prefill")
def bench_prefill(
    model: Model = MODEL,
    format: Format = None,
    threads: Threads = None,
    ranks: Ranks = None,
    context: Start = None,
    kv: Kv = None,
    tokens: Tokens = None,
    repeats: Repeats = None,
    isa: Isa = None,
    json: Json = False,
) -> None:
    """A model over a whole prompt: tokens/s and FLOP/s against the peak."""
    _bench("prefill", locals())


@bench.command(name="plan")
def bench_plan(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models as `bench decode` takes them.")],
    format: Format = None,
    ranks: Annotated[str | None, typer.Option(help="Several with commas. [default: 1,2]", show_default=False)] = None,
    context: Start = None,
    kv: Kv = None,
    tokens: Tokens = None,
    repeats: Repeats = None,
    json: Json = False,
) -> None:
    """Whether `fourfold plan` is right here: ms a token as planned beside ms a token as measured."""
    _bench("plan", locals())


@bench.command(name="reduce")
def bench_reduce(
    ranks: Annotated[int | None, typer.Option(help="Whose sums are added. [default: 2]", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(help="Of all ranks together; one a rank by default.")] = None,
    kb: Annotated[int | None, typer.Option(help="Of each rank's sums. [default: 16]", show_default=False)] = None,
    repeats: Repeats = None,
    json: Json = False,
) -> None:
    """The sums of all ranks: latency against that of the hand-over from core to core."""
    _bench("reduce", locals())


@bench.command(name="load")
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


@bench.command(name="quantize")
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


@bench.callback(invoke_without_command=True)
def bench_top(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def _bench(kind: str, options: Mapping[str, Any]) -> None:
    measurements = importlib.import_module("fourfold.bench")
    options = dict(options)
    json = options.pop("json")
    result = getattr(measurements, kind)(**{name: value for name, value in options.items() if value is not None})
    _show(result, json, measurements.render)


def _directory(model: str, format: str | None) -> Path:
    from fourfold.llm import check_text
    from fourfold.locate import fourfold_directory
    from fourfold.progress import bar

    with bar(f"converting {model}") as report:
        return fourfold_directory(model, format, report=report, check=check_text)


def _show(result: Mapping[str, Any], json: bool, render: Callable[[dict[str, Any], Console], None]) -> None:
    """A result on stdout: as JSON, or for people."""
    if json:
        print(json_format.dumps(result, ensure_ascii=False))
        return
    from rich.console import Console

    render(dict(result), Console())


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console entry point: runs a command and exits with its status."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (for the whole of the process)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name="fourfold", standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        if os.environ.get("FOURFOLD_DEBUG"):
            import traceback

            traceback.print_exc()
        sentence, status = explain(error)
        print(f"fourfold: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(status or 0)


def explain(error: Exception) -> tuple[str, int]:
    """An error as one sentence and an exit status."""
    if hasattr(error, "format_message"):  # the command line itself is wrong
        return f"{error.format_message()} (`fourfold --help` lists what there is)", 2
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, FourfoldError):
        return str(error), 1
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be used: {error.strerror}", 2
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "there is no room for the output; make room on its disk", 2
    if isinstance(error, MemoryError):
        return "there is not enough memory for this; free some, or ask for a smaller --context", 1
    return f"{type(error).__name__}: {error} (FOURFOLD_DEBUG=1 shows where)", 1
