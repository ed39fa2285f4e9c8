"""This machine as a `PlannedMachine`: limits from the probes of `fourfold doctor`, shares from the kernels themselves.

What the kernels attain is measured on small programs of the same ops as a model's, never on a model: what they predict
for one can then be compared with it (`fourfold bench plan`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fourfold._core as _core
from fourfold.config import KVFormat, ModelConfig, WeightFormat
from fourfold.engine import MAX_STEP_TOKENS
from fourfold.errors import ResourceError, RuntimeFailure
from fourfold.footprint import HUGE_PAGE, PAGE
from fourfold.format import TILE_N, stored_bytes
from fourfold.machine import Machine, RankPlan, choose_isa
from fourfold.plan.machines import MAX_SHARE, Attained, NodeRates, PlannedMachine
from fourfold.plan.probes import Attention, Bench, Probe, chain, gates, idle, norms
from fourfold.program import cut_heads

# (outputs of a rank, inputs): large slices fill huge pages, small ones do not; wide and narrow ones of each.
LARGE, SMALL = ((4096, 4096), (8192, 2048), (16384, 1024)), ((256, 4096), (1536, 576), (768, 512), (192, 576))
CHAIN_BYTES = 100_000_000  # of a chain, or more where the caches are large
TIMES_CACHE = 3  # so many last-level caches' worth: nothing is found there again
READ_BYTES, TRIALS = 200_000_000, 2
VECTOR_WIDTHS, VECTOR_OPS = (1024, 8192), 200
CACHED_SHAPE, CACHED_PART = (512, 4096), 0.25  # of the last-level cache
KV_POSITIONS = 1024
PROMPT_LAYERS = 2
PROMPT_PROBES = ("prompt", "prompt attention")
PASSES = 3  # over all probes, so that what else the machine does meets each
STEPS = 7  # of each probe in a pass; the median counts


@dataclass(frozen=True)
class _Chain:
    """A linear op of the chains: what the machine's model says it must do, on every rank alike."""

    probe: Probe
    bytes: int  # of all ranks
    busiest: float  # the part of a rank's panels that its busiest thread has
    panels: float  # of that thread
    is_large: bool


