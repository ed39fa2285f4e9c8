"""What several commands of the command line share: their options, and how a result is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourfold.json_text import json_text

if TYPE_CHECKING:
    from rich.console import Console

MODEL = "smollm2"  # the bundled real model

Model = Annotated[str, typer.Argument(help="A fourfold, Hugging Face or Megatron directory, a GGUF file, or smollm2.")]
Format = Annotated[
    str | None,
    typer.Option(
        help="nf4, int4, fp4, fp4_bnb, uint4, int8, bf16 or f32; default nf4, or what keeps a quantized file's codes.",
        show_default=False,
    ),
]
Ranks = Annotated[int | None, typer.Option(help="Slices of the model; one to a NUMA node by default.")]
Threads = Annotated[int | None, typer.Option(help="Threads of all ranks together; one to a core by default.")]
Context = Annotated[int | None, typer.Option(help="Positions to make room for; the model's own by default.")]
Kv = Annotated[str | None, typer.Option(help="Cache of keys and values: bf16 (default), int8 or f32.")]
RopeAngles = Annotated[str | None, typer.Option(help="f32 or bf16, as the model was trained.")]
Weights = Annotated[str | None, typer.Option(help="auto (default), memory, or disk: read anew for every token.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document as the last line of stdout.")]
Prompt = Annotated[str | None, typer.Option("-p", "--prompt", help="What to ask; else stdin.", show_default=False)]
Ids = Annotated[str | None, typer.Option(help="Token ids in place of a prompt: 1,15043,29892.", show_default=False)]
System = Annotated[str | None, typer.Option(help="The system message.")]
Template = Annotated[str | None, typer.Option("--chat-template", help="In place of the model's: yuan-n, yuan-newline.")]
MaxTokens = Annotated[int | None, typer.Option(help="Stop after this many (default: 512).", show_default=False)]
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
Isa = Annotated[str | None, typer.Option(help="Force kernels: scalar, avx2, avx512_vnni, avx512 or amx.")]
Attend = Annotated[str | None, typer.Option(help="Force a kernel of attention by its name.")]
Repeats = Annotated[int | None, typer.Option(help="Measurements to take the median of.")]
Tokens = Annotated[int | None, typer.Option(help="Tokens: at once (prefill), or one after another (decode).")]
Start = Annotated[int | None, typer.Option("--context", help="Random tokens that go before (default: 0).")]


def show(result: Mapping[str, Any], json: bool, render: Callable[[dict[str, Any], Console], None]) -> None:
    """A result on stdout: as JSON, in which a figure that is no number is null, or for people."""
    if json:
        print(json_text(result))
        return
    from rich.console import Console

    render(dict(result), Console(markup=False))  # a path may have brackets in it
