"""lm-evaluation-harness against `fourfold serve`, and `fourfold eval` beside it: the same passages, the same scores.

    python benchmarks/lm_eval/harness.py --lm-eval /path/to/bin/lm_eval --passages lambada_test.jsonl --count 300

The harness lives in an environment of its own (`pip install "lm_eval[api]==0.4.13" transformers`; no torch is needed).
It gets the model's tokenizer from fourfold's converted directory and nothing from a network. The last line of stdout is
one JSON document; exit status 1 where the two do not agree: accuracy exactly, perplexity within a thousandth.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from fourfold.json_text import json_text

TASKS = Path(__file__).parent
FOURFOLD = (sys.executable, "-c", "from fourfold.cli import main; main()")
SCORED, WRITTEN = "fourfold_last_word", "fourfold_last_word_written"
TOLERANCE = 1e-3  # of perplexity: sums of float32 logarithms, in another order
CONTEXT = 2048  # tokens; the harness would cut longer passages short
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def main(
    passages: Annotated[Path, typer.Option(help="A JSON object with `text` a line.")],
    lm_eval: Annotated[str, typer.Option(help="The harness's command.")] = "lm_eval",
    model: Annotated[str, typer.Option(help="As for `fourfold serve`.")] = "smollm2",
    format: Annotated[str, typer.Option(help="Its format.")] = "f32",
    count: Annotated[int, typer.Option(min=1, help="Passages, from the first on.")] = 300,
    concurrent: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Passages a request.")] = 4,
    eval: Annotated[bool, typer.Option("--eval/--no-eval", help="Run `fourfold eval`, too, and compare.")] = True,
) -> None:
    """Both scores of one model on the same passages."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with passages.open(encoding="utf-8") as lines:
            (folder / "passages.jsonl").write_text("".join(islice(lines, count)), encoding="utf-8")
        with serving(model, format) as address:
            arguments = {
                "base_url": f"{address}v1/completions",
                "model": "served",
                "tokenizer": converted(model, format),
                "tokenizer_backend": "huggingface",
                "num_concurrent": concurrent,
                "max_length": CONTEXT,
                "timeout": 3600,
            }
            harness = run_harness(lm_eval, folder, arguments, batch)
        found: dict[str, Any] = {"harness": harness}
        if eval:
            command = ["eval", model, "--format", format, "--lambada", f"{folder}/passages.jsonl", "--json"]
            done = subprocess.run([*FOURFOLD, *command], stdout=subprocess.PIPE, text=True, check=True)
            found["eval"] = own = json.loads(done.stdout.splitlines()[-1])
            same_perplexity = abs(harness["perplexity"] / (own["perplexity"] or math.nan) - 1) <= TOLERANCE
            found["agree"] = same_perplexity and harness["accuracy"] == own["accuracy"]
    print(json_text(found))
    sys.exit(not found.get("agree", True))


def run_harness(lm_eval: str, folder: Path, arguments: dict[str, Any], batch: int) -> dict[str, float]:
    """Both tasks over `folder`/passages.jsonl: accuracy, perplexity, and the share of last words written right."""
    command = [lm_eval, "run", "--model", "local-completions"]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
    command += ["--include_path", str(TASKS), "--tasks", f"{SCORED},{WRITTEN}", "--batch_size", str(batch)]
    command += ["--output_path", str(folder / "results")]
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(folder / "cache"), "OPENAI_API_KEY": "none"}
    subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr, check=True)
    (file,) = (folder / "results").rglob("results_*.json")
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    return {
        "accuracy": results[SCORED]["acc,none"],
        "perplexity": results[SCORED]["perplexity,none"],
        "written": results[WRITTEN]["exact_match,first_word"],
    }


@contextmanager
def serving(model: str, format: str) -> Iterator[str]:
    """A server's address, from when it is ready until the block ends."""
    flags = ["--format", format, "--name=served", f"--context={CONTEXT}", "--port=0", "--no-measure"]
    command = [*FOURFOLD, "serve", model, *flags, "--log-format=json"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            yield _address(server.stderr)
        finally:
            server.terminate()
            server.stderr.read()


def converted(model: str, format: str) -> Path:
    """The directory with the model's tokenizer.json."""
    from fourfold.locate import fourfold_directory

    return Path(fourfold_directory(model, format))


def _address(log: Iterator[str]) -> str:
    address, said = None, ""
    for line in log:
        said += line
        entry = json.loads(line) if line.startswith("{") else {}
        address = entry.get("address", address)
        if entry.get("message") == "ready" and address is not None:
            return str(address)
    raise SystemExit(f"the server did not start:\n{said}")


if __name__ == "__main__":
    typer.run(main)
