"""A machine as planning sees it: a few numbers, measured or from a TOML file (docs/planning.md lists them)."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path

from fourfold.checkpoint.fields import Fields
from fourfold.checkpoint.source import one_line
from fourfold.config import FORMATS, KV_FORMATS
from fourfold.errors import CheckpointError, UserError
from fourfold.machine import CgroupLimits, Machine, Node, RankPlan, plan_ranks

MAX_NODES, MAX_CORES = 64, 4096
MAX_FILE_BYTES = 1 << 20
MAX_SHARE = 2.0  # the read probes may do worse than a kernel, but not by more than noise
_DESCRIBED = files("fourfold.plan") / "described"


@dataclass(frozen=True)
class NodeRates:
    """One NUMA node."""

    cores: int
    memory_gb: float  # that a model may take
    read_gb_s: float  # all its cores reading at once
    cache_mb: float  # last level
    peak_tflops: float  # of the fastest instructions that multiply what prompts are made of


@dataclass(frozen=True)
class Links:
    """Between any two nodes, each of which has one to each other."""

    gb_s: float  # each way
    latency_us: float  # of one cache line


@dataclass(frozen=True)
class Attained:
    """What fourfold's kernels make of a machine: shares of its limits, and times that no limit explains."""

    format: str  # of weights, that the shares were measured with
    kv_format: str
    weights: float  # of the read bandwidth, one token, slices of whole huge pages
    small_weights: float  # the same, slices too small for huge pages
    kv: float  # of the read bandwidth, attention of one token
    queries_per_kv: float  # query heads to a KV head, that `kv` was measured with
    cached_core_gb_s: float  # a core, one token, weights in the last-level cache
    prefill: float  # of the peak, matrices with many tokens
    attention: float  # of the peak, attention of many tokens
    step_us: float  # a call into the engine: threads awake, threads asleep
    op_us: float  # any op: a barrier, and what precedes it
    linear_us: float  # a linear besides its reading: packing, barriers, first misses
    panel_us: float  # a panel of 16 outputs besides its reading, on the thread that has it
    element_ns: float  # an element of a norm, a gate or a sum, on the thread that has it
    head_us: float  # a query head of attention besides its reading, on the thread that has it


@dataclass(frozen=True)
class PlannedMachine:
    name: str
    about: str
    nodes: tuple[NodeRates, ...]
    core_read_gb_s: float  # one core reading alone
    links: Links | None  # None: one node
    attained: Attained

    def facts(self) -> Machine:
        """As `plan_ranks` wants it: cores numbered from 0, all free."""
        first, nodes = 0, []
        for number, node in enumerate(self.nodes):
            cpus = list(range(first, first + node.cores))
            n_bytes = int(node.memory_gb * 1e9)
            nodes.append(Node(number, cpus, cpus, n_bytes, n_bytes, n_bytes, [], True))
            first += node.cores
        everything = list(range(first))
        total = sum(node.total_bytes for node in nodes)
        return Machine(
            model=self.name,
            isas=[],
            amx_is_present=False,
            nodes=nodes,
            online_cpus=everything,
            offline_cpus=[],
            allowed_cpus=everything,
            cores=[[cpu] for cpu in everything],
            n_sockets=len(nodes),
            caches=[],
            huge_pages="madvise",
            cgroup=CgroupLimits(None, None, None, None),
            total_bytes=total,
            available_bytes=total,
            n_threads=first,
        )

    def place(self, ranks: int | None) -> list[RankPlan]:
        """Where ranks go: as on a real machine of this shape. Raises what `plan_ranks` raises."""
        return plan_ranks(self.facts(), ranks)


def known_machines() -> list[str]:
    """Names of the machines that fourfold describes."""
    return sorted(file.name.removesuffix(".toml") for file in _DESCRIBED.iterdir() if file.name.endswith(".toml"))


