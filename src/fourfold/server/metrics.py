"""What is counted: for Prometheus, and as JSON for the page."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

WINDOW_SECONDS = 5.0  # over which speeds are taken
SAMPLE_SECONDS = 0.5
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_ROUTES = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/models"})  # else anybody could make new labels

# Of the step loop's Stats: our name, its field, what it is.
_COUNTERS = (
    ("prompt_tokens", "tokens_prompt", "Tokens of prompts that were computed."),
    ("generated_tokens", "tokens_generated", "Tokens that were sampled."),
    ("reused_tokens", "tokens_reused", "Tokens of prompts whose keys and values were there already."),
    ("preemptions", "preemptions", "Texts that gave their pages to others for a while."),
    ("drafted_tokens", "drafted", "Tokens that speculation proposed."),
    ("accepted_tokens", "accepted", "Tokens that speculation proposed rightly."),
    ("steps", "steps", "Steps of the model."),
    ("step_seconds", "step_seconds", "Seconds spent in steps."),
    ("read_bytes", "bytes_read", "Bytes of weights and KV cache that steps had to read."),
)
_GAUGES = (("running", "running", "Texts under way."), ("waiting", "waiting", "Texts in the queue."))
_PAGES = (("held", "pages_held"), ("cached", "pages_cached"), ("total", "pages_total"))


class Metrics:
    """One server's figures. `stats()` gives the step loop's counters as they stood after its last step."""

    def __init__(self, stats: Callable[[], Any], read_gb_s: float | None = None) -> None:
        self.read_gb_s = read_gb_s  # the machine's, as measured; None: not measured
        self._stats = stats
        self._samples: deque[tuple[float, Any]] = deque([(monotonic(), stats())])
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "fourfold_requests", "HTTP requests by route and status.", ("route", "status"), registry=self.registry
        )
        self._first = Histogram(
            "fourfold_time_to_first_token_seconds",
            "From a request's coming to its first token.",
            buckets=_FIRST,
            registry=self.registry,
        )
        self._next = Histogram(
            "fourfold_time_per_token_seconds",
            "Between a text's tokens, of those after the first.",
            buckets=_NEXT,
            registry=self.registry,
        )
        self.registry.register(_StepStats(self))

    def count(self, path: str, status: int) -> None:
        """A request has ended."""
        known = path if path in _ROUTES else "other"
        self._requests.labels(known, str(status)).inc()

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def next_tokens(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self._next.observe(seconds / count)

    def sample(self) -> None:
        """To be called every SAMPLE_SECONDS: speeds are taken between samples."""
        now = monotonic()
        self._samples.append((now, self._stats()))
        while now - self._samples[0][0] > WINDOW_SECONDS and len(self._samples) > 2:
            self._samples.popleft()

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def snapshot(self) -> dict[str, Any]:
        """Speeds of the last WINDOW_SECONDS and the counters, JSON-ready."""
        (then, before), (now, after) = self._samples[0], self._samples[-1]
        seconds = max(now - then, SAMPLE_SECONDS)
        stepping = after.step_seconds - before.step_seconds
        read = (after.bytes_read - before.bytes_read) / stepping / 1e9 if stepping > 0 else 0.0
        latest = self._stats()
        return {
            "tokens_per_second": (after.tokens_generated - before.tokens_generated) / seconds,
            "prompt_tokens_per_second": (after.tokens_prompt - before.tokens_prompt) / seconds,
            "read_gb_s": read,  # while the model steps
            "read_limit_gb_s": self.read_gb_s,
            "memory_share": read / self.read_gb_s if self.read_gb_s else None,
            **{name: getattr(latest, field) for name, field, _ in (*_GAUGES, *_COUNTERS)},
            "pages": {state: getattr(latest, field) for state, field in _PAGES},
        }


class _StepStats(Collector):
    """The step loop's own counters, as they stand when Prometheus asks."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        stats, now = self._metrics._stats(), self._metrics.snapshot()
        for name, field, what in _COUNTERS:
            yield CounterMetricFamily(f"fourfold_{name}", what, getattr(stats, field))
        for name, field, what in _GAUGES:
            yield GaugeMetricFamily(f"fourfold_{name}", what, getattr(stats, field))
        pages = GaugeMetricFamily("fourfold_kv_pages", "Pages of the KV cache.", labels=["state"])
        for state, field in _PAGES:
            pages.add_metric([state], getattr(stats, field))
        yield pages
        if (share := now["memory_share"]) is not None:
            yield GaugeMetricFamily(
                "fourfold_memory_bandwidth_share", "Bytes read a second of steps, of what the machine gives.", share
            )
