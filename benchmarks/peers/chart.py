"""The results as one SVG picture: a panel of bars for each load, the longer the faster, fourfold's in colour.

Written by hand rather than plotted, so that one file is readable on a light page and on a dark one: its colours are
CSS, and follow the reader's `prefers-color-scheme`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from xml.sax.saxutils import escape

from peers.catalogue import FOURFOLD
from peers.report import peak_name, rate, unit
from peers.results import Results

# All in px. A panel is a name, a bar and a value to a row; two panels lie side by side.
WIDTH, MARGIN, GAP = 960, 28, 36
PANEL = (WIDTH - 2 * MARGIN - GAP) // 2
NAMES, VALUES = 126, 122  # beside the bars
BARS = PANEL - NAMES - VALUES
ROW, BAR = 21, 13
PANEL_HEAD, PANEL_FOOT, WORK_HEAD, TOP, BOTTOM = 26, 16, 38, 82, 52

STYLE = """
  svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
  .page { fill: #ffffff; stroke: #d9dee5; }
  .title { font-size: 21px; font-weight: 700; } .work { font-size: 15px; font-weight: 700; }
  .load { font-size: 13px; font-weight: 600; } .name, .value { font-size: 12px; } .note, .share { font-size: 11.5px; }
  text { fill: #1d2733; } .note, .share, .name { fill: #5b6776; }
  .bar { fill: #b9c2cd; } .rail { fill: #eef1f4; } .rule { stroke: #d9dee5; }
  .us.bar { fill: #0a7d6c; } .us.name, .us.value { fill: #0a7d6c; font-weight: 700; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #12171e; stroke: #2b3440; }
    text { fill: #e6ebf1; } .note, .share, .name { fill: #9aa7b6; }
    .bar { fill: #56626f; } .rail { fill: #1d242d; } .rule { stroke: #2b3440; }
    .us.bar { fill: #2bc4a9; } .us.name, .us.value { fill: #2bc4a9; }
  }
"""


def chart(results: Results) -> str:
    """The picture, whole."""
    body, bottom = [], TOP
    for work, facts in results.works.items():
        panels = [_panel(results, work, name, load) for name, load in facts["loads"].items()]
        panels = [panel for panel in panels if panel]
        if not panels:
            continue
        body.append(f'<line class="rule" x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{bottom}" y2="{bottom}"/>')
        body.append(_text(MARGIN, bottom + 25, "work", facts["title"]))
        bottom += WORK_HEAD
        for left, right in zip(panels[::2], [*panels[1::2], []], strict=False):
            for x, rows in ((MARGIN, left), (MARGIN + PANEL + GAP, right)):
                body.append(f'<g transform="translate({x} {bottom})">{"".join(rows)}</g>')
            bottom += PANEL_HEAD + PANEL_FOOT + ROW * (max(len(left), len(right)) - 1)
    height = bottom + BOTTOM
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            'role="img" aria-label="Speed of fourfold and of other software at the same work">',
            f"<style>{STYLE}</style>",
            f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="12"/>',
            *_captions(results, height),
            *body,
            "</svg>\n",
        ]
    )


def _captions(results: Results, height: int) -> Iterator[str]:
    machine = results.machine
    yield _text(MARGIN, 42, "title", f"The same work, {machine['threads']} threads: longer is faster")
    where = f"{machine['cpu'] or 'this machine'}, {machine['isa'].upper()}. In turn, round by round; medians."
    yield _text(MARGIN, 64, "note", where)
    yield _text(
        MARGIN, height - 20, "note",
        "%: of the limit measured around each turn, be it reading the packed weights or multiplying at the "
        f"{peak_name(machine)} peak.",
    )  # fmt: skip


def _panel(results: Results, work: str, name: str, load: Mapping[str, Any]) -> list[str]:
    """A heading and a row for each peer that was measured, the fastest first; nothing where none was."""
    seconds = {peer: found["median"] for peer in results.peers if (found := results.seconds(work, name, peer))}
    if not seconds:
        return []
    best = min(seconds.values())
    rows = [_text(0, 14, "load", f"{load['title']}, {unit(load)}")]
    for i, peer in enumerate(sorted(seconds, key=lambda peer: seconds[peer])):
        share = results.of_limit(work, name, peer)
        rows.append(_row(PANEL_HEAD + i * ROW, peer, results, load, seconds[peer], best, share))
    return rows


def _row(
    y: int, peer: str, results: Results, load: Mapping[str, Any], seconds: float, best: float, share: float
) -> str:
    us = "us " if peer == FOURFOLD.name else ""
    length, middle = max(2.0, BARS * best / seconds), y + BAR - 2
    return (
        _text(NAMES - 10, middle, f"{us}name", results.peers[peer], "end")
        + f'<rect class="rail" x="{NAMES}" y="{y}" width="{BARS}" height="{BAR}" rx="3"/>'
        + f'<rect class="{us}bar" x="{NAMES}" y="{y}" width="{length:.1f}" height="{BAR}" rx="3"/>'
        + _text(NAMES + BARS + 60, middle, f"{us}value", rate(load, seconds), "end")
        + _text(PANEL, middle, "share", f"{100 * share:.0f} %", "end")
    )


def _text(x: int, y: int, kind: str, text: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
