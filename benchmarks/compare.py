"""fourfold beside other software on this machine: the same work, as many threads, turn by turn.

    python benchmarks/compare.py                                  everything: set up, measure, report
    python benchmarks/compare.py --setup                          peers and models; half an hour, once
    python benchmarks/compare.py --work matrix-8192 --rounds 3    rounds added to the results
    python benchmarks/compare.py --report                         table and chart from the results

Peers live in virtual environments of their own under --cache, and so do the models and the results. The table goes
between two marks in docs/performance.md, the chart to docs/compare.svg.
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import platformdirs
import typer

from fourfold.bench.limits import check_counts
from fourfold.cli import run_as
from fourfold.errors import RuntimeFailure, UserError
from peers import inputs
from peers.catalogue import FOURFOLD, PEERS, Peer
from peers.chart import chart
from peers.install import NotInstalled, install
from peers.report import insert, markdown
from peers.results import Results, read, write, write_text
from peers.rounds import commands, machine_facts, measure
from peers.work import Work, matrix

DOCS = Path(__file__).parents[1] / "docs"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def works(cache: Path) -> Mapping[str, Callable[[], Work]]:
    """What the peers can be given, by name; calling one makes the files that it needs."""
    return {
        "matrix-8192": lambda: matrix(8192, 8192),
        "matrix-22016": lambda: matrix(8192, 22016),
        "smollm2": inputs.smollm2,
        "llama-3b": lambda: inputs.llama_3b(cache),
    }


@app.command()
def compare(
    work: Annotated[list[str] | None, typer.Option(help="Measure this, or all that begin so; repeatable.")] = None,
    peers: Annotated[str, typer.Option(help="Names with commas between them; all by default.")] = "",
    rounds: Annotated[int, typer.Option(help="Turns of each peer.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of each peer.")] = 2,
    only_setup: Annotated[bool, typer.Option("--setup", help="Set up peers and models.")] = False,
    only_report: Annotated[bool, typer.Option("--report", help="Write the table and the chart.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what was measured of these works before.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Where environments, models and results are kept.")] = None,
    docs: Annotated[Path, typer.Option(help="Where the table and the chart go.")] = DOCS,
) -> None:
    """fourfold beside other software on this machine; without options, everything: set up, measure, report."""
    check_counts(rounds=rounds, threads=threads)
    cache = (cache or Path(platformdirs.user_cache_dir("fourfold")) / "compare").expanduser().absolute()
    chosen, who = _works(work or [""], cache), _peers(peers)
    everything = not (work or only_setup or only_report)
    with _alone(cache):
        if only_setup or everything:
            _set_up(chosen, who, cache)
        if not (only_setup or only_report):
            _measure(chosen, who, rounds, threads, cache, fresh)
        if only_report or everything:
            _report(read(cache / "results.json"), docs)


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Raises UserError where another comparison is at work in the cache: it would disturb this one's figures."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another comparison is at work in {cache}: wait for it, or give another --cache") from None
        yield


def _works(names: Sequence[str], cache: Path) -> dict[str, Callable[[], Work]]:
    chosen = {name: make for name, make in works(cache).items() if name.startswith(tuple(names))}
    for name in names:
        if not any(known.startswith(name) for known in chosen):
            raise UserError(f"there is no work {name!r}; choose among {', '.join(works(cache))}")
    return chosen


def _peers(names: str) -> list[Peer]:
    known = {peer.name: peer for peer in PEERS}
    for name in filter(None, names.split(",")):
        if name not in known:
            raise UserError(f"there is no peer {name!r}; choose among {', '.join(known)}")
    return [peer for peer in PEERS if not names or peer.name in names.split(",")]


def _set_up(chosen: Mapping[str, Callable[[], Work]], who: Sequence[Peer], cache: Path) -> None:
    """Environments and files. What cannot be installed is said, and measured without."""
    for environment in {peer.environment.name: peer.environment for peer in who if peer.environment}.values():
        print(f"setting up {environment.name}: {', '.join(environment.requirements)}", flush=True)
        try:
            install(environment, cache)
        except NotInstalled as failure:
            print(f"{environment.name} cannot be installed: {failure}", file=sys.stderr)
    for make in chosen.values():
        make()


def _measure(
    chosen: Mapping[str, Callable[[], Work]], who: Sequence[Peer], rounds: int, threads: int, cache: Path, fresh: bool
) -> None:
    """Raises RuntimeFailure where fourfold itself fails; others' failures are said and kept."""
    path = cache / "results.json"
    results = read(path, machine_facts(threads))
    results.peers = {peer.name: peer.title for peer in PEERS}
    for name, make in chosen.items():
        work = make()
        if fresh:
            results.forget(name)
        results.works[name] = work.describe()
        able = [peer for peer in who if work.kind in peer.workers]
        measure(work, able, rounds, results, commands(cache, threads), cache / "logs", lambda kept: write(kept, path))
        for peer in able:
            if reason := results.failures.get(f"{name}/{peer.name}"):
                print(f"{name}: {peer.title}: {reason}", file=sys.stderr)
        if FOURFOLD in able and (reason := results.failures.get(f"{name}/{FOURFOLD.name}")):
            raise RuntimeFailure(f"fourfold failed at {name}: {reason}")


def _report(results: Results, docs: Path) -> None:
    write_text(docs / "compare.svg", chart(results))
    page = docs / "performance.md"
    write_text(page, insert(page.read_text(encoding="utf-8") if page.exists() else "", markdown(results)))
    print(f"written: {page} and {docs / 'compare.svg'}")


if __name__ == "__main__":
    run_as("compare", app)
