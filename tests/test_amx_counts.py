"""benchmarks/amx_counts.py: the core on paper keeps the facts it was given, and traces are whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import fourfold._core as _core
from amx_counts import FREE, KERNELS, ROOT, Case, Instruction, build, disassemble, registers_of, uses_of
from amx_machine import Core, Cost, Step


def dot(sums: int) -> Step:
    return Step("dot", FREE, ("tmm6", "tmm7", f"tmm{sums}"), (f"tmm{sums}",))


def load(tile: int, first_line: int, kind: str = "tile_load") -> Step:
    return Step(kind, Cost(8, 0, ()), (), (f"tmm{tile}",), tuple(range(first_line, first_line + 16)))


@pytest.mark.parametrize(
    ("steps", "cycles"),
    [
        ([dot(i % 4) for i in range(400)], 16),  # four sums in turn: the unit is never idle
        ([dot(0) for _ in range(400)], 52),  # one: each product waits for the last
        ([load(i % 4, i % 4 * 16) for i in range(400)], 8),
        ([load(i % 4, i % 4 * 16, "tile_load_t1") for i in range(400)], 33),
        ([load(i % 4, i * 16 % 8192) for i in range(2000)], 16 * 64 / 48),  # 512 KB: from L2
        ([load(4, 0) for _ in range(100)], 8),
        ([Step("compute", Cost(1, 4, ((0, 5),)), (), ("v0",)) for _ in range(400)], 0.5),
        ([Step("compute", Cost(1, 4, ((0, 5),)), ("v0",), ("v0",)) for _ in range(400)], 4),
        ([Step("compute", FREE, (), ()) for _ in range(1200)], 1 / 6),
    ],
)
def test_steady_rates(steps: list[Step], cycles: float) -> None:
    half = len(steps) // 2
    result = Core().run(steps, half)
    assert result.cycles / (len(steps) - half) == pytest.approx(cycles, rel=0.1)


def test_lines_that_share_a_set_do_not_stay() -> None:
    apart, together = [64 * 1024 // 64 + 1, 128 * 1024 // 64]  # lines; 128 KB is a way of L2
    for step, beyond in ((apart, 0), (together, 32)):
        lines = [i * step for i in range(32)] * 2
        steps = [Step("load", Cost(1, 5, ((2, 3),)), (), ("v0",), (line,)) for line in lines]
        assert Core().run(steps, 32).far == beyond


def test_a_sum_waits_for_the_operation_alone_where_its_other_operand_is_loaded() -> None:
    step = Step("load", Cost(1, 13, ((0, 5), (2, 3))), ("ax",), ("v0",), (7,), ("v0",))
    assert Core().run([step] * 200, 100).cycles == pytest.approx(500, rel=0.05)


def test_a_line_asked_for_ahead_is_there() -> None:
    wait = [Step("compute", Cost(1, 4, ((0,),)), ("v0",), ("v0",)) for _ in range(100)]
    ask = Step("prefetch", Cost(1, 0, ((2, 3),)), (), (), (7,))
    read = Step("load", Cost(1, 5, ((2, 3),)), ("v0",), ("v1",), (7,))
    assert Core().run([*wait, read]).far == 1
    assert Core().run([ask, *wait, read]).far == 0


@pytest.mark.parametrize(
    ("text", "reads", "writes"),
    [
        ("vmulps %zmm1,%zmm4,%zmm2", {"v1", "v4"}, {"v2"}),
        ("vfmadd231ps %zmm30,%zmm29,%zmm8", {"v30", "v29", "v8"}, {"v8"}),
        ("vmovdqa64 %zmm0,0xc0(%rdi,%rax,4)", {"v0", "di", "ax"}, set()),
        ("add    $0x1,%r10d", {"r10"}, {"r10", "flags"}),
        ("lea    0x40(%rcx),%rsi", {"cx"}, {"si"}),
        ("jne    411aa8 <somewhere+0x1>", {"flags"}, set()),
        ("cmp    %r10,-0x8(%rsp)", {"r10", "sp"}, {"flags"}),
        ("tileloadd (%rcx,%r15,1),%tmm6", {"cx", "r15"}, {"tmm6"}),
    ],
)
def test_what_an_instruction_reads_and_writes(text: str, reads: set[str], writes: set[str]) -> None:
    found_reads, found_writes = Instruction.parse(text).dependencies()
    assert (set(found_reads), set(found_writes)) == (reads, writes)


def test_parts_of_a_register_are_the_register() -> None:
    assert registers_of("%eax,%ax,%al,%r8d,%ymm3,%xmm3") == ["ax", "ax", "ax", "r8", "v3", "v3"]


def test_ports() -> None:
    assert uses_of("vpaddd %zmm1,%zmm2,%zmm3", {0: 0.5, 5: 0.5}) == ((0, 5),)
    assert uses_of("vmulps %zmm1,%zmm2,%zmm3", {0: 1.0}) == ((0, 5),)  # the unit that llvm-mca leaves out
    assert uses_of("vpermps %zmm1,%zmm2,%zmm3", {5: 1.0}) == ((5,),)


@pytest.mark.skipif(
    not KERNELS.is_dir() or not shutil.which("objdump") or "avx512" not in _core.read_machine().isas(),
    reason="needs a build, objdump and AVX-512",
)
def test_a_trace_has_every_product(tmp_path: Path) -> None:
    program, file = tmp_path / "amx_trace", tmp_path / "trace"
    build(program, KERNELS)
    code = disassemble(program)
    case = Case("", "linear_nf4_bf16_amx", 70, 48, 200)
    arguments = [case.kernel, str(case.m), str(case.n), str(case.k), "1000000", str(file)]
    subprocess.run([str(program), *arguments], check=True)
    addresses = np.fromfile(file, np.uint64).reshape(-1, 17)[:, 0]
    opcodes = Counter(code[int(a)].opcode for a in addresses if int(a) in code)
    bands, panels, chunks = 5, 3, 2 * 4  # of 16 tokens, 16 outputs, 32 inputs in whole tiles of 64
    assert opcodes["tdpbf16ps"] == bands * panels * chunks
    assert opcodes["tilestored"] == bands * panels  # 512 inputs a block: every sum once
    assert case.units == panels * 200 / 64


def test_without_llvm_mca_it_says_what_is_missing(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "amx_counts.py"
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert run.returncode == 1
    assert run.stderr.strip() == "llvm-mca is not here: Debian has it in llvm-19, other systems in their llvm"
