"""`fourfold synth`: a model of random weights, and how fast the disk took it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any

from fourfold.checkpoint.fourfold_dir import open_directory
from fourfold.keep import DEFAULT_FORMAT
from fourfold.locate import known_config
from fourfold.models import weight_specs
from fourfold.progress import bar
from fourfold.synth import synthesize


def synth(options: Mapping[str, Any]) -> dict[str, Any]:
    """Writes what the options ask for; what was written, and the rate, the disk's own part included."""
    config = known_config(options["config"])
    if options["layers"] is not None:
        config = replace(config, n_layers=options["layers"])
    start = perf_counter()
    with bar(f"writing {options['config']}") as report:
        synthesize(
            config,
            options["destination"],
            options["format"] or DEFAULT_FORMAT,
            seed=options["seed"] or 0,
            threads=options["threads"],
            progress=report,
        )
    seconds = perf_counter() - start
    stored = open_directory(options["destination"])
    n_bytes = sum(tensor.n_bytes for tensor in stored.tensors.values())
    return {
        "path": str(options["destination"]),
        "model_type": config.model_type,
        "format": stored.format,
        "layers": config.n_layers,
        "parameters": sum(math.prod(spec.shape) for spec in weight_specs(config)),
        "bytes": n_bytes,
        "seconds": seconds,
        "gb_s": n_bytes / seconds / 1e9,
    }
