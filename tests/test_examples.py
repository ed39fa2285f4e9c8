"""The examples for administrators are true: every option, and what systemd is told."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import tomllib
from pathlib import Path

import pytest

from fourfold.server import notify
from fourfold.server.options import ServeOptions, load_options
from serving import served

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_toml_file_has_every_option_with_its_default() -> None:
    text = (EXAMPLES / "fourfold.toml").read_text(encoding="utf-8")
    options = load_options({}, EXAMPLES / "fourfold.toml")
    assert options == ServeOptions(model="smollm2")
    shown = tomllib.loads(text)
    others = tomllib.loads("\n".join(re.findall(r"^# (\w+ = .*)", text, re.MULTILINE)))
    assert not shown.keys() & others.keys()
    assert sorted([*shown, *others]) == sorted(ServeOptions.model_fields)
    assert all(ServeOptions.model_fields[name].default is None for name in others)
    ServeOptions(**(shown | others))  # each of a possible form


def test_the_unit_is_one(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = (EXAMPLES / "fourfold.service").read_text(encoding="utf-8")
    installed = tmp_path / "fourfold.service"
    installed.write_text(unit.replace("/opt/fourfold/bin/fourfold", "/bin/true"))
    ran = subprocess.run(["systemd-analyze", "verify", installed], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    drain = ServeOptions(model="x").drain_seconds
    assert int(re.findall(r"TimeoutStopSec=(\d+)s", unit)[0]) > drain, "systemd would not let requests end"


@pytest.mark.parametrize("is_abstract", [False, True])
def test_systemd_hears_of_the_servers_beginning_and_end(
    is_abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"@fourfold-{tmp_path.name}" if is_abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(name.replace("@", "\0") if is_abstract else name)
        end.settimeout(100)
        monkeypatch.setenv(notify.VARIABLE, name)
        with served() as server:
            assert end.recv(100) == b"READY=1"
            assert server.service.is_ready
        assert end.recv(100) == b"STOPPING=1"


def test_that_systemd_does_not_listen_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(notify.VARIABLE, str(tmp_path / "nobody"))
    with served() as server:
        assert server.chat().status_code == 200
