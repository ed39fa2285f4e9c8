"""`fourfold run --profile FILE`: the trace in the file, and where the time went as a table on stderr."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fourfold.bench.limits import Limits
from fourfold.errors import ResourceError, UserError
from fourfold.machine import read_machine
from fourfold.profile import Profile
from fourfold.trace_file import dropped_note, write_trace

MEASUREMENTS = 2  # of the limits, one more than this


def check_path(path: Path) -> Path:
    """The path, before a model is loaded for it. Raises UserError where no file could be written there."""
    if path.is_dir():
        raise UserError(f"{path} is a directory; name a file for the trace, such as {path / 'trace.json'}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written; name a file in a directory that is there and is yours")
    return path


def report(profile: Profile, path: Path) -> dict[str, Any]:
    """Writes the trace and measures the limits, right after what they limit; JSON-ready.

    To the profile's summary it adds `limits`, the file, and to each row `of_read` (decode) or `of_peak` (prefill): its
    bytes or FLOP a second over the limit. Where memory for measuring is short, `limits` is empty and says why.
    """
    write_trace(profile, path)
    summary = profile.summary()
    try:
        limits = Limits(read_machine(), profile.plan, read=True, peak=True)
        limits.interleave(MEASUREMENTS, lambda: None)
        measured, note = limits.describe(), None
    except ResourceError as error:
        measured, note = {}, str(error)
    for kind, limit, rate, share in (
        ("decode", "read_gb_s", "gb_s", "of_read"),
        ("prefill", "peak_gflop_s", "gflop_s", "of_peak"),
    ):
        if measured and kind in summary["steps"]:
            for row in summary["steps"][kind]["rows"]:
                row[share] = row[rate] / measured[limit]["median"]
    return {"file": str(path), **summary, "limits": measured, "limits_note": note}


def render(result: Mapping[str, Any]) -> None:
    """What `report` returned, on stderr."""
    console = Console(stderr=True, highlight=False, markup=False)
    for kind, step in result["steps"].items():
        console.print(_title(kind, step), style="bold")
        console.print(_rows(kind, step))
        for line in _kernels(step["rows"]):
            console.print(line)
        console.print()
    console.print("Each thread's time, ms", style="bold")
    console.print(_threads(result))
    for line in _notes(result):
        console.print(line)


def _title(kind: str, step: Mapping[str, Any]) -> str:
    count = f"{step['steps']} step{'s' if step['steps'] > 1 else ''}, {step['tokens']} tokens"
    return f"{kind}: {count}, {step['ms']:.1f} ms"


def _rows(kind: str, step: Mapping[str, Any]) -> Table:
    rate, name, share, limit = {
        "decode": ("gb_s", "GB/s", "of_read", "of read"),
        "prefill": ("gflop_s", "GFLOP/s", "of_peak", "of peak"),
    }[kind]
    table = _table("op", "calls", "ms", "of step", "packing", "waiting", name, limit)
    for row in step["rows"]:
        has_rate = bool(row["kernels"])
        table.add_row(
            row["op"],
            str(row["calls"]),
            f"{row['ms']:.2f}",
            f"{row['ms'] / step['ms']:.1%}",
            f"{row['pack_ms']:.2f}" if row["pack_ms"] else "",
            f"{row['wait_ms']:.2f}",
            f"{row[rate]:.1f}" if has_rate else "",
            f"{row[share]:.2f}" if has_rate and share in row else "",
        )
    entering = step["entering_ms"]
    table.add_row("enter and leave", str(step["steps"]), f"{entering:.2f}", f"{entering / step['ms']:.1%}", *[""] * 4)
    packing, waiting = (sum(row[name] for row in step["rows"]) for name in ("pack_ms", "wait_ms"))
    total = sum(row["ms"] for row in step["rows"]) + entering
    amount = (step["bytes"] if kind == "decode" else step["gflop"] * 1e9) / 1e6 / total
    table.add_row("together", "", f"{total:.2f}", f"{total / step['ms']:.1%}", f"{packing:.2f}", f"{waiting:.2f}",
                  f"{amount:.1f}", "")  # fmt: skip
    return table


def _kernels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each kernel: whether it uses AMX, and what ran on it in which layers."""
    ran: dict[str, list[str]] = {}
    for row in rows:
        for kernel in row["kernels"]:
            where = f" ({_layers(row['layers'])})" if row["layers"] else ""
            ran.setdefault(f"{kernel} (AMX {'' if row['amx'] else 'not '}used)", []).append(row["op"] + where)
    return [f"{kernel}: {', '.join(ops)}" for kernel, ops in ran.items()]


def _layers(layers: Sequence[int]) -> str:
    """ "layers 0–3, 5": runs of numbers."""
    starts = [layers[0], *(b for a, b in pairwise(layers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(layers) if b != a + 1), layers[-1]]
    runs = ", ".join(f"{a}–{b}" if b > a else f"{a}" for a, b in zip(starts, ends, strict=True))
    return f"layer{'s' if len(layers) > 1 else ''} {runs}"


def _threads(result: Mapping[str, Any]) -> Table:
    phases = {
        "work": "work_ms",
        "packing": "pack_ms",
        "waiting": "wait_ms",
        "enter, leave": "entering_ms",
        "outside": "outside_ms",
    }
    table = _table("rank", "thread", *phases, "together")
    for row in result["threads"]:
        times = [row[name] for name in phases.values()]
        table.add_row(str(row["rank"]), str(row["thread"]), *(f"{ms:.2f}" for ms in times), f"{sum(times):.2f}")
    return table


def _notes(result: Mapping[str, Any]) -> list[str]:
    limits = result["limits"]
    notes = [
        "Outside: between steps; sampling, Python, and the profile itself "
        f"({result['profiling_ms']:.2f} ms). All of it: {result['wall_ms']:.2f} ms."
    ]
    if limits:
        notes.append(
            f"Limits, measured right after: reading at {limits['read_gb_s']['median']:.1f} GB/s, "
            f"multiplying at {limits['peak_gflop_s']['median']:.0f} GFLOP/s, the {limits['peak']}."
        )
    else:
        notes.append(f"No shares of limits: {result['limits_note']}.")
    notes.append(f"The trace is in {result['file']}; open it with ui.perfetto.dev or chrome://tracing.")
    if result["steps_without_trace"]:
        notes.append(dropped_note(result["steps_without_trace"]))
    return notes


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name == "op" else "right")
    return table
