"""The command line. Each command is a thin function that imports what it needs when it runs, so `--help` is quick.

A mistake of the user ends with status 2, any other failure with 1, both with one sentence on stderr;
`FOURFOLD_DEBUG=1` adds the traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from fourfold import cli_bench, cli_serve
from fourfold.cli_options import (
    MODEL,
    Context,
    Format,
    Ids,
    IgnoreEos,
    Json,
    Kv,
    MaxTokens,
    MinP,
    Model,
    Penalty,
    Prompt,
    Ranks,
    Raw,
    RopeAngles,
    Seed,
    Stop,
    System,
    Temperature,
    Template,
    Threads,
    TopK,
    TopP,
    Trace,
    Weights,
    show,
)
from fourfold.errors import FourfoldError, UserError

app = typer.Typer(
    help="100-billion-parameter language models on an ordinary multi-socket CPU server.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_bench.app, name="bench")
app.command()(cli_serve.serve)


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
    weights: Weights = None,
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
    weights: Weights = None,
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
    from fourfold.conversion import convert
    from fourfold.llm import check_text
    from fourfold.locate import source_path
    from fourfold.progress import bar, note

    with open_source(source_path(source), tokenizer) as opened, bar(f"converting {source}") as report:
        check_text(opened)
        lost = convert(opened, destination, format, threads=threads, progress=report, notice=note)
        files = sorted(opened.tokenizer_files)
    show({"path": str(destination), "tokenizer_files": files, **lost.to_dict()}, json, render_quality)


@app.command()
def synth(
    config: Annotated[str, typer.Argument(help="A config.json, or a shape; an unknown one lists them.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory to make.")],
    format: Format = None,
    layers: Annotated[int | None, typer.Option(help="So many layers, in place of the model's.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same weights (default: 0).")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """A model of random weights in the quantized format, to measure with: no checkpoint is needed."""
    options = dict(locals())
    from fourfold import cli_synth
    from fourfold.cli_render import render_facts

    show(cli_synth.synth(options), json, render_facts)


@app.command()
def inspect(model: Model = MODEL, format: Format = None, json: Json = False) -> None:
    """Tensors, bits per weight and recipe, of a model as fourfold runs it."""
    from fourfold.checkpoint import fourfold_dir
    from fourfold.cli_render import render_inspection

    show(fourfold_dir.inspect(_directory(model, format)), json, render_inspection)


@app.command()
def verify(model: Model = MODEL, format: Format = None, json: Json = False) -> None:
    """Check every hash of a model as fourfold runs it."""
    from fourfold.checkpoint import fourfold_dir
    from fourfold.cli_render import render_facts
    from fourfold.progress import bar

    path = _directory(model, format)
    with bar(f"verifying {path.name}") as report:
        n_bytes = fourfold_dir.verify(path, report)
    show({"path": str(path), "intact": True, "bytes": n_bytes}, json, render_facts)


@app.command()
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Leave the measurements out.")] = False, json: Json = False
) -> None:
    """This machine: kernels, AMX, nodes, limits, measured bandwidth and peak, and what will be used."""
    from fourfold import doctor as machine_doctor

    show(machine_doctor.report(quick=quick), json, machine_doctor.render)


@app.command(name="plan")
def plan_model(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model, a Hugging Face config.json, or a shape such as yuan2-102b; no weights needed.",
        ),
    ],
    machine: Annotated[
        str | None, typer.Option(help="A described machine (nf8260g7, or a TOML file); else this one, measured.")
    ] = None,
    ranks: Ranks = None,
    context: Context = None,
    kv: Kv = None,
    format: Format = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Length of the prompt (default: 512).", show_default=False)
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it: FILE.svg or FILE.png.")] = None,
    save: Annotated[Path | None, typer.Option(help="Keep the machine, as measured, in a TOML file.")] = None,
    json: Json = False,
) -> None:
    """What a model takes and gives on a machine: bytes of each node, ms a token, what bounds it."""
    options = dict(locals())
    from fourfold import cli_plan, plan

    show(cli_plan.plan(options), json, plan.render)


@app.command(name="eval")
def evaluate(
    model: Model,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file.")] = None,
    ids: Annotated[Path | None, typer.Option(help="A .npy file of ids, in place of a text.")] = None,
    lambada: Annotated[
        Path | None, typer.Option(help="Passages whose last words are to be guessed: a JSON object with `text` a line.")
    ] = None,
    passages: Annotated[int | None, typer.Option(help="Guess in the first of the passages only.")] = None,
    against: Annotated[str | None, typer.Option(help="A model to compare with, token by token.")] = None,
    against_format: Annotated[str | None, typer.Option(help="Its format.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens a window (default: 512).", show_default=False)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Measure on the first of the tokens only.")] = None,
    format: Format = None,
    ranks: Ranks = None,
    threads: Threads = None,
    kv: Kv = None,
    rope_angles: RopeAngles = None,
    weights: Weights = None,
    json: Json = False,
) -> None:
    """Perplexity of a text, with --against also KL divergence and top-1 agreement; or LAMBADA's last words."""
    options = dict(locals())
    from fourfold import cli_evaluate
    from fourfold.cli_render import render_facts

    show(cli_evaluate.evaluate(options), json, render_facts)


def _directory(model: str, format: str | None) -> Path:
    from fourfold.llm import check_text
    from fourfold.locate import fourfold_directory
    from fourfold.progress import bar, note

    with bar(f"converting {model}") as report:
        return fourfold_directory(model, format, report=report, notice=note, check=check_text)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console entry point: runs a command and exits with its status."""
    run_as("fourfold", app, arguments)


def run_as(name: str, app: typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a program of this name and exits with its status: 2 for a user's mistake and 1 for a failure, both with one
    sentence on stderr, 130 for an interrupt."""
    for standard, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, standard) is None:  # closed by whoever started us
            setattr(sys, standard, open(os.devnull, mode))  # noqa: SIM115  (for the whole of the process)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    try:
        status = app(args=None if arguments is None else list(arguments), prog_name=name, standalone_mode=False)
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
        sentence, status = _explain(error, name)
        print(f"{name}: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(status or 0)


def _explain(error: Exception, program: str) -> tuple[str, int]:
    """An error as one sentence and an exit status."""
    if hasattr(error, "format_message"):  # the command line itself is wrong
        return f"{error.format_message()} (`{program} --help` lists what there is)", 2
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
