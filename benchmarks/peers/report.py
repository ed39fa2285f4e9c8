"""The results as Markdown: what was done, a table for each work, where others are ahead, and what failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peers.catalogue import FOURFOLD, PEERS
from peers.results import Results

BEGIN, END = "<!-- compare.py begins -->", "<!-- compare.py ends -->"
HEADING = "## Against others"
AHEAD = 1.02  # times as fast as fourfold: below, it is noise


def insert(page: str, section: str) -> str:
    """The page with the section between its marks; where it has none, at the end under a heading of its own."""
    begin, end = page.find(BEGIN), page.find(END)
    marked = f"{BEGIN}\n{section.strip()}\n{END}"
    if 0 <= begin < end:
        return page[:begin] + marked + page[end + len(END) :]
    return f"{page.rstrip()}\n\n{HEADING}\n\n{marked}\n".lstrip()


def markdown(results: Results) -> str:
    """Everything that was measured and everything that was not."""
    parts = (_head, _tables, _ahead, _missing, _notes, _facts)
    return "\n".join(line for part in parts for line in part(results))


def rate(load: Mapping[str, Any], seconds: float) -> str:
    """What people call the speed: tokens/s of a model, ms of a matrix."""
    if load["unit"] == "matrix":
        return _rounded(seconds * 1e3)
    return _rounded(load["tokens"] / seconds)


def unit(load: Mapping[str, Any]) -> str:
    """Of `rate`."""
    return "ms" if load["unit"] == "matrix" else "tokens/s"


def peak_name(machine: Mapping[str, Any]) -> str:
    """Of the fastest instructions that the machine has for numbers with a fraction."""
    return str(machine["peak"]).replace("_", " ").upper()


def behind(results: Results) -> Iterator[tuple[str, str, str, float]]:
    """Work, load, peer, and how many times as fast as fourfold it is, wherever one is faster."""
    for work, facts in results.works.items():
        for load in facts["loads"]:
            for peer in results.peers:
                times = results.speedup(work, load, peer, FOURFOLD.name)
                if times is not None and peer != FOURFOLD.name and times >= AHEAD:
                    yield work, load, peer, times


def _head(results: Results) -> Iterator[str]:
    machine = results.machine
    yield "![fourfold beside others: bars of speed, each with its share of the machine's limit](compare.svg)\n"
    yield (
        f"{machine['threads']} threads of {machine['cpu'] or 'this machine'} ({machine['isa']}), every peer in turn, "
        "round by round, and none at work while another is. Median of the rounds (least–most); then the share of the "
        "limit as measured before and after each turn: reading the packed weights at the read bandwidth, or "
        f"multiplying with them at the {peak_name(machine)} peak, whichever takes longer. "
        "`python benchmarks/compare.py` makes all of this again.\n"
    )


def _tables(results: Results) -> Iterator[str]:
    for work, facts in results.works.items():
        loads = facts["loads"]
        yield f"**{facts['title']}**\n"
        yield "| | " + " | ".join(f"{load['title']}, {unit(load)}" for load in loads.values()) + " |"
        yield "|---" * (len(loads) + 1) + "|"
        for peer, title in results.peers.items():
            cells = [_cell(results, work, name, load, peer) for name, load in loads.items()]
            if any(cells):
                name = f"**{title}**" if peer == FOURFOLD.name else title
                yield f"| {name} | " + " | ".join(cells) + " |"
        yield ""


def _cell(results: Results, work: str, name: str, load: Mapping[str, Any], peer: str) -> str:
    seconds = results.seconds(work, name, peer)
    if seconds is None:
        return ""
    middle, *ends = (rate(load, seconds[key]) for key in ("median", "min", "max"))
    least, most = ends if load["unit"] == "matrix" else reversed(ends)
    return f"{middle} ({least}–{most}); {results.of_limit(work, name, peer):.2f}"


def _ahead(results: Results) -> Iterator[str]:
    found = list(behind(results))
    if not any(sample.peer == FOURFOLD.name for sample in results.samples):
        return
    if not found:
        yield "Nobody is ahead of fourfold in any of these.\n"
        return
    yield "Ahead of fourfold:\n"
    for work, load, peer, times in found:
        facts = results.works[work]
        yield f"- {results.peers[peer]}, {facts['title']}, {facts['loads'][load]['title']}: {times:.2f} × as fast."
    yield ""


def _missing(results: Results) -> Iterator[str]:
    for key, reason in results.failures.items():
        work, peer = key.split("/")
        yield f"- {results.peers[peer]} failed at {results.works[work]['title']}: {reason}"
    if results.failures:
        yield ""


def _notes(results: Results) -> Iterator[str]:
    measured = {sample.peer for sample in results.samples}
    yield "What the figures are of:\n"
    for peer in PEERS:
        if peer.name in measured:
            yield f"- {peer.title}: {peer.note}."
    yield ""


def _facts(results: Results) -> Iterator[str]:
    """What each peer is: versions and paths, the bytes that it reads for the same weights, and what its product is off.

    The error is that of all outputs against a product in float32, so of weights and activations together.
    """
    yield "| work | peer | version | what computes | MB read | error, 1 and 512 tokens | rounds |"
    yield "|---|---|---|---|---|---|---|"
    for key, facts in results.facts.items():
        work, peer = key.split("/")
        errors = facts.get("errors", {})
        first = next(iter(results.works[work]["loads"]))
        n_rounds = sum((s.work, s.load, s.peer) == (work, first, peer) for s in results.samples)
        yield (
            f"| {results.works[work]['title']} | {results.peers[peer]} | {facts['version']} | {facts['path']} "
            f"| {facts['bytes'] / 1e6:.1f} | {', '.join(f'{errors[m]:.4f}' for m in ('1', '512') if m in errors)} "
            f"| {n_rounds} |"
        )


def _rounded(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}" if value >= 0.0995 else f"{value:.4f}"
