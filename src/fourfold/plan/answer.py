"""The answer to "what will this model do on that machine?", as one JSON-ready dictionary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from fourfold.checkpoint import open_source
from fourfold.checkpoint.fourfold_dir import open_directory
from fourfold.config import FORMATS, KV_FORMATS, KVFormat, ModelConfig, WeightFormat
from fourfold.engine import usable_context
from fourfold.errors import UnsupportedError, UserError
from fourfold.footprint import PAGE
from fourfold.keep import DEFAULT_FORMAT
from fourfold.locate import BUNDLED, fourfold_format, known_config, source_path
from fourfold.machine import MAX_RANKS, RankPlan, plan_ranks, read_machine
from fourfold.models import weight_specs
from fourfold.plan.calibrate import Calibration
from fourfold.plan.machines import PlannedMachine, load_machine
from fourfold.plan.times import Clock, Decode
from fourfold.plan.work import Work, count_work, write_program
from fourfold.program import cut_heads
from fourfold.rotary import table_bytes

PROMPT_TOKENS = 512
MAX_PROMPT_TOKENS = 1 << 20
CURVE_POINTS = 24
SMALLER_FIRST: tuple[WeightFormat, ...] = ("nf4", "int8", "bf16")


@dataclass(frozen=True)
class Subject:
    """A model as planning sees it: no weight is needed."""

    name: str
    config: ModelConfig
    formats: Mapping[str, WeightFormat]  # of each matrix
    format: WeightFormat  # of most of them

    @property
    def n_parameters(self) -> int:
        return sum(_size(spec.shape) for spec in weight_specs(self.config))

    def in_format(self, format: WeightFormat) -> Subject:
        return Subject(self.name, self.config, dict.fromkeys(self.formats, format), format)


def plan(
    model: str,
    *,
    machine: str | None = None,
    ranks: int | None = None,
    context: int | None = None,
    kv: str | None = None,
    format: str | None = None,
    prompt: int = PROMPT_TOKENS,
) -> dict[str, Any]:
    """Bytes of each node, milliseconds a token, seconds of a prompt, and what bounds them.

    `machine` names a described machine or a TOML file; None measures this one, which takes some seconds. Raises
    UserError for what cannot be asked; a model that does not fit is an answer, and its `memory` says so.
    """
    answer, _ = plan_with_machine(
        model, machine=machine, ranks=ranks, context=context, kv=kv, format=format, prompt=prompt
    )
    return answer


def plan_with_machine(
    model: str,
    *,
    machine: str | None,
    ranks: int | None,
    context: int | None,
    kv: str | None,
    format: str | None,
    prompt: int,
) -> tuple[dict[str, Any], PlannedMachine]:
    """`plan`, and the machine that it was made for, for keeping."""
    if kv is not None and kv not in KV_FORMATS:
        raise UserError(f"kv must be one of {', '.join(KV_FORMATS)}, not {kv!r}")
    for name, number, most in (("ranks", ranks, MAX_RANKS), ("prompt-tokens", prompt, MAX_PROMPT_TOKENS)):
        if number is not None and not 1 <= number <= most:
            raise UserError(f"--{name} must be from 1 to {most}, not {number}")
    subject = find_subject(model, format)
    chosen_kv = cast(KVFormat, kv or ("f32" if subject.format == "f32" else "bf16"))
    positions = usable_context(subject.config, context)
    if ranks:
        cut_heads(subject.config, ranks)  # what the model refuses is not asked of the machine
    if machine is None:
        facts = read_machine()
        placed = _placed(subject.config, None if ranks else len(plan_ranks(facts)), ranks)
        on = plan_ranks(facts, placed)
        target = Calibration(facts, on, subject.config, subject.format, chosen_kv).measure()
    else:
        target = load_machine(machine)
        placed = _placed(subject.config, None if ranks else len(target.place(None)), ranks)
        on = target.place(placed)
    on = _by_position(on)
    question = _Question(subject, target, chosen_kv, positions, min(prompt, subject.config.max_context))
    return question.answer(on), target


def find_subject(model: str, format: str | None) -> Subject:
    """A shape's name, a config.json or its directory, a bundled model, a GGUF file, or a fourfold directory.

    Raises UserError where it is none of them, or where the format is not one or contradicts a fourfold directory's.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"there is no format {format!r}; choose one of {', '.join(FORMATS)}")
    path = Path(model).expanduser()
    stored = fourfold_format(path)
    if stored is not None:
        if format not in (None, stored):
            raise UserError(f"{path} is {stored}, not {format}; leave the format out, or plan with its config.json")
        directory = open_directory(path)
        formats = {name: weight.format for name, weight in directory.weights.items()}
        return Subject(path.name, directory.config, formats, Counter(formats.values()).most_common(1)[0][0])
    if model in BUNDLED or (path.is_file() and path.suffix != ".json"):
        with open_source(source_path(model)) as source:
            config = source.config
    else:
        config = known_config(model)
    chosen = cast(WeightFormat, format or DEFAULT_FORMAT)
    name = model if not path.exists() else path.parent.name if path.name == "config.json" else path.name
    return Subject(name, config, {s.name: chosen for s in weight_specs(config) if s.is_matrix}, chosen)


