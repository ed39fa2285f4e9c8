"""The only program of the virtual machine: runs models there and reports where their memory and threads are.

Run by the kernel as process 1; anywhere else it is a rehearsal, which also says which files it loaded. It reads the
orders, a JSON document (`Orders`), prints one line that begins with MARK and ends in the report, and powers off. It
judges nothing: `verdict` does.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import sys
import traceback  # loaded now, not when something has gone wrong
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from threading import Event, Thread, get_native_id
from time import monotonic, sleep
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from fourfold import doctor
from fourfold.engine import Engine
from fourfold.errors import UserError

MARK = "REPORT "
PAGE = 4096
MOVE_PAGES = 279  # x86-64: asm/unistd_64.h
POWER_OFF = 0x4321FEDC  # linux/reboot.h

_libc = ctypes.CDLL(None, use_errno=True)


class Run(TypedDict):
    """One model, loaded once."""

    name: str
    model: str  # a fourfold directory, which also holds expected.npy, float32 (T, vocab), for the ids
    ids: list[int]
    n_steps: int  # the first of them also one by one
    cpus: list[int]  # that the process may use; none given: all
    options: dict[str, Any]  # of Engine
    against: str  # the run before it of the same model that it is compared with, if any


class Orders(TypedDict):
    runs: list[Run]


def survey(orders: Orders) -> dict[str, Any]:
    health, text = doctor.report(quick=True), StringIO()
    doctor.render(health, Console(file=text, width=120))
    logits: dict[str, NDArray[np.float32]] = {}
    return {
        "doctor": health | {"text": text.getvalue()},
        "control": control(),
        "runs": [run(order, logits) for order in orders["runs"]],
    }


def run(order: Run, logits: dict[str, NDArray[np.float32]]) -> dict[str, Any]:
    """Loads, computes all ids at once and some one by one, and looks where everything is while the threads live.

    Keeps the logits by the run's name, for a later run `against` them. An engine that refuses the model says why in
    "refused", and nothing else is known.
    """
    directory = Path(order["model"])
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, order["cpus"] or everywhere)
    before = {int(task.name) for task in Path("/proc/self/task").iterdir()}
    started = monotonic()
    try:
        engine = Engine(directory, **order["options"])
    except UserError as error:
        return {"name": order["name"], "refused": str(error)}
    finally:
        os.sched_setaffinity(0, everywhere)
    expected = np.load(directory / "expected.npy")
    sleep(0.5)  # a thread that was joined stays listed for a moment
    with Watch() as watch:
        at_once = engine.logits(order["ids"])
        sequence = engine.new_sequence()
        steps = np.stack([engine.extend(sequence, [i]) for i in order["ids"][: order["n_steps"]]])
    facts = {
        "name": order["name"],
        "largest_logit": float(np.abs(expected).max()),
        "error": {"at once": worst(at_once - expected), "in steps": worst(steps - expected[: len(steps)])},
        "against": worst(at_once - logits[order["against"]]) if order["against"] else None,
        "sha256": {"at once": digest(at_once), "in steps": digest(steps)},
        "describe": engine.describe(),
        "plan": [{"node": rank.node, "cpus": rank.cpus} for rank in engine.plan],
        "caller": sorted(watch.seen[get_native_id()]),  # it works too, and is elsewhere between steps
        "threads": [sorted(seen) for thread, seen in watch.seen.items() if thread not in before],
        "memory": memory(engine._program.memory_map()),
        "seconds": monotonic() - started,
    }
    logits[order["name"]] = at_once
    engine.close()
    return facts


def worst(difference: Any) -> float:
    return float(np.abs(difference).max())


def digest(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# ---- where things are, as the kernel says


def where(address: int, n_bytes: int) -> dict[str, Any]:
    """How many 4 KB pages lie on which node, and how many are not there yet."""
    count = n_bytes // PAGE
    pages = (ctypes.c_void_p * count)(*range(address, address + n_bytes, PAGE))
    nodes = (ctypes.c_int * count)()
    if _libc.syscall(MOVE_PAGES, 0, ctypes.c_ulong(count), pages, None, nodes, 0) != 0:
        raise OSError(ctypes.get_errno(), "move_pages does not say where pages are")
    found = Counter(node for node in nodes if node >= 0)
    return {"pages": {str(node): n for node, n in sorted(found.items())}, "absent": count - found.total()}


class Mapping(NamedTuple):
    """A stretch of this process's memory that the kernel treats alike."""

    begin: int
    end: int
    policy: str  # "bind:2" where pages may come from node 2 alone
    resident_kb: int
    huge_kb: int  # of them in huge pages


