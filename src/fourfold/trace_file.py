"""A profile as a file for trace viewers (Perfetto, chrome://tracing): the Trace Event Format's JSON object.

One process a rank and one thread row each, and a row of the caller with the steps. Every event is complete ("ph": "X"),
`ts` and `dur` are microseconds from the beginning of the profile, and events of a row neither overlap nor go back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fourfold.json_text import json_text
from fourfold.profile import END, PACK, WAIT, WORK, OpFacts, Profile, StepFacts

CALLER = 1  # process numbers: the caller, then the ranks


def write_trace(profile: Profile, path: Path) -> None:
    """Writes the file whole or not at all; a path that is no regular file (a pipe, a terminal) is written to as it is.

    Raises OSError, which names the path.
    """
    direct = path.exists() and not path.is_file()
    whole = path if direct else path.resolve()
    part = whole if direct else whole.with_name(f".{whole.name}.{os.getpid()}")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ns", "otherData": ' + json_text(_other(profile)) + ', "traceEvents": [\n')
            for i, event in enumerate(events(profile)):
                file.write((",\n" if i else "") + json_text(event))
            file.write("\n]}\n")
        if not direct:
            os.replace(part, whole)
    except BaseException:
        if not direct:
            part.unlink(missing_ok=True)
        raise


def events(profile: Profile) -> Iterator[dict[str, Any]]:
    """Names of the rows, then all events, row by row within each step."""
    yield _name("process", CALLER, CALLER, "caller")
    yield _name("thread", CALLER, CALLER, "steps")
    rows = [(rank + CALLER + 1, number) for number, (rank, _) in enumerate(profile.threads, CALLER + 1)]
    for (pid, tid), (rank, thread) in zip(rows, profile.threads, strict=True):
        if thread == 0:
            yield _name("process", pid, tid, f"rank {rank}")
        yield _name("thread", pid, tid, f"rank {rank}, thread {thread}")
    for number, step in enumerate(profile.kept):
        start = step.work.positions - step.work.tokens
        args = {"step": number, "tokens": step.work.tokens, "output rows": step.work.outputs, "position": start}
        yield _event(step.kind, "step", CALLER, CALLER, step.begin - profile.begin, step.end - step.begin, args)
        described = [_args(op, step, number) for op in profile.ops]
        for (pid, tid), marks in zip(rows, step.marks, strict=True):
            starts, ops, phases = (marks[name].tolist() for name in ("ns", "op", "phase"))
            for i, phase in enumerate(phases[:-1]):
                op = profile.ops[ops[i]]
                name = {WORK: op.label, PACK: f"pack for {op.label}", WAIT: f"wait after {op.label}"}[phase]
                if phase == WAIT and phases[i + 1] != END and ops[i + 1] == ops[i]:
                    name = f"wait within {op.label}"
                category = op.kind if phase == WORK else "pack" if phase == PACK else "wait"
                begin, length = starts[i] - profile.begin, starts[i + 1] - starts[i]
                args = described[ops[i]] if phase == WORK else {"step": number}
                yield _event(name, category, pid, tid, begin, length, args)


def _args(op: OpFacts, step: StepFacts, number: int) -> dict[str, Any]:
    args: dict[str, Any] = {"step": number, "op": op.kind, "tokens": step.work.rows(op)}
    if op.layer is not None:
        args["layer"] = op.layer
    if op.weights:
        args["weights"] = ", ".join(op.weights)
    if n_bytes := step.work.bytes_read(op):
        args["bytes of all ranks"] = n_bytes
    if kernel := step.kernel(op):
        args["kernel"] = kernel
    return args


def _event(
    name: str, category: str, pid: int, tid: int, ns: int, length: int, args: Mapping[str, Any]
) -> dict[str, Any]:
    times = {"ts": ns / 1000, "dur": length / 1000}
    return {"name": name, "cat": category, "ph": "X", **times, "pid": pid, "tid": tid, "args": args}


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": f"{what}_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _other(profile: Profile) -> dict[str, str]:
    note = {"note": dropped_note(profile.n_dropped)} if profile.n_dropped else {}
    return {"made by": "fourfold run --profile"} | note


def dropped_note(n_dropped: int) -> str:
    """What to say of steps that the trace leaves out."""
    return f"The last {n_dropped} steps are in the table but not in the trace, which was full."
