"""Results for people: a table, and beside it what the limit is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def render(result: Mapping[str, Any], console: Console) -> None:
    """Prints what `linear`, `decode` or `prefill` returned. Ratios are medians, and in brackets their spread."""
    console.print(_title(result), style="bold", highlight=False)
    console.print({"linear": _linear, "decode": _decode, "prefill": _prefill}[result["bench"]](result))
    for line in [*_limits(result["limits"]), _amx(result), *result["notes"]]:
        console.print(line, highlight=False)


def _title(result: Mapping[str, Any]) -> str:
    where = f"{result['threads']} threads in {result['ranks']} rank{'s' if result['ranks'] > 1 else ''}"
    if result["bench"] == "linear":
        what = f"{result['format']} matrix, {result['k']} inputs × {result['n']} outputs"
        what += f", {result['copies']} copies ({result['rotating_bytes'] / 1e9:.2f} GB) in turn"
    else:
        what = f"{result['bench']} of {result['tokens']} tokens from position {result['context']}"
        what += f", {result['model']} in {result['format']}, KV in {result['kv']}"
    return f"{what}, {where}"


def _linear(result: Mapping[str, Any]) -> Table:
    table = _table("tokens", "kernel", "ms", "GB/s", "of read bandwidth", "GFLOP/s", "of peak", "time / 1 token")
    for row in result["rows"]:
        relative = row.get("time_over_1_token")
        table.add_row(
            str(row["tokens"]),
            row["kernel"],
            f"{row['ms']['median']:.3f}",
            f"{row['gb_s']['median']:.2f}",
            _ratio(row["of_read"]),
            f"{row['gflop_s']['median']:.1f}",
            _ratio(row["of_peak"]),
            f"{relative['median']:.2f}" if relative else "",
        )
    return table


def _decode(result: Mapping[str, Any]) -> Table:
    return _facts(
        ("ms a token", _range(result["ms_per_token"], 3)),
        ("tokens/s", _range(result["tokens_per_s"], 1)),
        ("MB a token must read", f"{result['bytes_per_token'] / 1e6:.1f}"),
        ("GB/s", _range(result["gb_s"], 2)),
        ("of read bandwidth", _ratio(result["of_read"])),
        ("kernels", ", ".join(result["kernels"].values())),
    )


def _prefill(result: Mapping[str, Any]) -> Table:
    return _facts(
        ("tokens/s", _range(result["tokens_per_s"], 1)),
        ("GFLOP of matrices", f"{result['matrix_gflop']:.1f}"),
        ("GFLOP of attention", f"{result['attention_gflop']:.1f}"),
        ("GFLOP/s", _range(result["gflop_s"], 1)),
        ("of peak", _ratio(result["of_peak"])),
        ("kernels", ", ".join(result["kernels"].values())),
        ("kernels of the head", ", ".join(result["kernels_head"].values())),
    )


def _limits(limits: Mapping[str, Any]) -> Iterable[str]:
    if "read_gb_s" in limits:
        rates = _range(limits["read_gb_s"], 2)
        yield f"Limit of a few tokens: reading the weights once, at {rates} GB/s (best of four plain read loops)."
    if "peak_gflop_s" in limits:
        rates = _range(limits["peak_gflop_s"], 1)
        yield f"Limit of many tokens: multiplying with them, at {rates} GFLOP/s, the {limits['peak']}."


def _amx(result: Mapping[str, Any]) -> str:
    return f"Kernels for {result['isa']}; AMX is {'used' if result['amx'] else 'not used'}."


def _range(values: Mapping[str, float], digits: int) -> str:
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f}–{values['max']:.{digits}f})"


def _ratio(values: Mapping[str, float]) -> str:
    return _range(values, 3)


def _facts(*rows: tuple[str, str]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table


def _table(*columns: str) -> Table:
    """Numbers to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name == "kernel" else "right")
    return table