@dataclass(frozen=True)
class _Question:
    subject: Subject
    machine: PlannedMachine
    kv: KVFormat
    context: int
    prompt: int

    def answer(self, on: list[RankPlan]) -> dict[str, Any]:
        work = self._work(on)
        clock = Clock(self.machine, on, work)
        memory = self._memory(on, work)
        start, full = clock.decode(0), clock.decode(self.context - 1)
        prefill = clock.prefill(self.prompt)
        weights_gb, kv_gb = clock.read_gb(self.context - 1)
        return {
            "model": self.subject.name,
            "model_type": self.subject.config.model_type,
            "parameters": self.subject.n_parameters,
            "format": self.subject.format,
            "kv": self.kv,
            "context": self.context,
            "machine": asdict(self.machine),
            "ranks": len(on),
            "threads": sum(len(rank.cpus) for rank in on),
            "memory": memory,
            "decode": {
                "read_weights_gb": weights_gb,
                "read_kv_gb": kv_gb,
                "at_start": _milliseconds(start),
                "at_context": _milliseconds(full),
                "bound_by": _decode_bound(full),
            },
            "prefill": {
                "tokens": self.prompt,
                "seconds": asdict(prefill) | {"total": prefill.total},
                "tokens_per_s": self.prompt / prefill.total,
                "bound_by": max(asdict(prefill).items(), key=lambda item: item[1])[0],
            },
            "by_ranks": [self._curve(n) for n in self._rank_counts(len(on))],
            "advice": list(self._advice(on, memory)),
            "notes": list(self._notes(on)),
        }

    def _work(self, on: Sequence[RankPlan], subject: Subject | None = None, context: int | None = None) -> Work:
        subject = subject or self.subject
        threads = [len(rank.cpus) for rank in on]
        return count_work(subject.config, subject.formats, kv=self.kv, context=context or self.context, threads=threads)

    def _memory(self, on: Sequence[RankPlan], work: Work) -> dict[str, Any]:
        need = work.footprint
        pages = -(-self.context // PAGE)
        nodes = []
        for number, node in enumerate(self.machine.nodes):
            ranks = [r for r, rank in enumerate(on) if rank.node == number]
            taken = {
                "weights": sum(need.room[r] for r in ranks),
                "kv": sum(need.kv_page[r] * pages for r in ranks),
                "buffers": sum(need.work[r] for r in ranks),
            }
            total = {"total": sum(taken.values()), "memory": int(node.memory_gb * 1e9)}
            nodes.append({"node": number, "ranks": ranks, **taken, **total})
        return {
            "nodes": nodes,
            "shared": need.rope,
            "total": need.total(self.context),
            "fits": self._fits(on, work, self.context),
            "longest_context": self._longest(on),
            "model_context": self.subject.config.max_context,
        }

    def _fits(self, on: Sequence[RankPlan], work: Work, context: int) -> bool:
        """As the engine asks before it loads: all together, and node by node."""
        need, rope = work.footprint, table_bytes(self.subject.config, context)
        held = need.rank(context)
        if sum(held) + rope > sum(node.memory_gb for node in self.machine.nodes) * 1e9:
            return False
        return len({rank.node for rank in on}) == 1 == len(self.machine.nodes) or all(
            sum(n for n, rank in zip(held, on, strict=True) if rank.node == number) <= node.memory_gb * 1e9
            for number, node in enumerate(self.machine.nodes)
        )

    def _longest(self, on: Sequence[RankPlan]) -> int:
        """The longest context that fits, in whole pages, of those the model was trained for; 0 where none does."""
        most = self.subject.config.max_context
        low, high = 0, -(-most // PAGE)  # pages
        while low < high:
            middle = (low + high + 1) // 2
            context = min(middle * PAGE, most)
            low, high = (
                (middle, high) if self._fits(on, self._work(on, context=context), context) else (low, middle - 1)
            )
        return min(low * PAGE, most)

    def _rank_counts(self, asked: int) -> list[int]:
        """Ranks to compare: up to one for each node, two for each, those asked for; where the model can be cut so."""
        nodes, cores = len(self.machine.nodes), sum(node.cores for node in self.machine.nodes)
        wanted = sorted({1, 2, *range(1, min(nodes, 4) + 1), nodes, 2 * nodes, asked})
        return [n for n in wanted if (n <= cores or n == asked) and n <= MAX_RANKS and self._can_cut(n)]

    def _can_cut(self, n_ranks: int) -> bool:
        try:
            write_program(self.subject.config, n_ranks)
        except UnsupportedError:
            return False
        return True

    def _curve(self, n_ranks: int) -> dict[str, Any]:
        on = self.machine.place(n_ranks)
        work = self._work(on)
        clock = Clock(self.machine, on, work)
        longest = self._longest(on)
        contexts = [n for n in _spaced(self.subject.config.max_context) if n <= longest]
        return {
            "ranks": n_ranks,
            "longest_context": longest,
            "contexts": contexts,
            "ms": [clock.decode(n - 1).total for n in contexts],
            "at_context": _milliseconds(clock.decode(self.context - 1)),
        }

    def _advice(self, on: Sequence[RankPlan], memory: Mapping[str, Any]) -> Iterable[str]:
        if memory["fits"]:
            return
        worst = max(memory["nodes"], key=lambda node: node["total"] - node["memory"])
        yield (
            f"It does not fit: {memory['total'] / 1e9:.1f} GB in all, {worst['total'] / 1e9:.1f} GB of them on node "
            f"{worst['node']}, which has {worst['memory'] / 1e9:.1f} GB."
        )
        if memory["longest_context"]:
            yield f"It would with a context of {memory['longest_context']} or less."
        for format in SMALLER_FIRST:
            if format != self.subject.format and self._fits(
                on, self._work(on, self.subject.in_format(format)), self.context
            ):
                yield f"It would in {format}."
        for n in self._rank_counts(len(on)):
            placed = self.machine.place(n)
            if n > len(on) and self._fits(placed, self._work(placed), self.context):
                yield f"It would over {n} ranks."
                break

    def _notes(self, on: Sequence[RankPlan]) -> Iterable[str]:
        attained = self.machine.attained
        if attained.format != self.subject.format:
            yield f"The kernels' shares are of {attained.format}; {self.subject.format} is assumed to have the same."
        if attained.kv_format != self.kv:
            yield f"Attention's shares are of {attained.kv_format}; {self.kv} is assumed to have the same."
        queries = self.subject.config.n_heads / self.subject.config.n_kv_heads
        if attained.queries_per_kv != queries:
            yield (
                f"Attention's share is of {attained.queries_per_kv:g} query heads to a KV head, and this model has "
                f"{queries:g}: more of them may read the cache more slowly."
            )
        cpus = [cpu for rank in on for cpu in rank.cpus]
        if len(set(cpus)) < len(cpus):
            yield f"{len(on)} ranks take turns on {len(set(cpus))} cores: waiting for a turn comes on top."


def _placed(config: ModelConfig, natural: int | None, asked: int | None) -> int:
    """Ranks: those asked for, else one for each node, or as many as the model can be cut for."""
    if asked:
        return asked
    assert natural is not None
    for n_ranks in range(natural, 1, -1):
        try:
            cut_heads(config, n_ranks)
        except UnsupportedError:
            continue
        return n_ranks
    return 1


def _by_position(on: Sequence[RankPlan]) -> list[RankPlan]:
    """The same ranks, their nodes numbered from 0 in the order in which a PlannedMachine lists them."""
    order = sorted({rank.node for rank in on})
    return [RankPlan(order.index(rank.node), rank.cpus) for rank in on]


def _spaced(longest: int) -> list[int]:
    """Contexts from one page to the longest, evenly on a logarithmic scale."""
    first = min(PAGE, longest)
    steps = (first * (longest / first) ** (i / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS))
    return sorted({round(n) for n in steps})


def _milliseconds(time: Decode) -> dict[str, float]:
    return asdict(time) | {"total": time.total, "tokens_per_s": 1e3 / time.total}


def _decode_bound(time: Decode) -> str:
    return max(asdict(time).items(), key=lambda item: item[1])[0]


def _size(shape: Sequence[int]) -> int:
    n = 1
    for side in shape:
        n *= side
    return n
