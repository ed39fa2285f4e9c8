"""What must be true of a machine's report; each failure is a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from vm.models import Model
from vm.topology import Topology

HUGE_PAGE = 2 << 20
KINDS = {"weights", "vectors", "activations", "scratch", "kv", "state"}  # all that a Yuan's ranks hold
WHOLE = {"weights", "vectors"}  # written when the model is loaded; of the rest only what was used is there


def failures(topology: Topology, report: dict[str, Any], models: dict[str, Model]) -> list[str]:
    """Everything that is wrong; nothing is right."""
    found = [f"doctor: {words}" for words in _doctor(topology, report["doctor"])]
    homes = {str(i): str(i) for i, node in enumerate(topology.nodes) if node.n_cpus and node.megabytes}
    seen = {node: next(iter(pages)) for node, pages in report["control"].items() if node in homes}
    if seen != homes:
        found.append(f"control: pages first touched on nodes {homes} are said to lie on {seen}")
    digests: dict[tuple[str, int], str] = {}
    for order, facts in zip(topology.runs, report["runs"], strict=True):
        found += [f"{order['name']}: {words}" for words in _run(topology, order, facts, models[order["model"]])]
        if "refused" in facts:
            continue
        key = (order["model"], len(facts["plan"]))
        if digests.setdefault(key, facts["sha256"]["at once"]) != facts["sha256"]["at once"]:
            found.append(f"{order['name']}: as many ranks as a run before it, but other bits")
    return found


def _doctor(topology: Topology, doctor: dict[str, Any]) -> Iterator[str]:
    machine, uses = doctor["machine"], doctor["uses"]
    nodes = [node["id"] for node in machine["nodes"]]
    if machine["n_sockets"] != topology.n_cpus or nodes != [*range(len(topology.nodes))]:
        yield f"{machine['n_sockets']} sockets and nodes {nodes}"
    if "avx2" not in machine["isas"] or uses["isa"] != machine["isas"][-1]:
        yield f"{uses['isa']} is used of {machine['isas']}"
    first = 0
    for node, facts in zip(topology.nodes, machine["nodes"], strict=False):
        cpus = [*range(first, first := first + node.n_cpus)]
        if facts["usable_cpus"] != cpus:
            yield f"node {facts['id']} has usable CPUs {facts['usable_cpus']}, not {cpus}"
        if not 0 <= (node.megabytes << 20) - facts["total_bytes"] <= max(64 << 20, node.megabytes << 17):
            yield f"node {facts['id']} has {facts['total_bytes']} bytes, not nearly {node.megabytes} MB"
    ranks = [(rank["node"], tuple(rank["cpus"])) for rank in uses["ranks"]]
    if ranks != list(topology.ranks):
        yield f"ranks are planned as {ranks}"
    if len(doctor["warnings"]) != len(topology.warnings) or any(
        words not in warning for words, warning in zip(topology.warnings, doctor["warnings"], strict=False)
    ):
        yield f"warnings are {doctor['warnings']}"


def _run(topology: Topology, order: dict[str, Any], facts: dict[str, Any], model: Model) -> Iterator[str]:
    if words := order.get("refused"):
        if words not in facts.get("refused", ""):
            yield f"not refused with {words!r} but {facts.get('refused')!r}"
        return
    if "refused" in facts:
        yield f"refused: {facts['refused']}"
        return
    for how, error in facts["error"].items():
        if not error <= model.tolerance:
            yield f"logits {how} are {error:.2g} from what they should be, more than {model.tolerance:.2g}"
    if order["against"] and not facts["against"] <= (limit := model.tolerance_of_ranks):
        yield f"logits are {facts['against']:.2g} from those of {order['against']}, more than {limit:.2g}"
    plan = [(rank["node"], tuple(rank["cpus"])) for rank in facts["plan"]]
    if not order["options"] and plan != list(topology.ranks):
        yield f"ranks are {plan}"
    yield from _threads(plan, facts)
    yield from _memory(plan, facts["memory"])
    if not facts["describe"]["memory_bound"]:
        yield "memory was not bound"
    for rank, said in enumerate(facts["describe"]["memory"]):
        if said["elsewhere_bytes"] != 0:
            yield f"describe says that {said['elsewhere_bytes']} bytes of rank {rank} lie elsewhere"


def _threads(plan: list[tuple[int, tuple[int, ...]]], facts: dict[str, Any]) -> Iterator[str]:
    first, *others = [cpu for _, cpus in plan for cpu in cpus]
    if [str(first), first] not in facts["caller"]:
        yield f"the caller, whose CPU is {first}, was seen at {facts['caller']}"
    at = [seen for thread in facts["threads"] for seen in thread]
    if Counter(allowed for thread in facts["threads"] for allowed, _ in thread) != Counter(map(str, others)):
        yield f"threads may run on {[allowed for allowed, _ in at]}, and should on {others}"
    for allowed, processor in at:
        if str(processor) != allowed:
            yield f"a thread of CPU {allowed} ran on {processor}"


def _memory(plan: list[tuple[int, tuple[int, ...]]], regions: list[dict[str, Any]]) -> Iterator[str]:
    policy = "bind" if len({node for node, _ in plan}) > 1 else "prefer"
    for rank, (node, _) in enumerate(plan):
        own = [region for region in regions if region["rank"] == rank]
        for kind in sorted(KINDS | {region["kind"] for region in own}):
            pages = sum((Counter(region["pages"]) for region in own if region["kind"] == kind), Counter())
            if set(pages) != {str(node)}:
                yield f"{kind} of rank {rank}, which is at home on node {node}, lie on {dict(pages)}"
        for region in own:
            if region["kind"] in WHOLE and region["absent"]:
                yield f"{region['absent']} pages of {region['kind']} of rank {rank} are not there"
            if region["policy"] != f"{policy}:{node}":
                yield f"{region['kind']} of rank {rank} have the policy {region['policy']}, not {policy}:{node}"
            if region["bytes"] >= HUGE_PAGE and region["mapping_huge_kb"] != region["mapping_kb"]:
                yield (
                    f"{region['kind']} of rank {rank}: {region['mapping_huge_kb']} of {region['mapping_kb']} KB "
                    "are in huge pages"
                )
