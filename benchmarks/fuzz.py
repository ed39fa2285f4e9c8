"""A server among random, wrong and rude clients: afterwards it must hold nothing, and say what it said before.

    python benchmarks/fuzz.py                          SmolLM2, a minute
    python benchmarks/fuzz.py --seconds 3600 --seed 2
    python benchmarks/fuzz.py --url http://127.0.0.1:8000 --model smollm2

Ends with status 1 and a sentence where a request ended in a 5xx, in silence or in something that is no HTTP, where a
valid one was not answered, and where the server lost or kept anything. What was sent, by kind and outcome, goes to
standard output, every complaint to standard error. A server of its own is told to end, too, and checks then itself that
no page, slot or request was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Annotated, Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import typer

from fourfold.cli import run_as
from fourfold.errors import RuntimeFailure, UserError
from fuzzing.acts import Acts
from fuzzing.holdings import Holdings, growth_mb, watch_memory
from load.server import serving

SERVER_OPTIONS = (
    *("--context", "768", "--max-running", "6", "--max-waiting", "10", "--max-requests", "48"),
    *("--body-seconds", "3", "--no-measure", "--allowed-host", "x"),
)
QUIET_SECONDS = 120.0  # after which nothing may be under way any more
COMPLAINTS_SHOWN = 20

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def fuzz(
    model: Annotated[str, typer.Option(help="As for `fourfold serve`.")] = "smollm2",
    seconds: Annotated[float, typer.Option(help="How long.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of everything random that clients do.")] = 1,
    clients: Annotated[int, typer.Option(help="At a time.")] = 12,
    url: Annotated[str | None, typer.Option(help="A server that runs already, rather than one of its own.")] = None,
    growth: Annotated[float, typer.Option(help="MB that its memory may grow in the second half.")] = 64.0,
    log: Annotated[Path, typer.Option(help="What a server of its own says.")] = Path("fuzz.log"),
) -> None:
    """Random requests and rude clients against a server."""
    if seconds <= 0 or clients < 1:
        raise UserError("seconds and clients must be more than 0")
    if url is not None:
        _report(asyncio.run(_storm(url.rstrip("/"), None, Random(seed), seconds, clients, growth)))
        return
    with serving(model, list(SERVER_OPTIONS), log) as server:
        found = asyncio.run(_storm(server.url, server.process.pid, Random(seed), seconds, clients, growth))
    _report(found)


async def _storm(
    url: str, pid: int | None, random: Random, seconds: float, clients: int, growth: float
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """What was sent and what came of it, by kind and outcome; and all complaints."""
    parts, stats = urlsplit(url), _stats(url)
    acts = Acts(random, (parts.hostname or "", parts.port or 80), stats["model"], stats["context"])
    before = await acts.greedy()
    await acts.burst()  # threads start when they are first needed
    holdings = await asyncio.to_thread(Holdings.at_rest, pid) if pid else None
    counts: Counter[tuple[str, str]] = Counter()
    complaints: list[str] = []
    memory: list[float] = []
    end = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < end:
            kind, outcomes = await acts.one()
            for outcome, complaint in outcomes:
                counts[kind, outcome.label] += 1
                if complaint is not None:
                    complaints.append(f"{kind}: {complaint}")

    watcher = asyncio.create_task(watch_memory(pid, memory)) if pid else None
    await asyncio.gather(*(client() for _ in range(clients)))
    if watcher is not None:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
        grown = growth_mb(memory)
        typer.echo(
            f"{memory[0]:.0f} MB at first, {memory[-1]:.0f} MB at the end, {grown:.0f} MB of it in the second half",
            err=True,
        )
        if grown > growth:
            complaints.append(f"memory: it grew by {grown:.0f} MB in the second half, more than {growth:g}")
    complaints += await asyncio.to_thread(_held, url, pid, holdings)
    if (after := await acts.greedy()) != before:
        complaints.append(f"the greedy text was {before!r}, and is {after!r}")
    return counts, complaints


def _stats(url: str) -> dict[str, Any]:
    with urlopen(f"{url}/stats") as response:
        said: dict[str, Any] = json.load(response)
        return said


def _held(url: str, pid: int | None, before: Holdings | None) -> list[str]:
    """What a server still holds though nobody asks for anything."""
    end = time.monotonic() + QUIET_SECONDS
    while True:
        stats = _stats(url)
        held = {"running": stats["running"], "waiting": stats["waiting"], "pages": stats["pages"]["held"]}
        if pid and before:
            now = Holdings.at_rest(pid)
            held |= {"descriptors": now.descriptors - before.descriptors, "threads": now.threads - before.threads}
        if not any(count > 0 for count in held.values()):
            return []
        if time.monotonic() > end:
            return [f"afterwards it holds {count} more {what}" for what, count in held.items() if count > 0]
        time.sleep(0.2)


def _report(found: tuple[Counter[tuple[str, str]], list[str]]) -> None:
    """A table of kinds and outcomes. Raises RuntimeFailure where there were complaints."""
    counts, complaints = found
    typer.echo("| kind | outcome | requests |\n|---|---|---|")
    for (kind, outcome), count in sorted(counts.items()):
        typer.echo(f"| {kind} | {outcome} | {count} |")
    typer.echo(f"| all | | {counts.total()} |")
    for complaint in complaints[:COMPLAINTS_SHOWN]:
        typer.echo(complaint, err=True)
    if complaints:
        raise RuntimeFailure(f"{len(complaints)} things must not be, such as {complaints[0][:300]}")


if __name__ == "__main__":
    run_as("fuzz", app)
