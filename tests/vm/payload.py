"""What a virtual machine boots into: a file system of the few hundred files that the guest's program needs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

PYTHON = "python3.11"  # its directory of modules, wherever it was on this machine
LIBRARIES = "lib"


def file_system(modules: Mapping[str, str], python: Path) -> Iterator[tuple[str, bytes, int]]:
    """(path, contents, mode) of an interpreter and the modules, files by name, that a rehearsal loaded.

    Modules lie by their names in one directory, compiled, without their sources; shared libraries in another.
    """
    files = {name: Path(file) for name, file in modules.items() if name != "__main__"}
    packages = {name for name, file in files.items() if file.stem.split(".")[0] == "__init__"}
    for name, file in files.items():
        place = f"{LIBRARIES}/{PYTHON}/" + name.replace(".", "/") + ("/__init__" if name in packages else "")
        if file.suffix == ".py":
            yield f"{place}.pyc", bytecode(file), 0o644
        else:
            yield f"{place}.so", file.read_bytes(), 0o755
    yield "python", python.read_bytes(), 0o755
    programs = [str(file) for file in (python, *files.values()) if file.suffix != ".py"]
    linked = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=True).stdout
    for name, file in sorted(set(re.findall(r"(\S+) => (/\S+)", linked))):
        yield f"{LIBRARIES}/{name}", Path(file).read_bytes(), 0o755
    for loader in sorted(set(re.findall(r"\t/(\S*/ld-linux\S+) ", linked))):
        yield loader, Path("/", loader).read_bytes(), 0o755


def bytecode(source: Path) -> bytes:
    """A compiled module as Python loads it where there is no source: nothing of the source is checked."""
    import marshal

    code = compile(source.read_bytes(), str(source), "exec", dont_inherit=True)
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


def write_initramfs(out: BinaryIO, files: Mapping[str, tuple[bytes, int]]) -> None:
    """A cpio archive of the kind that Linux unpacks at boot ("newc": buffer-format.rst of the kernel)."""
    folders = {str(parent) for path in files for parent in Path(path).parents if str(parent) != "."}
    for number, folder in enumerate(sorted(folders)):
        _entry(out, number, folder, b"", 0o040755)
    for number, (path, (contents, mode)) in enumerate(files.items(), len(folders)):
        _entry(out, number, path, contents, 0o100000 | mode)
    _entry(out, 0, "TRAILER!!!", b"", 0)


def _entry(out: BinaryIO, number: int, path: str, contents: bytes, mode: int) -> None:
    name = path.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(contents), 0, 0, 0, 0, len(name), 0)
    for part in (b"070701" + b"".join(b"%08X" % field for field in fields) + name, contents):
        out.write(part + bytes(-len(part) % 4))
