"""Each peer's own virtual environment, made once and kept in the cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from peers.catalogue import Environment

HERE = Path(__file__).parent
SHOWN = 300  # characters of a reason


class NotInstalled(Exception):
    """A peer's environment is not there or could not be made; the message is the reason, in a line."""


def python_of(environment: Environment | None, cache: Path) -> Path:
    """The interpreter that a peer's worker runs in. Raises NotInstalled."""
    if environment is None:
        return Path(sys.executable)
    folder = _folder(environment, cache)
    if _recipe_of(folder) != _recipe(environment):
        raise NotInstalled("not installed: run `python benchmarks/compare.py --setup`")
    return folder / "bin" / "python"


def install(environment: Environment, cache: Path) -> None:
    """Makes the environment, unless it is there as it should be. Raises NotInstalled; what pip said stays in a log."""
    folder, log = _folder(environment, cache), cache / "logs" / f"install-{environment.name}.log"
    if _recipe_of(folder) == _recipe(environment):
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(folder / "bin" / "pip"), "install", "--no-cache-dir", "--disable-pip-version-check"]
    variables = {name: value.replace("{HERE}", str(HERE)) for name, value in environment.variables.items()}
    with log.open("w") as out:
        for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, *environment.requirements]):
            try:
                subprocess.run(
                    command, check=True, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    env={**os.environ, **variables}, timeout=60 * environment.minutes,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise NotInstalled(f"installing took more than {environment.minutes} minutes: see {log}") from None
            except (subprocess.CalledProcessError, OSError):
                raise NotInstalled(f"{reason(log)} (see {log})") from None
    (folder / "recipe.json").write_text(json.dumps(_recipe(environment)))  # last: a broken environment has none


def reason(log: Path) -> str:
    """The line of a log that says most about why it ended: the last that names an error, else the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    return (telling or lines or ["it ended without a word"])[-1][:SHOWN]


def _folder(environment: Environment, cache: Path) -> Path:
    return cache / "venvs" / environment.name


def _recipe(environment: Environment) -> list[object]:
    return [sys.version.split()[0], list(environment.requirements), dict(environment.variables)]


def _recipe_of(folder: Path) -> object:
    try:
        return json.loads((folder / "recipe.json").read_text())
    except (OSError, ValueError):
        return None
