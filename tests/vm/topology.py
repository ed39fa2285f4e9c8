"""The machines that are booted: what they have, as an emulator is told it, and what fourfold should make of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DISTANCE = 21  # to another socket, as servers say it; 10 is here


@dataclass(frozen=True)
class Node:
    """Some CPUs and the memory beside them."""

    n_cpus: int
    megabytes: int


@dataclass(frozen=True)
class Topology:
    """A machine of `nodes`, and the models that run on it."""

    name: str
    nodes: tuple[Node, ...]
    ranks: tuple[tuple[int, tuple[int, ...]], ...]  # (memory on node, CPUs) of each rank by default
    runs: tuple[dict[str, Any], ...]  # Run of guest.py, `model` being "small" or "wide"
    warnings: tuple[str, ...] = field(default=())  # words of each that doctor must give, no other being right

    @property
    def n_cpus(self) -> int:
        return sum(node.n_cpus for node in self.nodes)

    def emulator_options(self) -> list[str]:
        """CPUs are numbered node by node, each a socket of its own: interrupts get lost in QEMU 7.2 where APIC numbers
        have gaps, as those of sockets with three cores or with empty places have."""
        options = ["-m", f"{sum(node.megabytes for node in self.nodes)}M"]
        options += ["-smp", f"{self.n_cpus},sockets={self.n_cpus},cores=1"]
        first = 0
        for i, node in enumerate(self.nodes):
            cpus = f"cpus={first}-{first + node.n_cpus - 1}"
            first += node.n_cpus
            if node.megabytes:
                options += ["-object", f"memory-backend-ram,id=memory{i},size={node.megabytes}M"]
                options += ["-numa", f"node,nodeid={i},{cpus},memdev=memory{i}"]
            else:
                options += ["-numa", f"node,nodeid={i},{cpus}"]
        for i in range(len(self.nodes)):
            for j in range(i):
                options += ["-numa", f"dist,src={j},dst={i},val={DISTANCE}"]
        return options


def run(
    name: str, model: str, *, against: str = "", refused: str = "", cpus: tuple[int, ...] = (), **options: Any
) -> dict[str, Any]:
    facts = {"name": name, "model": model, "against": against, "refused": refused}
    return facts | {"cpus": list(cpus), "options": options}


FOUR = Topology(
    "four",
    (Node(1, 640),) * 4,
    ((0, (0,)), (1, (1,)), (2, (2,)), (3, (3,))),
    (
        run("one rank", "small", ranks=1),
        run("a rank on each node", "small", against="one rank"),
        run("four ranks on node 0", "small", against="a rank on each node", cpus=(0,), ranks=4),
        run("wide, one rank", "wide", ranks=1),
        run("wide, a rank on each node", "wide", against="wide, one rank"),
    ),
)
UNEVEN = Topology(
    "uneven",
    (Node(3, 768), Node(1, 40)),
    ((0, (0, 1, 2)), (1, (3,))),
    (
        run("one rank", "small", ranks=1),
        run("a rank on each node", "small", against="one rank"),
        run("too large for node 1", "wide", refused="on NUMA node 1", weights="memory"),
    ),
    ("have 3, 1 usable cores",),
)
BARE = Topology(
    "bare",
    (Node(1, 640), Node(1, 0), Node(1, 256)),
    ((0, (0,)), (0, (1,)), (2, (2,))),
    (run("one rank", "small", ranks=1), run("a rank on each node", "small", against="one rank")),
    ("cores of node 1 have no memory beside them",),
)
TOPOLOGIES = {topology.name: topology for topology in (FOUR, UNEVEN, BARE)}