class Calibration:
    """Loaded probes, for one placing of ranks, one format, and the attention heads of one model.

    Takes a few times the last-level caches of memory until it is dropped. Raises ResourceError where that is short.
    """

    def __init__(
        self, machine: Machine, plan: Sequence[RankPlan], config: ModelConfig, format: WeightFormat, kv: KVFormat
    ) -> None:
        self._machine, self._plan = machine, plan
        self._cpus = sorted({cpu for rank in plan for cpu in rank.cpus})
        self._cache_bytes = _last_level_bytes(machine)
        chain_bytes = max(CHAIN_BYTES, TIMES_CACHE * self._cache_bytes)
        needed = (len(LARGE) + len(SMALL) + 2) * chain_bytes + READ_BYTES
        if needed > machine.available_bytes:
            raise ResourceError(
                f"measuring this machine takes {needed / 1e9:.1f} GB and {machine.available_bytes / 1e9:.1f} GB are "
                "free: free some memory, or plan with --machine FILE"
            )
        self._slow: dict[str, float] = {}
        self._bench = Bench.of(plan, choose_isa(), format, kv)
        self._chains = [self._chain(shape, chain_bytes) for shape in (*LARGE, *SMALL)]
        self._cached = self._chain(CACHED_SHAPE, CACHED_PART * self._cache_bytes, min_ops=200)
        self._vectors = {
            (width * part, name): build(self._bench, width, VECTOR_OPS)
            for width in VECTOR_WIDTHS
            for name, build, part in (("norm", norms, 1.0), ("gate", gates, 1.0 / self._threads))
        }
        self._idle = idle(self._bench)
        self._prompt_flop = 2.0 * MAX_STEP_TOKENS * LARGE[0][0] * LARGE[0][1] * self._bench.n_ranks
        self._prompt = chain(self._bench, LARGE[0][0] * self._bench.n_ranks, LARGE[0][1], 1, tokens=MAX_STEP_TOKENS)
        self._load_attention(config, chain_bytes)

    @property
    def _threads(self) -> float:
        """Of a rank, in the mean."""
        return sum(len(rank.cpus) for rank in self._plan) / len(self._plan)

    def _chain(self, shape: tuple[int, int], n_bytes: float, min_ops: int = 1) -> _Chain:
        n, k = shape[0] * self._bench.n_ranks, shape[1]
        per_rank = shape[0] // TILE_N
        panels = -(-per_rank // round(self._threads))
        one_rank = stored_bytes(self._bench.format, shape)
        probe = chain(self._bench, n, k, n_bytes, min_ops=min_ops)
        return _Chain(probe, one_rank * self._bench.n_ranks, panels / per_rank, panels, one_rank >= HUGE_PAGE)

    def _load_attention(self, config: ModelConfig, n_bytes: float) -> None:
        bench, heads = self._bench, cut_heads(config, self._bench.n_ranks)
        kv_heads = [width // config.head_dim for width in heads.kv.widths]
        layer = sum(kv_heads) * _core.kv_page_bytes(bench.kv, config.head_dim) * KV_POSITIONS // PAGE
        self._kv_layer_bytes = layer * (KV_POSITIONS - 1) / KV_POSITIONS
        self._queries_per_kv = config.n_heads / config.n_kv_heads
        self._query_heads = [width // config.head_dim for width in heads.q.widths]
        n_layers = max(1, round(n_bytes / layer))
        self._attention = Attention(bench, heads, config.head_dim, n_layers, KV_POSITIONS, MAX_STEP_TOKENS)
        self._prompt_attention = Attention(
            bench, heads, config.head_dim, PROMPT_LAYERS, MAX_STEP_TOKENS, MAX_STEP_TOKENS
        )
        seen = MAX_STEP_TOKENS * (MAX_STEP_TOKENS + 1) / 2
        self._prompt_attention_flop = 4.0 * config.n_heads * config.head_dim * seen

    def measure(self, *, passes: int = PASSES, decode_only: bool = False) -> PlannedMachine:
        """The memory's speed and what the kernels make of it, anew, half a second a pass.

        decode_only leaves what prompts need as it was measured before.
        """
        fast = {key: probe for key, probe in self._probes().items() if key not in PROMPT_PROBES}
        slow = {} if decode_only and self._slow else {key: self._probes()[key] for key in PROMPT_PROBES}
        times: dict[Any, list[float]] = {key: [] for key in (*fast, *slow)}
        read, core, peak = [], [], []
        for _ in range(passes):
            read.append(self._read(self._cpus))
            for key, probe in fast.items():
                times[key].append(probe.us_per_op(STEPS))
            read.append(self._read(self._cpus))
            for key, probe in slow.items():
                times[key].append(probe.us_per_op(1))
                core.append(self._read(self._cpus[:1]))
                peak.append(self._peak())
        us = {key: median(values) for key, values in times.items()}
        if slow:
            self._slow = {key: us[key] for key in slow} | {"core": median(core), "peak": median(peak)}
        us |= self._slow
        nodes = self._nodes(median(read), us["peak"])
        core_read = min(us["core"], nodes[0].read_gb_s)
        return PlannedMachine(
            name="this machine",
            about=f"measured: {self._machine.model}",
            nodes=nodes,
            core_read_gb_s=core_read,
            links=None,
            attained=self._attained(us, median(read) * 1e3, core_read * 1e3, us["peak"] * 1e6),
        )

    def _probes(self) -> dict[Any, Probe]:
        return {
            **{i: chain.probe for i, chain in enumerate(self._chains)},
            **self._vectors,
            "cached": self._cached.probe,
            "idle": self._idle,
            "prompt": self._prompt,
            "first": self._attention.first,
            "last": self._attention.last,
            "prompt attention": self._prompt_attention.prompt,
        }

    def _attained(self, us: Mapping[Any, float], read: float, core: float, peak: float) -> Attained:
        """`us` by probe; the limits in bytes and FLOP a microsecond."""
        # Vectors: op_us + elements · element_ns.
        rows = np.array([[1.0, elements / 1e3] for elements, _ in self._vectors])
        op_us, element_ns = non_negative_fit(rows, np.array([us[key] for key in self._vectors]))
        # Linears: linear_us + panels · panel_us + reading / share, of large and of small slices.
        reading = [max(c.bytes / read, c.bytes / self._bench.n_ranks * c.busiest / core) for c in self._chains]
        rows = np.array(
            [[1.0, c.panels, r * c.is_large, r * (not c.is_large)] for c, r in zip(self._chains, reading, strict=True)]
        )
        measured = np.array([us[i] for i in range(len(self._chains))])
        linear_us, panel_us, large, small = non_negative_fit(rows, measured)
        cached_us = us["cached"] - linear_us - panel_us * self._cached.panels
        cached_bytes = self._cached.bytes / self._bench.n_ranks * self._cached.busiest
        # Attention.
        layer_us = max(us["last"] - us["first"], 1e-3)
        dealt = [(-(-n // len(rank.cpus)), n) for n, rank in zip(self._query_heads, self._plan, strict=True)]
        busiest = max(most for most, _ in dealt)
        part = max(most / heads for most, heads in dealt)
        kv_reading = max(self._kv_layer_bytes / read, self._kv_layer_bytes / self._bench.n_ranks * part / core)
        return Attained(
            format=self._bench.format,
            kv_format=self._bench.kv,
            weights=1 / max(large, 1 / MAX_SHARE),
            small_weights=1 / max(small, 1 / MAX_SHARE),
            kv=min(kv_reading / layer_us, MAX_SHARE),
            queries_per_kv=self._queries_per_kv,
            cached_core_gb_s=cached_bytes / max(cached_us, 0.1 * us["cached"]) / 1e3,
            prefill=self._prompt_flop / us["prompt"] / peak,
            attention=self._prompt_attention_flop / us["prompt attention"] / peak,
            step_us=us["idle"],
            op_us=max(op_us, 1e-3),
            linear_us=max(linear_us, 1e-3),
            panel_us=max(panel_us, 1e-6),
            element_ns=max(element_ns, 1e-6),
            head_us=max((us["first"] - 2 * op_us) / busiest, 1e-3),
        )

    def _read(self, cpus: list[int]) -> float:
        """GB/s of the best of the read patterns."""
        n_bytes = max(READ_BYTES, TIMES_CACHE * self._cache_bytes)
        return float(_measured(_core.measure_read_bandwidth, cpus, n_bytes, TRIALS)["median_gb_s"])

    def _peak(self) -> float:
        """TFLOP/s of the fastest instructions."""
        return float(_measured(_core.measure_peak, self._cpus, _core.peak_kinds()[0], 1)["median_gflop_s"]) / 1e3

    def _nodes(self, read: float, peak: float) -> tuple[NodeRates, ...]:
        """Every node with CPUs, in order; the limits shared out over the CPUs that were measured."""
        nodes = [node for node in self._machine.nodes if node.usable_cpus]
        cpus = [len(set(node.usable_cpus) & set(self._cpus)) or len(node.usable_cpus) for node in nodes]
        alone = len(nodes) == 1
        return tuple(
            NodeRates(
                cores=len(node.usable_cpus),
                memory_gb=(self._machine.available_bytes if alone else node.available_bytes) / 1e9,
                read_gb_s=read * n / len(self._cpus),
                cache_mb=max(self._cache_bytes / len(nodes) / 1e6, 1e-3),
                peak_tflops=peak * n / len(self._cpus),
            )
            for node, n in zip(nodes, cpus, strict=True)
        )


def _measured(measure: Any, *arguments: Any) -> Any:
    try:
        return measure(*arguments)
    except RuntimeError as error:  # a probe whose result was wrong
        raise RuntimeFailure(str(error)) from None


def _last_level_bytes(machine: Machine) -> int:
    level = max((cache.level for cache in machine.caches), default=0)
    return sum(cache.bytes * len(cache.sharers) for cache in machine.caches if cache.level == level)


def non_negative_fit(rows: NDArray[np.float64], values: NDArray[np.float64]) -> list[float]:
    """Non-negative x that makes the relative errors of rows @ x to values least in square: of every set of columns that
    may be left out, the best."""
    scaled, ones = rows / values[:, None], np.ones(len(values))
    best, best_error = np.zeros(rows.shape[1]), np.inf
    for n_columns in range(1, rows.shape[1] + 1):
        for columns in itertools.combinations(range(rows.shape[1]), n_columns):
            x = np.zeros(rows.shape[1])
            x[list(columns)] = np.linalg.lstsq(scaled[:, columns], ones, rcond=None)[0]
            error = float(np.sum((scaled @ x - ones) ** 2))
            if (x >= 0).all() and error < best_error:
                best, best_error = x, error
    return [float(value) for value in best]
