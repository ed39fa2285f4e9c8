"""What the AMX kernels would take on Sapphire Rapids, computed from the code that was compiled: not measured.

`python benchmarks/amx_counts.py` (after `make venv`; needs g++, objdump and llvm-mca, which is in Debian's llvm-19).
Each kernel of the release build is executed here instruction by instruction, tile instructions skipped, to see which
instructions it consists of (amx_trace.cpp); amx_machine.py then says how long they would take.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from amx_machine import BOTH_UNITS, DOT_CYCLES, ROWS, Core, Cost, Step

ROOT = Path(__file__).resolve().parent.parent
_TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
# Where scikit-build-core has the release build's (pyproject.toml: build/{wheel_tag}).
KERNELS = (
    ROOT
    / "build"
    / f"{_TAG}-{_TAG}{sys.abiflags}-{re.sub('[-.]', '_', sysconfig.get_platform())}"
    / "CMakeFiles/_core.dir/csrc/kernels"
)
MCA = ("llvm-mca-19", "llvm-mca")
OBJECTS = ("linear_amx", "attention_amx", "linear_avx512")
FREE = Cost(1, 1, ())
MOST_INSTRUCTIONS = 3_000_000
# Kinds of steps and micro-operations, which are assumed.
TILE_OPS = {
    "tileloadd": ("tile_load", 8),
    "tileloaddt1": ("tile_load_t1", 8),
    "tilestored": ("tile_store", 16),
    "tilezero": ("tile_zero", 1),
}
GPRS = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di", *(f"r{i}" for i in range(8, 16)))


@dataclass(frozen=True)
class Case:
    """M tokens, N outputs, K inputs; of attention queries, positions, dimensions. The first half of a trace warms the
    caches for the second; where it is the `core` alone that is asked for, the whole does, and codes come from L2."""

    what: str
    kernel: str
    m: int
    n: int
    k: int
    core: bool = False

    @property
    def units(self) -> float:
        """Tiles of 1,024 weights, or pages of 64 positions."""
        return self.n / 64 if self.kernel.startswith("attend") else self.n / 16 * self.k / 64


CASES = (
    Case("nf4 bf16, 512 tokens", "linear_nf4_bf16_amx", 512, 256, 1024),
    Case("nf4 bf16, 128 tokens", "linear_nf4_bf16_amx", 128, 256, 1024),
    Case("nf4 bf16, 64 tokens", "linear_nf4_bf16_amx", 64, 256, 1024),
    Case("bf16 bf16, 512 tokens", "linear_bf16_bf16_amx", 512, 256, 1024),
    Case("nf4 i16 amx, 16 tokens", "linear_nf4_i16_amx", 16, 64, 2048, True),
    Case("nf4 i16 amx, 8 tokens", "linear_nf4_i16_amx", 8, 64, 2048, True),
    Case("nf4 i16 amx, 4 tokens", "linear_nf4_i16_amx", 4, 64, 2048, True),
    Case("nf4 i16 avx512, 4 tokens", "linear_nf4_i16_avx512", 4, 64, 2048, True),
    Case("nf4 i16 avx512, 1 token", "linear_nf4_i16_avx512", 1, 64, 2048, True),
    Case("attention, bf16 pages", "attend_bf16_amx", 16, 512, 128),
    Case("attention, int8 pages", "attend_int8_amx", 16, 512, 128),
    Case("nf4 bf16, 512 tokens, K 4096", "linear_nf4_bf16_amx", 512, 128, 4096),
)


def registers_of(text: str) -> list[str]:
    """%zmm3, %eax, %tmm1 ... as the whole register that each is a part of."""
    names = []
    for name in re.findall(r"%(\w+)", text):
        if wide := re.fullmatch(r"[xyz]mm(\d+)", name):
            names.append(f"v{wide[1]}")
        elif named := re.fullmatch(r"[re]?(ax|bx|cx|dx|si|di|bp|sp|ip)|([a-d])[lh]|(r\d+)[dwb]?", name):
            names.append(named[1] or (f"{named[2]}x" if named[2] else named[3]))
        elif name not in ("fs", "gs"):
            names.append(name)
    return names


@dataclass(frozen=True)
class Instruction:
    text: str
    opcode: str
    operands: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Instruction:
        text = re.sub(r"^((cs|data16|bnd|notrack) )+|\s*(#.*|<.*>)$", "", text).strip()
        opcode, _, rest = text.partition(" ")
        return cls(text, opcode, tuple(re.split(r",(?![^(]*\))", rest.strip())) if rest.strip() else ())

    @property
    def memory(self) -> str | None:
        return next((op for op in self.operands if "(" in op), None)

    @property
    def is_tile(self) -> bool:
        return self.opcode.startswith(("tile", "tdp", "ldtile"))

    def dependencies(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        *sources, last = self.operands or ("",)
        reads = [name for op in sources for name in registers_of(op)]
        writes: list[str] = []
        only_reads = ("cmp", "test", "j", "push", "vucomi", "ktest", "kortest")
        if "(" in last or not self.operands or self.opcode.startswith(only_reads):
            reads += registers_of(last)
        else:
            writes += registers_of(last)
            keeps = self.opcode.startswith(("mov", "lea", "set", "vmov", "k", "tile")) or self.opcode[0] == "v"
            if not keeps or "fma" in self.opcode or "dp" in self.opcode or "{%k" in last:
                reads += registers_of(last)
        if self.opcode[0] == "j" or self.opcode.startswith(("cmov", "set", "adc", "sbb")):
            reads.append("flags")
        if re.match(r"(add|sub|and|or|xor|cmp|test|inc|dec|neg|sh[lr]|sar|imul)", self.opcode):
            writes.append("flags")
        return tuple(reads), tuple(writes)


def costs_of(texts: list[str], mca: str) -> dict[str, Cost]:
    """What llvm-mca knows of each instruction."""
    with tempfile.NamedTemporaryFile("w", suffix=".s") as source:
        source.write("".join(re.sub(r"^(j\w+|call)\s.*", r"\1 0", text) + "\n" for text in texts))
        source.flush()
        flags = ["-mtriple=x86_64", "-mcpu=sapphirerapids", "-instruction-tables", "-json"]
        out = json.loads(subprocess.run([mca, *flags, source.name], check=True, capture_output=True).stdout)
    region = out["CodeRegions"][0]
    infos = region["InstructionInfoView"]["InstructionList"]
    if len(infos) != len(texts):
        raise SystemExit(f"llvm-mca read {len(infos)} of {len(texts)} instructions")
    pressure: list[dict[int, float]] = [{} for _ in texts]
    for use in region["ResourcePressureView"]["ResourcePressureInfo"]:
        if use["InstructionIndex"] < len(texts):
            pressure[use["InstructionIndex"]][use["ResourceIndex"]] = use["ResourceUsage"]
    return {
        text: Cost(info["NumMicroOpcodes"], info["Latency"], uses_of(text, ports))
        for text, info, ports in zip(texts, infos, pressure, strict=True)
    }


def uses_of(text: str, pressure: dict[int, float]) -> tuple[tuple[int, ...], ...]:
    """Ports with equal shares of a micro-operation are alternatives; whole numbers are as many of its own."""
    uses: list[tuple[int, ...]] = []
    shares: dict[float, list[int]] = {}
    for port, share in pressure.items():
        shares.setdefault(round(share % 1, 3), []).append(port)
        both = "zmm" in text and BOTH_UNITS.match(text)
        uses += [(0, 5) if both and port == 0 else (port,)] * int(share)
    for share, ports in shares.items():
        if share > 0:
            uses += [tuple(ports)] * max(1, round(share * len(ports)))
    return tuple(uses)


def disassemble(program: Path) -> dict[int, Instruction]:
    out = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(program)], check=True, capture_output=True, text=True
    )
    found = re.findall(r"^ *([0-9a-f]+):\t(.*)$", out.stdout, re.MULTILINE)
    return {int(address, 16): Instruction.parse(text) for address, text in found}


def address_of(memory: str, registers: NDArray[np.uint64]) -> int:
    found = re.match(r"(?:%\w+:)?\*?(-?(?:0x)?[0-9a-f]*)\((?:%(\w+))?(?:,%(\w+),(\d))?\)", memory)
    if found is None:
        raise ValueError(f"{memory} is no operand in memory")
    displacement, base, index, scale = found.groups()
    at = int(displacement, 16) if displacement else 0
    for name, times in ((base, 1), (index, int(scale or 1))):
        if name and name != "rip":
            at += int(registers[GPRS.index(registers_of(f"%{name}")[0])]) * times
    return at % 2**64


def steps_of(trace: NDArray[np.uint64], code: dict[int, Instruction], mca: str) -> list[Step]:
    used = [int(address) for address in np.unique(trace[:, 0]) if int(address) in code]
    costs = costs_of(sorted({code[a].text for a in used if not code[a].is_tile}), mca)
    needs = {address: code[address].dependencies() for address in used}
    # What is not in `code` is the C library's, outside the loops.
    return [step_of(code[int(row[0])], row[1:], needs[int(row[0])], costs) for row in trace if int(row[0]) in code]


def step_of(
    it: Instruction,
    registers: NDArray[np.uint64],
    needs: tuple[tuple[str, ...], tuple[str, ...]],
    costs: dict[str, Cost],
) -> Step:
    reads, writes = needs
    if it.opcode.startswith("tdp"):
        return Step("dot", FREE, (*reads, *writes), writes)
    if it.opcode in TILE_OPS:
        kind, micro_ops = TILE_OPS[it.opcode]
        return Step(kind, Cost(micro_ops, 0, ()), reads, writes, tile_lines(it.memory, registers) if it.memory else ())
    if it.is_tile or it.opcode.startswith("nop"):
        return Step("other", FREE, (), ())
    cost = costs[it.text]
    if not it.memory or "%rip" in it.memory or it.opcode.startswith("lea"):
        return Step("compute", cost, reads, writes)
    reads_last = it.opcode.startswith(("cmp", "test", "prefetch"))
    kind = "prefetch" if it.opcode.startswith("prefetch") else "load"
    if "(" in it.operands[-1] and not reads_last:
        kind = "store"
    line = address_of(it.memory, registers) // 64
    if kind == "store":
        return Step(kind, cost, reads, writes, (line,))
    address = tuple(registers_of(it.memory))
    return Step(kind, cost, address, writes, (line,), tuple(name for name in reads if name not in address))


def tile_lines(memory: str, registers: NDArray[np.uint64]) -> tuple[int, ...]:
    """Of 16 rows; where fewer are configured the rest are as many lines too many."""
    stride = int(registers[GPRS.index(registers_of(memory)[1])])
    start = address_of(re.sub(r",%\w+,1", "", memory), registers)
    return tuple((start + r * stride) // 64 for r in range(ROWS))


def build(to: Path, objects: Path) -> None:
    files = [str(objects / f"{name}.cpp.o") for name in OBJECTS]
    source = ROOT / "benchmarks" / "amx_trace.cpp"
    flags = ["-std=c++20", "-O1", "-no-pie", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, str(source), *files, "-o", str(to)], check=True)


def analyse(case: Case, program: Path, code: dict[int, Instruction], mca: str) -> str:
    with tempfile.NamedTemporaryFile() as file:
        arguments = [case.kernel, str(case.m), str(case.n), str(case.k), str(MOST_INSTRUCTIONS), file.name]
        subprocess.run([str(program), *arguments], check=True)
        trace = np.fromfile(file.name, np.uint64).reshape(-1, 17)
    steps = steps_of(trace, code, mca)
    if case.core:
        units, result = case.units, Core().run(steps * 2, len(steps))
    else:
        units, result = case.units / 2, Core().run(steps, len(steps) // 2)
    share = f"{result.dots * DOT_CYCLES / result.cycles:.2f}" if result.dots else "-"
    figures = (result.cycles / units, share, result.loaded / units, result.from_l2 / units, result.far / units)
    return "{:32}{:9.0f}{:>11}{:12.0f}{:9.0f}{:9.1f}".format(case.what, *figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=Path, help="where the compiled kernels lie; the release build's by default")
    parser.add_argument("--only", default="", help="a part of the names of the cases wanted")
    options = parser.parse_args()
    mca = next((name for name in MCA if shutil.which(name)), None)
    if mca is None:
        raise SystemExit("llvm-mca is not here: Debian has it in llvm-19, other systems in their llvm")
    objects = options.objects or KERNELS
    if not objects.is_dir():
        raise SystemExit(f"there are no compiled kernels in {objects}: make venv")
    print("computed, not measured; of a tile of 1,024 weights, or of a page of attention for 16 queries:")
    print(f"{'':32}{'cycles':>9}{'tile unit':>11}{'lines read':>12}{'from L2':>9}{'beyond':>9}")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "amx_trace"
        build(program, objects)
        code = disassemble(program)
        for case in CASES:
            if options.only in case.what:
                print(analyse(case, program, code, mca), flush=True)


if __name__ == "__main__":
    main()
