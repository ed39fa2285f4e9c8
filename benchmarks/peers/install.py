"""Each peer's own virtual environment, made once and kept in the cache."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from peers.catalogue import Environment

HERE = Path(__file__).parent
SHOWN = 300  # characters of a reason


class NotInstalled(Exception):
    """A peer's environment is not there or could not be made; the message is the reason, in a line."""


def python_of(environment: Environment | None, cache: Path) -> Path:
    """The interpreter that a peer's worker runs in. Raises NotInstalled, with the reason of the last attempt."""
    if environment is None:
        return Path(sys.executable)
    folder = _folder(environment, cache)
    if _recipe_of(folder) != _recipe(environment):
        failure = _failure(folder)
        remedy = "run `python benchmarks/compare.py --setup`"
        raise NotInstalled(f"not installed: {failure.read_text() if failure.exists() else remedy}")
    return folder / "bin" / "python"


def install(environment: Environment, cache: Path) -> None:
    """Makes the environment, unless it is there as it should be. Raises NotInstalled; what pip said stays in a log."""
    folder = _folder(environment, cache)
    if _recipe_of(folder) == _recipe(environment):
        return
    shutil.rmtree(folder, ignore_errors=True)
    log = cache / "logs" / f"install-{environment.name}.log"
    for place in (log.parent, folder.parent):
        place.mkdir(parents=True, exist_ok=True)
    variables = {name: value.replace("{HERE}", str(HERE)) for name, value in environment.variables.items()}
    pip = [str(folder / "bin" / "pip"), "install", "--no-cache-dir", "--disable-pip-version-check"]
    try:
        with log.open("w") as out:
            for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, *environment.requirements]):
                _run(command, {**os.environ, **variables}, out, environment.minutes)
    except NotInstalled as failure:
        _failure(folder).write_text(str(failure))
        raise
    _failure(folder).unlink(missing_ok=True)
    (folder / "recipe.json").write_text(json.dumps(_recipe(environment)))  # last: a broken environment has none


def reason(log: Path) -> str:
    """The line of a log that says most about why it ended: its last error, else the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line.lower()]
    return (telling or lines or ["it ended without a word"])[-1][:SHOWN]


def ended(status: int) -> str:
    """How a process ended, from its status as subprocess gives it."""
    return f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _run(command: Sequence[str], variables: Mapping[str, str], log: TextIO, minutes: float) -> None:
    """Runs a command to its end. Raises NotInstalled where that is a bad one or does not come; nothing then runs on."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
    except OSError as error:
        raise NotInstalled(f"{command[0]} does not start: {error.strerror}") from None
    try:
        status = process.wait(timeout=60 * minutes)
    except BaseException as end:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(end, subprocess.TimeoutExpired):
            raise NotInstalled(
                f"installing took more than {minutes} minutes (see logs/{Path(log.name).name})"
            ) from None
        raise
    if status:
        raise NotInstalled(f"{ended(status)}: {reason(Path(log.name))} (see logs/{Path(log.name).name})")


def _folder(environment: Environment, cache: Path) -> Path:
    return cache / "venvs" / environment.name


def _failure(folder: Path) -> Path:
    """Where the reason is kept for which there is no such environment."""
    return folder.with_name(f"{folder.name}.failed")


def _recipe(environment: Environment) -> list[object]:
    return [sys.version.split()[0], list(environment.requirements), dict(environment.variables)]


def _recipe_of(folder: Path) -> object:
    try:
        return json.loads((folder / "recipe.json").read_text())
    except (OSError, ValueError):
        return None