def mappings() -> list[Mapping]:
    policies = dict(line.split()[:2] for line in Path("/proc/self/numa_maps").read_text().splitlines())
    found = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            first, _, last = words[0].partition("-")
            begin, end = int(first, 16), int(last, 16)
        elif words[0] == "Rss:":
            resident = int(words[1])
        elif words[0] == "AnonHugePages:":
            found.append(Mapping(begin, end, policies.get(f"{begin:08x}", ""), resident, int(words[1])))
    return found


def memory(regions: list[tuple[str, int, int, int]]) -> list[dict[str, Any]]:
    """What move_pages, numa_maps and smaps say of a program's memory map."""
    known = mappings()
    facts = []
    for kind, rank, address, n_bytes in regions:
        (around,) = [m for m in known if m.begin <= address < m.end]
        facts.append(
            {"kind": kind, "rank": rank, "bytes": n_bytes, "policy": around.policy}
            | {"mapping_kb": around.resident_kb, "mapping_huge_kb": around.huge_kb}
            | where(address, n_bytes)
        )
    return facts


def control() -> dict[str, dict[str, int]]:
    """For each CPU's node: where a page lies that was first touched there. Shows that the question can be answered."""
    found = {}
    allowed = os.sched_getaffinity(0)
    for node in doctor.read_machine().nodes:
        for cpu in sorted(allowed & set(node.cpus))[:1]:
            os.sched_setaffinity(0, {cpu})
            page = mmap.mmap(-1, PAGE)
            page[0] = 1
            found[str(node.id)] = where(ctypes.addressof(ctypes.c_char.from_buffer(page)), PAGE)["pages"]
    os.sched_setaffinity(0, allowed)
    return found


class Watch:
    """Looks again and again, while it is entered, on which CPUs the threads may run and on which they are.

    `seen`: for each thread, by its number, every (CPUs it may run on, CPU it was last on).
    """

    def __init__(self) -> None:
        self.seen: dict[int, set[tuple[str, int]]] = {}
        self._left = Event()

    def __enter__(self) -> Watch:
        self._thread = Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()
        self.seen.pop(self._thread.native_id or 0, None)

    def _look(self) -> None:
        is_over = False
        while not is_over:  # at least one look, however short the steps
            is_over = self._left.wait(0.01)
            for task in Path("/proc/self/task").iterdir():
                with suppress(FileNotFoundError, ProcessLookupError):  # a thread may end while we look
                    status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
                    stat = (task / "stat").read_text().rpartition(")")[2].split()
                    self.seen.setdefault(int(task.name), set()).add((status["Cpus_allowed_list"], int(stat[36])))


def modules() -> dict[str, str]:
    """The files of the modules that this process has loaded, by name."""
    return {name: module.__file__ for name, module in list(sys.modules.items()) if getattr(module, "__file__", None)}


# ---- process 1


@contextmanager
def system() -> Iterator[None]:
    """The file systems that Linux shows itself in; off goes the machine at the end, whatever happened."""
    try:
        for kind, path in (("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/tmp")):
            os.makedirs(path, exist_ok=True)
            if _libc.mount(kind.encode(), path.encode(), kind.encode(), 0, None) != 0:
                raise OSError(ctypes.get_errno(), f"{path} could not be mounted")
        yield
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.sync()
        _libc.reboot(POWER_OFF)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("orders", type=Path)
    path = parser.parse_args().orders
    if os.getpid() == 1:
        with system():
            print(MARK + json.dumps(survey(json.loads(path.read_text()))), flush=True)
    else:
        report = survey(json.loads(path.read_text()))
        print(MARK + json.dumps(report | {"modules": modules()}), flush=True)


if __name__ == "__main__":
    main()
