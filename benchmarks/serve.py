"""A server under load: latencies and throughput at 1, 8, 32 and 128 clients, and its share of the same work offline.

    python benchmarks/serve.py                       SmolLM2; about ten minutes
    python benchmarks/serve.py --clients 8 --requests 4 --rounds 1

Clients send prompts of 16 to 2,000 tokens, arrive as a Poisson process, and one in ten hangs up amid its answer.
Afterwards nothing may be held any more. The table goes to standard output, and with --docs between two marks of
docs/serving.md and docs/serving.zh.md, the chart to docs/serving-load.svg beside them.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from fourfold import LLM
from fourfold.cli import run_as
from fourfold.errors import RuntimeFailure, UserError
from fourfold.json_text import json_text
from load.clients import drive
from load.offline import tokens_per_second
from load.report import chart, markdown, summary
from load.server import Server, serving
from load.traffic import traffic

THINK_SECONDS, LEAVING = 0.5, 0.1
PAGES, CHART = {"serving.md": "en", "serving.zh.md": "zh"}, "serving-load.svg"
BEGIN, END = "<!-- load: begin -->", "<!-- load: end -->"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="As for `fourfold serve`.")] = "smollm2",
    clients: Annotated[str, typer.Option(help="Levels, with commas.")] = "1,8,32,128",
    requests: Annotated[int, typer.Option(help="Of each client, on average.")] = 3,
    rounds: Annotated[int, typer.Option(help="Turns of server and offline for the share.")] = 3,
    share_at: Annotated[int, typer.Option(help="Clients for the share.")] = 32,
    speculate: Annotated[bool, typer.Option(help="With drafts.")] = True,
    docs: Annotated[Path | None, typer.Option(help="Where serving.md and the chart are.")] = None,
    log: Annotated[Path, typer.Option(help="What the server says.")] = Path("serve-load.log"),
) -> None:
    """A server under load, beside the same work offline."""
    if not all(level.isdecimal() and int(level) for level in clients.split(",")) or min(requests, rounds, share_at) < 1:
        raise UserError("clients, requests and rounds are whole numbers from 1 on")
    options = [] if speculate else ["--no-speculate"]
    with LLM(model) as llm, serving(model, [*options, "--no-measure", "--max-running", str(share_at)], log) as server:
        vocab, files = llm.tokenizer.vocab_size, server.open_files()
        levels = []
        for n in map(int, clients.split(",")):
            asks = traffic(max(12, requests * n), vocab, THINK_SECONDS, LEAVING, seed=n)
            records, seconds = asyncio.run(drive(server.url, server.stats()["model"], asks, n))
            levels.append({"clients": n, **summary(records, seconds)})
            typer.echo(json_text(levels[-1]), err=True)
            if leaks := server.leaks(files):
                raise RuntimeFailure(f"after {n} clients the server still holds {', '.join(leaks)}")
        share = _share(llm, server, share_at, requests, rounds, speculate)
        facts = llm.describe()
    title = f"{model} in {facts['format']}, {facts['threads']} threads, {facts['isa']}"
    results = {"title": title, "levels": levels, "share": share}
    typer.echo(markdown(results, CHART))
    if docs is not None:
        for page, language in PAGES.items():
            _insert(docs / page, markdown(results, CHART, language))
        chart(results, docs / CHART)


def _share(llm: LLM, server: Server, clients: int, requests: int, rounds: int, speculates: bool) -> dict[str, Any]:
    """Tokens/s of the server over tokens/s offline, turn by turn, of clients who neither think nor leave."""
    served, offline = [], []
    for seed in range(rounds):
        asks = traffic(requests * clients, llm.tokenizer.vocab_size, 0.0, 0.0, seed=1000 + seed)
        records, seconds = asyncio.run(drive(server.url, server.stats()["model"], asks, clients))
        if errors := [r.error for r in records if r.error]:
            raise RuntimeFailure(f"the server refused: {errors[0]}")
        served.append(sum(r.tokens for r in records) / seconds)
        offline.append(tokens_per_second(llm, asks, clients, speculates=speculates))
        typer.echo(f"served {served[-1]:.1f}, offline {offline[-1]:.1f} tokens/s", err=True)
    ratios = [a / b for a, b in zip(served, offline, strict=True)]
    return {
        "clients": clients,
        "requests": requests * clients,
        "rounds": rounds,
        "served": median(served),
        "offline": median(offline),
        "ratio": median(ratios),
    }


def _insert(page: Path, table: str) -> None:
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"{page} lacks the marks {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


if __name__ == "__main__":
    run_as("serve", app)
