"""Starts virtual machines: QEMU in software emulation, Debian's kernel for clouds, and `guest` as process 1."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vm import guest, payload
from vm.models import Model
from vm.topology import Topology

EMULATOR = "qemu-system-x86_64"
KERNEL_PACKAGE = "linux-image-cloud-amd64"
KERNEL = Path(__file__).parents[2] / "build" / "vm" / "vmlinuz"  # as `fetch_kernel` leaves it
SECONDS = 900  # that a machine may take; alone on two CPUs it takes half a minute
QUIET = {"OPENBLAS_NUM_THREADS": "1"}  # no threads but fourfold's


class BootError(Exception):
    """A machine could not be made or did not report; the message ends with what it said last."""


def missing() -> str | None:
    """What keeps machines from being booted here, in words; None where nothing does."""
    if not shutil.which(EMULATOR):
        return f"{EMULATOR} is not installed: `make nodes` installs qemu-system-x86 and runs this"
    if not KERNEL.exists():
        return f"{KERNEL} is not there: `make nodes` unpacks {KERNEL_PACKAGE} there and runs this"
    return None


def fetch_kernel() -> None:
    """Downloads Debian's kernel package and keeps the kernel alone; nothing is installed."""
    if KERNEL.exists():
        return
    if not shutil.which("apt-get"):
        raise BootError(f"there is no apt-get here: put the kernel of Debian's {KERNEL_PACKAGE} at {KERNEL}")
    if not (name := _newest_kernel()):
        raise BootError(f"apt knows no package {KERNEL_PACKAGE}: run 'sudo apt-get update' and try again")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["apt-get", "download", "-q", name], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise BootError(f"{name} could not be downloaded: {done.stderr.strip()}")
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "--extract", package, folder], check=True)
        (kernel,) = Path(folder).glob("boot/vmlinuz-*")
        KERNEL.parent.mkdir(parents=True, exist_ok=True)
        partial = KERNEL.with_suffix(".partial")
        shutil.copyfile(kernel, partial)
        partial.rename(KERNEL)


def _newest_kernel() -> str | None:
    """The package that KERNEL_PACKAGE stands for, by what apt knows."""
    command = ["apt-cache", "depends", "--important", KERNEL_PACKAGE]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    return next((line.split()[1] for line in said.splitlines() if "Depends: linux-image-" in line), None)


def make_initramfs(folder: Path, models: dict[str, Model], topologies: list[Topology]) -> Path:
    """What every machine boots into: the program, the models, and each topology's orders."""
    files: dict[str, tuple[bytes, int]] = {"guest.pyc": (payload.bytecode(Path(guest.__file__)), 0o644)}
    for topology in topologies:
        files[f"orders/{topology.name}.json"] = (json.dumps(orders(topology, models)).encode(), 0o644)
    for name, model in models.items():
        for file in model.path.iterdir():
            files[f"models/{name}/{file.name}"] = (file.read_bytes(), 0o644)
    for path, contents, mode in payload.file_system(rehearse(folder, models), Path(sys.executable).resolve()):
        files[path] = (contents, mode)
    with (folder / "initramfs").open("wb") as out:
        payload.write_initramfs(out, files)
    return folder / "initramfs"


def orders(topology: Topology, models: dict[str, Model], root: str = "/models") -> dict[str, Any]:
    """Guest's orders; `root` is where the models lie for it."""
    runs = [
        {**run, "model": f"{root}/{run['model']}", "ids": models[run["model"]].ids, "n_steps": 8}
        for run in topology.runs
    ]
    return {"runs": runs}


def rehearse(folder: Path, models: dict[str, Model]) -> dict[str, str]:
    """Runs the guest's program here, in a process of its own: the modules that it loads."""
    name, model = next(iter(models.items()))
    run = {
        "name": name,
        "model": str(model.path),
        "ids": model.ids,
        "n_steps": 1,
        "cpus": [],
        "options": {},
        "against": "",
    }
    (folder / "rehearsal.json").write_text(json.dumps({"runs": [run]}))
    command = [sys.executable, guest.__file__, str(folder / "rehearsal.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=QUIET)
    modules: dict[str, str] = _report(done.stdout, done.stderr)["modules"]
    return modules


def boot(topology: Topology, initramfs: Path) -> dict[str, Any]:
    """The report of a machine of that kind."""
    environment = QUIET | {"PYTHONHOME": "/", "LD_LIBRARY_PATH": f"/{payload.LIBRARIES}"}
    kernel_line = ["console=ttyS0", "quiet", "panic=-1", "transparent_hugepage=madvise", "rdinit=/python"]
    kernel_line += [f"{name}={value}" for name, value in environment.items()]
    kernel_line += ["--", "-S", "/guest.pyc", f"/orders/{topology.name}.json"]
    command = [EMULATOR, "-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-machine", "q35"]
    command += ["-accel", "tcg,thread=multi", "-cpu", "max", *topology.emulator_options(), "-serial", "stdio"]
    command += ["-kernel", str(KERNEL), "-initrd", str(initramfs), "-append", " ".join(kernel_line)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace")
        raise BootError(f"{topology.name} did not end within {SECONDS} s; it said: {said[-2000:]}") from None
    return _report(done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def _report(out: str, err: str) -> dict[str, Any]:
    for line in out.splitlines():
        if guest.MARK in line:
            report: dict[str, Any] = json.loads(line.partition(guest.MARK)[2])
            return report
    raise BootError(f"no report came; what came was: {out[-3000:]}{err[-3000:]}")
