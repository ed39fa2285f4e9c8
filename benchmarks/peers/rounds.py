"""Turns in rounds: every peer does every load once a round, one peer at a time, between measurements of the limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import time
from typing import Any

import fourfold._core as _core
from fourfold.bench.limits import Limits
from fourfold.machine import plan_ranks, read_machine
from peers.catalogue import Peer
from peers.install import NotInstalled, python_of
from peers.results import Results, Sample
from peers.work import Work
from peers.worker import PeerFailed, Worker

WORKERS = Path(__file__).parents[1] / "workers"
LOAD_SECONDS, TURN_SECONDS = 600.0, 300.0  # of patience: far above what any peer takes, even beside other work
FACTS = {"bytes": int, "version": str, "path": str}  # that a worker must give; more are kept
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

Command = Callable[[Peer, Work], list[str]]


def machine_facts(threads: int) -> dict[str, Any]:
    """What results are of. Raises ResourceError where there are fewer CPUs than threads."""
    machine = read_machine()
    plan_ranks(machine, 1, threads)
    return {"cpu": machine.model, "isa": machine.isas[-1], "threads": threads, "peak": _core.peak_kinds()[0]}


def commands(cache: Path, threads: int) -> Command:
    """How a peer's worker is started, on the CPUs that fourfold would take. Raises NotInstalled."""
    cpus = ",".join(str(cpu) for cpu in plan_ranks(read_machine(), 1, threads)[0].cpus)

    def command(peer: Peer, work: Work) -> list[str]:
        script, *arguments = peer.workers[work.kind]
        return [str(python_of(peer.environment, cache)), str(WORKERS / script), cpus, *arguments]

    return command


def measure(
    work: Work, peers: Sequence[Peer], rounds: int, results: Results, command: Command, logs: Path,
    save: Callable[[Results], None],
) -> None:  # fmt: skip
    """Adds `rounds` rounds of every peer to `results` and saves them after each.

    A peer that fails leaves its reason in `results.failures`, and the others go on. Raises what Limits raises.
    """
    contest = _Contest(work, results)
    with ExitStack() as stack:
        for peer in peers:
            contest.admit(peer, partial(_start, peer, work, command, logs, stack))
        for number in range(rounds):
            contest.round(number)
            save(results)
    save(results)


class _Contest:
    """The workers that have loaded one work, and stand their turns."""

    def __init__(self, work: Work, results: Results) -> None:
        self._work, self._results = work, results
        self._machine = read_machine()
        self._plan = plan_ranks(self._machine, 1, results.machine["threads"])
        self._ready: dict[str, Worker] = {}
        self._run = f"{time():.0f}"

    def admit(self, peer: Peer, start: Callable[[], Worker]) -> None:
        """Starts a peer's worker and has it load the work."""
        key = f"{self._work.name}/{peer.name}"
        try:
            worker = start()
        except (PeerFailed, NotInstalled) as failure:
            self._results.failures[key] = str(failure)
            return
        try:
            self._results.facts[key] = _facts(worker.ask({"load": dict(self._work.subject)}, LOAD_SECONDS))
        except PeerFailed as failure:
            self._results.failures[key] = str(failure)
            worker.close()  # its memory is the next one's
            return
        self._ready[peer.name] = worker
        self._results.failures.pop(key, None)

    def round(self, number: int) -> None:
        """One turn of every worker, each at another place than in the last round."""
        names = [*self._ready]
        shift = number % max(1, len(names))
        waiting = iter(order := names[shift:] + names[:shift])
        limits = Limits(self._machine, self._plan, read=True, peak=True)
        turns = limits.interleave(len(order), lambda: self._turn(next(waiting)))
        for name, seconds, read, peak in zip(order, turns, limits.read_around(), limits.peak_around(), strict=True):
            n_bytes = self._results.facts[f"{self._work.name}/{name}"]["bytes"]
            for load, took in zip(self._work.loads, seconds, strict=False):
                share = max(n_bytes / took / read, load.flop / took / peak)
                sample = Sample(self._work.name, load.name, name, f"{self._run}-{number}", took, share)
                self._results.samples.append(sample)

    def _turn(self, name: str) -> list[float]:
        """Seconds of each load; fewer where the peer failed, which ends it."""
        done: list[float] = []
        try:
            for load in self._work.loads:
                seconds = self._ready[name].ask({"turn": dict(load.request)}, TURN_SECONDS).get("seconds")
                if not (isinstance(seconds, float) and 0 < seconds < TURN_SECONDS):
                    raise PeerFailed(f"it says that a turn took {seconds!r} seconds")
                done.append(seconds)
        except PeerFailed as failure:
            self._results.failures[f"{self._work.name}/{name}"] = str(failure)
            self._ready.pop(name).close()
        return done


def _facts(reply: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker says of itself. Raises PeerFailed where that is not what the report needs."""
    facts = reply.get("facts")
    if not (
        isinstance(facts, dict) and {name: type(facts.get(name)) for name in FACTS} == FACTS and facts["bytes"] > 0
    ):
        raise PeerFailed(f"it says of itself {facts!r}, and should say {', '.join(FACTS)}")
    return facts


def _start(peer: Peer, work: Work, command: Command, logs: Path, stack: ExitStack) -> Worker:
    """A worker that the stack ends. Raises NotInstalled, and PeerFailed where it might not find the memory."""
    free = read_machine().available_bytes
    if free < work.memory_bytes:
        raise PeerFailed(f"loading may take {work.memory_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
    return stack.enter_context(Worker(command(peer, work), logs / f"{work.name}-{peer.name}.log", OFFLINE))
