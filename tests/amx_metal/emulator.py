"""Bochs, which has AMX: fetched as source through apt, built without a screen, and run on an image."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
BOCHS = ROOT / "build" / "bochs" / "bochs"  # as `make_bochs` leaves it
SUITE = "trixie"  # the first Debian whose Bochs, 3.0, has AMX
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
FEATURES = ["--enable-x86-64", "--enable-avx", "--enable-evex", "--enable-amx", "--enable-handlers-chaining"]
LEFT_OUT = ["--with-nogui", "--disable-docbook", "--disable-pcidev", "--disable-gameport"]
OURS = "> "  # how a line of the image begins
SECONDS = 1800  # that an image may take; alone on a CPU it takes a minute and a half


class EmulatorError(Exception):
    """Bochs could not be made or ended early; the message ends with what it said last."""


def make_bochs() -> Path:
    """Bochs at BOCHS, fetched and built where it is not there; the system and its package sources stay as they are."""
    if BOCHS.exists():
        return BOCHS
    BOCHS.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BOCHS.parent) as name:
        folder = Path(name)
        _run(["tar", "--extract", "--strip-components=1", "--file", _fetch_source(folder)], folder)
        _mend(folder / "cpu" / "avx" / "amx.cc")
        _run(["./configure", *FEATURES, *LEFT_OUT, "CXXFLAGS=-O2", "CFLAGS=-O2"], folder)
        _run(["make", f"-j{_cpus()}", "bochs"], folder)
        (folder / "bochs").rename(BOCHS)
    return BOCHS


def run(bochs: Path, image: Path, configuration: Path) -> Iterator[str]:
    """What the image says, line by line, without what Bochs says itself."""
    command = ["timeout", str(SECONDS), str(bochs), "-q", "-f", str(configuration)]
    process = subprocess.Popen(
        command, cwd=image.parent, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    others: list[str] = []
    verdict = False
    with process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith(OURS):
                verdict = line.startswith((f"{OURS}PASSED", f"{OURS}FAILED"))
                yield line.removeprefix(OURS).rstrip()
            else:
                others.append(line)
    if not verdict:
        raise EmulatorError(f"{bochs} ended early, status {process.returncode}:\n{''.join(others[-20:])}")


def _fetch_source(folder: Path) -> Path:
    """The archive of Bochs' source from a Debian mirror that this machine uses, checked by Debian's signatures."""
    if not shutil.which("apt-get"):
        raise EmulatorError("there is no apt-get here: build Bochs 3.0 or later with AMX, and name it by --bochs")
    for name in ("lists/partial", "cache"):
        (folder / "apt" / name).mkdir(parents=True)
    sources = folder / "apt" / "sources.list"
    sources.write_text(f"deb-src [signed-by={KEYRING}] {_mirror()} {SUITE} main\n")
    settings = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": folder / "apt" / "lists",
        "Dir::Cache": folder / "apt" / "cache",
        "APT::Sandbox::User": "root",  # who else may not enter this folder
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    _run(["apt-get", *options, "-qq", "update"], folder)
    _run(["apt-get", *options, "-qq", "source", "--download-only", "--tar-only", "bochs"], folder)
    (archive,) = folder.glob("bochs_*.orig.tar.*")
    return archive


def _mirror() -> str:
    """The first Debian mirror among apt's sources."""
    command = ["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages", "Label: Debian"]
    sites = subprocess.run(command, capture_output=True, text=True).stdout.split()
    if not sites:
        raise EmulatorError("apt knows no Debian mirror: run 'sudo apt-get update', or name a Bochs by --bochs")
    return sites[0]


def _mend(source: Path) -> None:
    """Bochs 3.0 extends the signed bytes of TDPBSSD, TDPBSUD and TDPBUSD by zeros (SDM vol. 2: by their signs)."""
    text = source.read_text()
    source.write_text(re.sub(r"Bit32s\(([xy]byte\[\d\])\)", r"Bit32s(Bit8s(\1))", text))


def _run(command: list[str | Path], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-20:])
        raise EmulatorError(f"{shlex.join(map(str, command))} failed, status {done.returncode}:\n{tail}")


def _cpus() -> int:
    return int(subprocess.run(["nproc"], capture_output=True, text=True, check=True).stdout)
