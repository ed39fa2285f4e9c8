"""The house stands: floors look down, public names are what they say, files stay readable."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fourfold
from fourfold import _cpu_check

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "fourfold"
MAX_LINES = 450

# docs/design.md, from the bottom up. A module may import from its own floor and from those below.
FLOORS = (
    ("_core", "_cpu_check"),
    ("errors", "json_text"),
    ("config", "format", "machine", "placement", "matrix"),
    ("models", "program", "fusion", "footprint", "residency", "rotary"),
    ("checkpoint", "keep", "pipeline", "conversion", "synth", "locate"),
    (
        *("vocabulary", "sampling", "tokenizer", "sandbox", "chat_template", "kvcache"),
        *("request", "generation", "scheduler", "speculate", "grammar"),
    ),
    ("engine", "assembly", "patience", "disk", "profile", "trace_file", "steploop", "draft"),
    (
        "llm",
        "progress",
        "evaluate",
        "lambada",
        "plan",
        "bench",
        "doctor",
        "cli",
        "cli_bench",
        "cli_options",
        "cli_generate",
        "cli_evaluate",
        "cli_plan",
        "cli_profile",
        "cli_render",
        "cli_serve",
        "cli_synth",
        "server",
        "torch",
        "transformers",
        "deepspeed",
        "tensorflow",
        "__init__",
    ),
)
FLOOR = {module: number for number, floor in enumerate(FLOORS) for module in floor}


def _imports(path: Path) -> set[str]:
    """First-level modules of fourfold that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "fourfold" else [node.module]
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: imports are absolute"
        found |= {name.split(".")[1] for name in names if name.startswith("fourfold.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_floor_never_looks_up(path: Path) -> None:
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert module in FLOOR, f"say in FLOORS, and in docs/design.md, on which floor {module} lives"
    for target in _imports(path) - {module} - set(fourfold.__all__):
        assert target in FLOOR, f"{path} imports {target}, which is on no floor"
        assert FLOOR[target] <= FLOOR[module], f"{module} looks up to {target}"


# The native floors, from the bottom up; kernels lie below the ops that call them, probes beside them.
NATIVE_FLOORS = (
    (
        *("isa", "format", "tensorflow_api", "exchange", "sysfiles", "cgroup", "machine", "memory", "timeline"),
        *("team", "crew", "shares", "affinity", "arithmetic", "read_file"),
    ),
    ("file_stream", "kernels", "pack", "place", "probe", "weight"),
    ("matmul", "program", "ops", "ops_linear", "ops_attention", "ops_streamed"),
    ("tensorflow_op", "tensorflow_library"),
    ("tensorflow_direct",),
    (
        *("names", "bindings", "bind_kernels", "bind_machine", "bind_matmul", "bind_pack", "bind_probe"),
        *("bind_program", "bind_tensorflow"),
    ),
)
NATIVE_FLOOR = {unit: number for number, floor in enumerate(NATIVE_FLOORS) for unit in floor}


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.*")), ids=lambda path: path.name)
def test_a_native_floor_never_looks_up(path: Path) -> None:
    unit = path.relative_to(ROOT / "csrc").parts[0].split(".")[0]
    for target in re.findall(r'#include "([a-z_]+)[./]', path.read_text(encoding="utf-8")):
        assert NATIVE_FLOOR[unit] >= NATIVE_FLOOR[target], f"{path.name} looks up to {target}"


def test_no_function_of_an_instruction_set_stands_in_for_another() -> None:
    """An inline function that a kernel file emits under its common name may be what the linker keeps for all."""
    folders = (ROOT / "build").glob("*/CMakeFiles/_core.dir/csrc/kernels")
    objects = [path for folder in folders for path in folder.glob("*.o") if re.search("_(avx2|avx512|amx)", path.name)]
    if not objects or shutil.which("nm") is None:
        pytest.skip("the native core was not built here")
    listed = subprocess.run(["nm", "-AC", *objects], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line for line in listed if " W " in line and not re.search(r"_(avx2|avx512|amx)[_<(]", line)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("cli*.py")), ids=lambda path: path.name)
def test_commands_print_json_in_one_way(path: Path) -> None:
    assert "json.dump" not in path.read_text(encoding="utf-8"), "json_text() writes null where there is no number"


def test_all_is_what_is_exported() -> None:
    for name in fourfold.__all__:
        assert getattr(fourfold, name) is not None
    assert sorted(fourfold.__all__) == dir(fourfold)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fourfold.nothing  # noqa: B018


def test_importing_fourfold_loads_nothing_heavy() -> None:
    script = "import sys, fourfold; print(sorted({'numpy', 'rich', 'typer', 'fourfold._core'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_native_core_is_described_as_it_is_built(tmp_path: Path) -> None:
    stub = tmp_path / "_core.pyi"
    commands = (
        ["nanobind.stubgen", "--quiet", "-m", "fourfold._core", "-o", str(stub)],
        ["ruff", "format", "--quiet", "--config", str(ROOT / "pyproject.toml"), str(stub)],
    )
    for command in commands:
        subprocess.run([sys.executable, "-m", *command], check=True)
    assert stub.read_text() == (ROOT / "src/fourfold/_core.pyi").read_text(), "`make stub` writes it anew"


@pytest.mark.parametrize(
    "path",
    [p for folder in ("src", "csrc", "tests", "benchmarks") for p in sorted((ROOT / folder).rglob("*.*"))
     if p.suffix in (".py", ".cpp", ".h", ".inl")],
    ids=lambda path: str(path.relative_to(ROOT)),
)  # fmt: skip
def test_no_file_is_too_long_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    ("flags", "lacks"),
    [
        ("fpu sse4_2 avx", "AVX2, FMA, F16C"),
        ("fpu avx avx2 fma", "F16C"),
    ],
)
def test_an_old_cpu_is_told_so_in_a_sentence(flags: str, lacks: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    with pytest.raises(ImportError, match=f"fourfold needs an x86-64 CPU with AVX2 .*lacks {lacks}$"):
        _cpu_check.check(tmp_path / "cpuinfo")


def test_a_cpu_with_avx2_passes_another_architecture_does_not(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    _cpu_check.check(cpuinfo)  # not there: nothing is known
    cpuinfo.write_text("processor : 0\nflags : fpu avx avx2 fma f16c\n")
    _cpu_check.check(cpuinfo)
    cpuinfo.write_text("processor : 0\nFeatures : asimd sve\n")
    with pytest.raises(ImportError, match="not an x86-64 CPU"):
        _cpu_check.check(cpuinfo)