def load_machine(name: str) -> PlannedMachine:
    """A described machine by name, or from a TOML file. Raises UserError, naming the key, where something is wrong."""
    if name in known_machines():
        return parse_machine((_DESCRIBED / f"{name}.toml").read_text(encoding="utf-8"), name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"there is no machine {name!r}; the known ones are {', '.join(known_machines())}, or give a TOML file "
            "(docs/planning.md lists its keys; `fourfold plan MODEL --save FILE` writes this machine's)"
        )
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{path} is larger than any description of a machine")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    return parse_machine(text, str(path))


def parse_machine(text: str, where: str) -> PlannedMachine:
    """TOML as a machine. Raises UserError, naming the key, for what is missing, unknown, not a number or absurd."""
    try:
        table = Fields(tomllib.loads(text), where)
    except tomllib.TOMLDecodeError as error:
        raise CheckpointError(f"{where} is not valid TOML: {one_line(error)}") from None
    entries = table.many("nodes", dict)
    nodes = [node for i, entry in enumerate(entries, 1) for node in _nodes(Fields(entry, f"{where}, nodes {i},"))]
    if not 1 <= len(nodes) <= MAX_NODES:
        raise CheckpointError(f"{where} describes {len(nodes)} nodes; it must be 1 to {MAX_NODES}")
    machine = PlannedMachine(
        name=table.text("name"),
        about=table.text("about", "described"),
        nodes=tuple(nodes),
        core_read_gb_s=table.real("core_read_gb_s"),
        links=_links(table.fields("links")) if len(nodes) > 1 or "links" in table else None,
        attained=_attained(table.fields("attained")),
    )
    table.finish()
    return machine


def _nodes(entry: Fields) -> list[NodeRates]:
    count, cores = entry.size("count", 1), entry.size("cores")
    if count > MAX_NODES or cores > MAX_CORES:
        raise CheckpointError(
            f"{entry.where} has count {count} and cores {cores}; at most {MAX_NODES} and {MAX_CORES} make a machine"
        )
    rates = {name: entry.real(name) for name in ("memory_gb", "read_gb_s", "cache_mb", "peak_tflops")}
    entry.finish()
    return [NodeRates(cores=cores, **rates)] * count


def _links(entry: Fields) -> Links:
    links = Links(entry.real("gb_s"), entry.real("latency_us"))
    entry.finish()
    return links


def _attained(entry: Fields) -> Attained:
    names = {"format": FORMATS, "kv_format": KV_FORMATS}
    for key, known in names.items():
        if entry.text(key) not in known:
            raise CheckpointError(
                f"{entry.where} sets {key} to {entry.text(key)!r}; it must be one of {', '.join(known)}"
            )
    numbers = {field.name: entry.real(field.name) for field in fields(Attained) if field.name not in names}
    for key in ("weights", "small_weights", "kv", "prefill", "attention"):
        if numbers[key] > MAX_SHARE:
            raise CheckpointError(
                f"{entry.where} sets {key} to {numbers[key]:g}; a share must be at most {MAX_SHARE:g}"
            )
    attained = Attained(entry.text("format"), entry.text("kv_format"), **numbers)
    entry.finish()
    return attained


def format_machine(machine: PlannedMachine) -> str:
    """TOML that `parse_machine` reads as the same machine."""
    lines = [f"name = {_quoted(machine.name)}", f"about = {_quoted(machine.about)}"]
    lines.append(f"core_read_gb_s = {machine.core_read_gb_s!r}")
    for node in machine.nodes:
        lines += ["", "[[nodes]]", *_assignments(asdict(node).items())]
    if machine.links:
        lines += ["", "[links]", *_assignments(asdict(machine.links).items())]
    lines += ["", "[attained]", *_assignments(asdict(machine.attained).items())]
    return "\n".join(lines) + "\n"


def _assignments(items: Iterable[tuple[str, str | float]]) -> list[str]:
    return [f"{key} = {_quoted(value) if isinstance(value, str) else repr(value)}" for key, value in items]


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else " " for c in escaped) + '"'
