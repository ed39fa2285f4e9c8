"""`fourfold serve`: its flags. All are options of the TOML file, too; a flag that is given wins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fourfold.cli_options import Context, Format, Kv, Ranks, RopeAngles, Template, Threads, Weights
from fourfold.errors import UnsupportedError

Served = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="As for `fourfold run`; may stand in --config instead.")
]
Count = int | None
Seconds = float | None


def serve(
    model: Served = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with any of these options.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at (default: 127.0.0.1).")] = None,
    port: Annotated[Count, typer.Option(help="Port; 0: any that is free (default: 8000).")] = None,
    name: Annotated[str | None, typer.Option(help="By which clients ask for the model.")] = None,
    api_key_file: Annotated[str | None, typer.Option(help="Keys, one a line; also FOURFOLD_API_KEY.")] = None,
    root_path: Annotated[str | None, typer.Option(help="Path below which a proxy mounts the server.")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="A web page elsewhere that may ask; none by default.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A name by which it may be asked, where there is no key; local ones may.")
    ] = None,
    format: Format = None,
    ranks: Ranks = None,
    threads: Threads = None,
    context: Context = None,
    kv: Kv = None,
    rope_angles: RopeAngles = None,
    weights: Weights = None,
    chat_template: Template = None,
    max_running: Annotated[Count, typer.Option(help="Texts that take part in steps (default: 32).")] = None,
    max_waiting: Annotated[Count, typer.Option(help="Texts beside those; more get a 429 (default: 128).")] = None,
    max_wait_seconds: Annotated[
        Seconds, typer.Option(help="After which a text that waits fails (default: 600).")
    ] = None,
    prompt_chunk: Annotated[Count, typer.Option(help="Tokens of prompts a step, at most (default: 512).")] = None,
    stall_seconds: Annotated[
        Seconds, typer.Option(help="That others' tokens may wait for a prompt's step (default: 0.25).")
    ] = None,
    prefix_cache: Annotated[
        str | None, typer.Option(help="Beginnings that are shared: all (default), prompts, or off.")
    ] = None,
    speculate: Annotated[
        bool | None, typer.Option("--speculate/--no-speculate", help="Guess ahead (default: speculate).")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="A smaller model to guess with; else the texts themselves.")] = None,
    max_requests: Annotated[Count, typer.Option(help="HTTP requests at a time (default: 256).")] = None,
    max_connections: Annotated[Count, typer.Option(help="Open ones (default: 1024).")] = None,
    unread_seconds: Annotated[
        Seconds, typer.Option(help="That a client may leave an answer unread (default: 60).")
    ] = None,
    max_body_bytes: Annotated[Count, typer.Option(help="Of a request (default: 4000000).")] = None,
    body_seconds: Annotated[
        Seconds, typer.Option(help="A head, then a body, may take to arrive (default: 30).")
    ] = None,
    max_texts: Annotated[Count, typer.Option(help="Prompts times n of a request (default: 128).")] = None,
    max_n: Annotated[Count, typer.Option(help="Answers to a prompt (default: 16).")] = None,
    max_logprobs: Annotated[Count, typer.Option(help="Log probabilities of a request (default: 1000000).")] = None,
    max_messages: Annotated[Count, typer.Option(help="Of a chat (default: 2048).")] = None,
    max_stops: Annotated[Count, typer.Option(help="Stop strings (default: 16).")] = None,
    max_stop_chars: Annotated[Count, typer.Option(help="Of a stop string (default: 256).")] = None,
    max_biases: Annotated[Count, typer.Option(help="Entries of logit_bias (default: 1024).")] = None,
    max_tools: Annotated[Count, typer.Option(help="Of a chat (default: 128).")] = None,
    max_schema_bytes: Annotated[Count, typer.Option(help="JSON schemas of a request (default: 65536).")] = None,
    max_schema_depth: Annotated[Count, typer.Option(help="Of a JSON schema (default: 32).")] = None,
    drain_seconds: Annotated[
        Seconds, typer.Option(help="That requests may take to end after SIGTERM (default: 60).")
    ] = None,
    measure: Annotated[
        bool | None, typer.Option("--measure/--no-measure", help="Memory bandwidth at the start (default: measure).")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="json, text, or auto (default): by terminal.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info (default), warning or error.")] = None,
) -> None:
    """Serve a model by OpenAI's interface, with a page to chat at."""
    flags = {flag: value for flag, value in locals().items() if flag != "config"}
    try:
        import fastapi  # noqa: F401
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"`fourfold serve` needs {error.name}; install what it needs with `pip install 'fourfold[serve]'`"
        ) from None
    from fourfold.server.options import load_options
    from fourfold.server.start import start

    start(load_options(flags, config))
