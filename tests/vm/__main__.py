"""`python -m vm [NAME ...]`: boots the machines of vm.topology and prints what it found; status 1 where it is wrong."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from vm.boot import BootError, boot, fetch_kernel, make_initramfs, missing
from vm.models import write_models
from vm.topology import TOPOLOGIES
from vm.verdict import failures

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden" / "yuan-d64"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vm", description="fourfold on machines with several NUMA nodes")
    parser.add_argument(
        "names", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(TOPOLOGIES)}; all by default"
    )
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="a Yuan with logits.safetensors beside it")
    parser.add_argument("--reports", type=Path, help="a folder for the machines' whole reports, as JSON")
    parser.add_argument("--fetch", action="store_true", help="only fetch the kernel, and see whether all is there")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(TOPOLOGIES):
        parser.error(f"there is no machine {', '.join(sorted(unknown))}")
    chosen = [TOPOLOGIES[name] for name in arguments.names or TOPOLOGIES]
    n_failures = 0
    try:
        fetch_kernel()
        if why := missing():
            raise BootError(why)
        if arguments.fetch:
            return 0
        with tempfile.TemporaryDirectory() as folder:
            models = write_models(Path(folder), arguments.golden)
            initramfs = make_initramfs(Path(folder), models, chosen)
            for topology in chosen:
                started = time.monotonic()
                report = boot(topology, initramfs)
                wrong = failures(topology, report, models)
                n_failures += len(wrong)
                print(show(topology.name, report, time.monotonic() - started))
                print("\n".join(f"WRONG: {sentence}" for sentence in wrong) or "All is as it should be.", end="\n\n")
                if arguments.reports:
                    arguments.reports.mkdir(parents=True, exist_ok=True)
                    (arguments.reports / f"{topology.name}.json").write_text(json.dumps(report, indent=1))
    except BootError as error:
        print(error, file=sys.stderr)
        return 1
    return 1 if n_failures else 0


def show(name: str, report: dict[str, Any], seconds: float) -> str:
    """A machine's report for people."""
    lines = [f"== {name}: {seconds:.0f} s", report["doctor"]["text"].rstrip()]
    for facts in report["runs"]:
        lines += ["", f"-- {facts['name']}"]
        if "refused" in facts:
            lines.append(f"refused: {facts['refused']}")
            continue
        errors = ", ".join(f"{error:.2g} {how}" for how, error in facts["error"].items())
        against = f"; from the run before {facts['against']:.2g}" if facts["against"] is not None else ""
        lines.append(f"logits up to {facts['largest_logit']:.3g}: off by {errors}{against}")
        lines.append(f"sha256 {facts['sha256']['at once'][:16]}, {facts['seconds']:.0f} s")
        lines.append(f"{'rank':>4} {'node':>4}  {'CPUs':8} {'ran on':8} 4 KB pages by node")
        for rank, plan in enumerate(facts["plan"]):
            lines.append(_rank(rank, plan, facts))
    return "\n".join(lines)


def _rank(rank: int, plan: dict[str, Any], facts: dict[str, Any]) -> str:
    cpus = {str(cpu) for cpu in plan["cpus"]}
    seen = {tuple(at) for thread in (facts["caller"], *facts["threads"]) for at in thread}
    ran = sorted({processor for allowed, processor in seen if allowed in cpus})
    kinds: dict[str, Counter[str]] = {}
    for region in facts["memory"]:
        if region["rank"] == rank:
            kinds.setdefault(region["kind"], Counter()).update(region["pages"])
    pages = ", ".join(
        f"{kind} " + " + ".join(f"{count} on {node}" for node, count in found.items()) for kind, found in kinds.items()
    )
    return f"{rank:>4} {plan['node']:>4}  {','.join(sorted(cpus)):8} {','.join(map(str, ran)):8} {pages}"


if __name__ == "__main__":
    sys.exit(main())
