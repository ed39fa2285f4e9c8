"""A plan for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PARTS = {"weights": "weights", "kv": "KV cache", "reduction": "reduction", "overhead": "overhead"}
_DECODE_BOUNDS = {
    "weights": "reading the weights",
    "kv": "reading the KV cache: a shorter context or --kv int8 would help",
    "reduction": "ranks waiting for each other: fewer ranks would help",
    "overhead": "what a step costs besides reading: the model is small for this machine",
}
_PREFILL_BOUNDS = {
    "matrices": "multiplying with the weights",
    "attention": "attention",
    "reduction": "adding up the ranks' sums",
    "overhead": "what a step costs besides multiplying",
}


def render(answer: Mapping[str, Any], console: Console) -> None:
    """Prints what `plan` returned."""
    ranks = answer["ranks"]
    title = (
        f"{answer['model']} ({answer['parameters'] / 1e9:.2f} B parameters) in {answer['format']}, "
        f"KV in {answer['kv']}, on {answer['machine']['name']}: {ranks} rank{'s' if ranks > 1 else ''}, "
        f"{answer['threads']} threads"
    )
    console.print(title, style="bold", highlight=False)
    console.print(answer["machine"]["about"], highlight=False, markup=False)
    console.print()
    console.print(_memory(answer))
    console.print()
    console.print(_decode(answer))
    console.print()
    for line in _sentences(answer):
        console.print(line, highlight=False)
    for line in answer["advice"]:
        console.print(Text.assemble(("!", "yellow"), f" {line}"), highlight=False)
    for line in answer["notes"]:
        console.print(f"  {line}", highlight=False)


def _memory(answer: Mapping[str, Any]) -> Table:
    table = _table(f"GB, one text of {answer['context']} positions", "weights", "KV cache", "buffers", "sum", "of")
    for node in answer["memory"]["nodes"]:
        numbers = (f"{node[key] / 1e9:.3f}" for key in ("weights", "kv", "buffers", "total"))
        held = ", ".join(map(str, node["ranks"])) or "none"
        table.add_row(f"node {node['node']} (ranks: {held})", *numbers, f"{node['memory'] / 1e9:.1f}")
    return table


def _decode(answer: Mapping[str, Any]) -> Table:
    table = _table("ms a token", *PARTS.values(), "sum", "tokens/s")
    decode = answer["decode"]
    for label, row in (("at the start", decode["at_start"]), (f"after {answer['context'] - 1}", decode["at_context"])):
        table.add_row(label, *(f"{row[key]:.2f}" for key in (*PARTS, "total")), f"{row['tokens_per_s']:.1f}")
    return table


def _sentences(answer: Mapping[str, Any]) -> Iterable[str]:
    decode, prefill, memory = answer["decode"], answer["prefill"], answer["memory"]
    yield (
        f"A token reads {decode['read_weights_gb']:.2f} GB of weights and, after {answer['context'] - 1} others, "
        f"{decode['read_kv_gb']:.2f} GB of KV cache. It is bound by {_DECODE_BOUNDS[decode['bound_by']]}."
    )
    yield (
        f"A prompt of {prefill['tokens']} tokens takes {prefill['seconds']['total']:.2f} s "
        f"({prefill['tokens_per_s']:.0f} tokens/s), bound by {_PREFILL_BOUNDS[prefill['bound_by']]}."
    )
    longest = memory["longest_context"]
    whole = ", all that the model was trained for" if longest == memory["model_context"] else ""
    yield f"The longest context that fits is {longest}{whole}."


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(first)
    for name in columns:
        table.add_column(name, justify="right")
    return table
