"""Results for people: a table, and beside it what the limit is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def render(result: Mapping[str, Any], console: Console) -> None:
    """Prints what the benchmarks returned: medians, and in brackets the spread of the repetitions."""
    if result["bench"] == "plan":
        console.print(_plan(result))
        console.print(
            "MB: read a token. Ratio: planned / measured. Others: cores that other processes took.", highlight=False
        )
        return
    console.print(_title(result), style="bold", highlight=False)
    console.print(_TABLES[result["bench"]](result))
    for line in [*_limits(result["limits"]), *_kernels(result), *result["notes"]]:
        console.print(line, highlight=False)


def _title(result: Mapping[str, Any]) -> str:
    where = f"{result['threads']} threads in {result['ranks']} rank{'s' if result['ranks'] > 1 else ''}"
    if result["bench"] == "linear":
        what = f"{result['format']} matrix, {result['k']} inputs × {result['n']} outputs"
        what += f", {result['copies']} copies ({result['rotating_bytes'] / 1e9:.2f} GB) in turn"
    elif result["bench"] == "load":
        what = f"load of {result['model']} in {result['format']}, {result['weight_bytes'] / 1e9:.2f} GB"
    elif result["bench"] == "quantize":
        what = f"quantize {result['source_bytes'] / 1e9:.2f} GB of bf16 to {result['format']}"
    elif result["bench"] == "speculate":
        what = f"drafts by {result['draft']} for {result['model']} in {result['format']}, {result['tokens']} tokens"
    elif result["bench"] == "reduce":
        what = f"all-reduce of {result['kb']} KB, {result['reductions']} times"
    else:
        what = f"{result['bench']} of {result['tokens']} tokens from position {result['context']}"
        what += f", {result['model']} in {result['format']}, KV in {result['kv']}"
    return f"{what}, {where}"


def _linear(result: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("tokens", "ms", "GB/s", "of read limit", "GFLOP/s", "of peak", "/ 1 token"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        relative = row.get("time_over_1_token")
        table.add_row(
            str(row["tokens"]),
            f"{row['ms']['median']:.3f}",
            f"{row['gb_s']['median']:.2f}",
            _range(row["of_read"], 2),
            f"{row['gflop_s']['median']:.0f}",
            _range(row["of_peak"], 2),
            f"{relative['median']:.2f}" if relative else "",
        )
    return table


def _decode(result: Mapping[str, Any]) -> Table:
    return _facts(
        ("ms a step", _range(result["ms_per_step"], 3)),
        ("tokens/s", _range(result["tokens_per_s"], 1)),
        ("MB a step must read", f"{result['bytes_per_step'] / 1e6:.1f}"),
        ("GB/s", _range(result["gb_s"], 2)),
        ("of read limit", _range(result["of_read"], 2)),
        *_disk(result),
    )


def _prefill(result: Mapping[str, Any]) -> Table:
    return _facts(
        ("seconds", _range(result["seconds"], 3)),
        ("tokens/s", _range(result["tokens_per_s"], 1)),
        ("GFLOP of matrices", f"{result['matrix_gflop']:.1f}"),
        ("GFLOP of attention", f"{result['attention_gflop']:.1f}"),
        ("GFLOP/s", _range(result["gflop_s"], 0)),
        ("of peak", _range(result["of_peak"], 2)),
        *_disk(result),
    )


def _disk(result: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if "of_disk" in result:
        yield "GB/s from disk", _range(result["disk_gb_s"], 2)
        yield "of disk limit", _range(result["of_disk"], 2)
        yield "GB of memory in use", f"{result['resident_bytes'] / 1e9:.2f}"


def _load(result: Mapping[str, Any]) -> Table:
    return _facts(
        ("seconds", _range(result["seconds"], 3)),
        ("GB/s of weights", _range(result["gb_s"], 2)),
        ("of copy limit", _range(result["of_copy"], 2)),
        ("peak memory / weights", _range(result["peak_over_weights"], 3)),
    )


def _quantize(result: Mapping[str, Any]) -> Table:
    return _facts(
        ("seconds", _range(result["seconds"], 3)),
        ("GB/s of source", _range(result["gb_s"], 3)),
        ("of packing alone", _range(result["of_pack"], 2)),
        ("of writing alone", _range(result["of_write"], 2)),
    )


def _reduce(result: Mapping[str, Any]) -> Table:
    return _facts(
        ("µs, median", _range(result["us"], 2)),
        ("µs, 99 of 100 below", _range(result["p99_us"], 2)),
        ("limit over median", _range(result["of_limit"], 2)),
    )


def _speculate(result: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("text", "tokens/s without", "tokens/s with drafts", "ratio", "drafted", "right"):
        table.add_column(name, justify="left" if name == "text" else "right")
    for row in result["rows"]:
        table.add_row(
            row["text"],
            f"{row['tokens_per_s_without']['median']:.1f}",
            f"{row['tokens_per_s']['median']:.1f}",
            _range(row["ratio"], 2),
            str(row["drafted"]),
            f"{row['accepted'] / max(1, row['drafted']):.0%}",
        )
    return table


_TABLES = {
    "linear": _linear,
    "decode": _decode,
    "prefill": _prefill,
    "load": _load,
    "quantize": _quantize,
    "reduce": _reduce,
    "speculate": _speculate,
}


def _plan(result: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("model")
    for name in ("ranks", "MB", "read GB/s", "planned ms", "measured ms", "ratio", "others"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        table.add_row(
            Path(row["model"]).name,
            str(row["ranks"]),
            f"{row['bytes_per_token'] / 1e6:.1f}",
            f"{row['read_gb_s']['median']:.1f}",
            f"{row['planned_ms']['median']:.2f}",
            f"{row['measured_ms']['median']:.2f}",
            _range(row["ratio"], 2),
            f"{row['others']['median']:.2f}",
        )
    return table


def _facts(*rows: tuple[str, str]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table


def _limits(limits: Mapping[str, Any]) -> Iterable[str]:
    if "read_gb_s" in limits:
        rates = _range(limits["read_gb_s"], 2)
        yield f"Limit of a few tokens: reading the weights once, at {rates} GB/s, the best of four read loops."
    if "copy_gb_s" in limits:
        rates = _range(limits["copy_gb_s"], 2)
        yield f"Limit of loading: copying from memory to memory, at {rates} GB/s, bytes that arrive."
    if "pack_gb_s" in limits:
        pack, write = _range(limits["pack_gb_s"], 2), _range(limits["write_gb_s"], 2)
        yield f"Limits of quantizing: packing in memory, at {pack} GB/s of the source, on the same threads;"
        yield f"and writing the result to the same disk, at {write} GB/s of the source, synced."
    if "handover_us" in limits:
        trip, whole = _range(limits["round_trip_us"], 2), _range(limits["handover_us"], 2)
        yield f"Limit: a word and the bytes from core to core, in {whole} µs; two words there and back take {trip} µs."
    if "disk_gb_s" in limits:
        rates = _range(limits["disk_gb_s"], 2)
        yield f"Limit of weights that are not in memory: reading them from their file in order, at {rates} GB/s."
    if "peak_gflop_s" in limits:
        rates = _range(limits["peak_gflop_s"], 1)
        yield f"Limit of many tokens: multiplying with them, at {rates} GFLOP/s, the {limits['peak']}."


def _kernels(result: Mapping[str, Any]) -> Iterable[str]:
    if "amx" not in result:  # nothing was multiplied
        return
    if result["bench"] == "linear":
        ran = [(row["kernel"], row["tokens"]) for row in result["rows"]]
    else:
        ran = [(name, rows) for rows, kernels in result["kernels"].items() for name in kernels.values()]
    rows_of = {kernel: ", ".join(str(rows) for name, rows in ran if name == kernel) for kernel, _ in ran}
    kernels = ", ".join(f"{kernel} (M = {rows})" for kernel, rows in rows_of.items())
    yield f"Ran on {result['isa']}, AMX {'' if result['amx'] else 'not '}used: {kernels}."


def _range(values: Mapping[str, float], digits: int) -> str:
    """Median, and in brackets the smallest and the largest."""
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f}–{values['max']:.{digits}f})"
