"""`python -m amx_metal`: builds Bochs and the image where they are not there, runs it; status 1 where a check fails."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from amx_metal.emulator import ROOT, EmulatorError, make_bochs, run

HERE = Path(__file__).parent
BUILD = ROOT / "build" / "amx_metal"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m amx_metal", description="fourfold's AMX kernels, executed in Bochs"
    )
    parser.add_argument("--bochs", type=Path, help="another Bochs, with AMX and without its debugger")
    arguments = parser.parse_args()
    try:
        image = make_image()
        bochs = arguments.bochs.resolve() if arguments.bochs else make_bochs()
        started, line = time.monotonic(), ""
        for line in run(bochs, image, HERE / "bochsrc"):
            print(line, flush=True)
        print(f"{time.monotonic() - started:.0f} s")
    except EmulatorError as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if line.startswith("PASSED") else 1


def make_image() -> Path:
    """The ROM of the kernels as they are in this checkout, by the compiler that builds the extension."""
    tools = Path(sys.executable).parent
    ninja = f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"
    for command in (
        [tools / "cmake", "-S", HERE, "-B", BUILD, "-G", "Ninja", ninja],
        [tools / "cmake", "--build", BUILD],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise EmulatorError(f"the image could not be built:\n{done.stdout}")
    return BUILD / "metal.rom"


if __name__ == "__main__":
    sys.exit(main())
