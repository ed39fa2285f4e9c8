"""A sentence in place of an illegal instruction: pure Python, run before the native core is loaded."""

from __future__ import annotations

from pathlib import Path

NEEDED = ("avx2", "fma", "f16c")  # the least that any kernel of the native core is made for


def check(cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Raises ImportError where the CPU is known to lack an instruction set that fourfold cannot do without."""
    try:
        with cpuinfo.open(encoding="ascii", errors="replace") as lines:
            flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), None)
    except OSError:
        return  # not Linux, or no /proc: the core will tell
    if flags is None:
        raise ImportError("fourfold needs an x86-64 CPU with AVX2, and this is not an x86-64 CPU")
    if missing := [name.upper() for name in NEEDED if name not in flags]:
        raise ImportError(
            f"fourfold needs an x86-64 CPU with AVX2 (2013 or later), and this one lacks {', '.join(missing)}"
        )
