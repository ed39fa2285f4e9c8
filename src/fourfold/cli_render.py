"""Results for people: each function prints a dictionary that `--json` would print as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console


def render_inspection(result: Mapping[str, Any], console: Console) -> None:
    """Every tensor, then the sums by kind, then the whole."""
    tensors = _table("tensor", "format", "shape", "bits a weight")
    for row in result["tensors"]:
        shape = " × ".join(map(str, row["shape"]))
        tensors.add_row(row["name"], row["format"], shape, f"{row['bits_per_weight']:.3f}")
    kinds = _table("kind", "tensors", "weights", "bytes", "bits a weight")
    for name, kind in result["kinds"].items():
        sizes = (kind["count"], kind["weights"], kind["bytes"])
        kinds.add_row(name, *(f"{size:,}" for size in sizes), f"{kind['bits_per_weight']:.3f}")
    for table in (tensors, kinds):
        console.print(table)
        console.print()
    facts = {
        "path": result["path"],
        "model": result["model"]["model_type"],
        "format": result["format"],
        "weights": f"{result['weights']:,}",
        "bytes": f"{result['bytes']:,}",
        "bits a quantized weight, all included": f"{result['bits_per_weight']:.4f}",
    }
    recipe = result["recipe"]
    render_facts(facts | (dict(recipe) if isinstance(recipe, Mapping) else {"recipe": recipe}), console)


def render_quality(result: Mapping[str, Any], console: Console) -> None:
    """What a conversion lost, by kind and in all."""
    kinds = _table("kind", "weights", "relative RMS error", "bits a weight")
    for name, kind in {**result["kinds"], "all": result["total"]}.items():
        figures = (f"{kind['relative_rms_error']:.3g}", f"{kind['bits_per_weight']:.4f}")
        kinds.add_row(name, f"{kind['weights']:,}", *figures)
    console.print(kinds)
    console.print()
    tokenizer = ", ".join(result["tokenizer_files"]) or "none found (--tokenizer DIR says where it is)"
    render_facts({"path": result["path"], "format": result["format"], "tokenizer": tokenizer}, console)


def render_facts(result: Mapping[str, Any], console: Console) -> None:
    """Names and values."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value))
    console.print(table)


def _table(*columns: str) -> Table:
    """Words to the left, numbers to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in ("tensor", "kind", "format", "shape") else "right")
    return table
