"""What the clients saw, as a table for docs/serving.md and as a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from load.clients import Record

PERCENTILES = (50, 95, 99)


def summary(records: Sequence[Record], seconds: float) -> dict[str, Any]:
    """Percentiles and rates of one level. Clients that left count with what they read."""
    answered = [r for r in records if r.first is not None]
    firsts = [r.first for r in answered if r.first is not None]
    each = [(r.last - (r.first or 0)) / (r.tokens - 1) for r in answered if r.tokens > 1 and not r.left]
    return {
        "requests": len(records),
        "left": sum(r.left for r in records),
        "errors": sorted({r.error for r in records if r.error}),
        "seconds": seconds,
        "first_token_ms": _percentiles(firsts),
        "token_ms": _percentiles(each),
        "tokens_per_s": sum(r.tokens for r in records) / seconds,
        "prompt_tokens_per_s": sum(r.prompt_tokens for r in records) / seconds,
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(seconds, p)) * 1e3 if seconds else float("nan") for p in PERCENTILES}


WORDS = {
    "en": {
        "head": "| clients | requests (left) | first token, ms: p50, p95, p99 | a token, ms: p50, p95, p99 | "
        "tokens/s | prompt tokens/s | errors |",
        "share": "The same {requests} requests at {clients} clients who stay and do not think: {served:.0f} tokens/s "
        "served, {offline:.0f} offline (medians of {rounds}): **{ratio:.2f}**.",
        "chart": "Latencies and tokens a second by the number of clients",
    },
    "zh": {
        "head": "| 客户端数 | 请求数（中途离开） | 首个 token，ms：p50、p95、p99 | 每个 token，ms：p50、p95、p99 | "
        "token/s | 提示 token/s | 错误 |",
        "share": "同样的 {requests} 个请求，由 {clients} 个既不停顿也不离开的客户端发出：服务器 {served:.0f} token/s，"
        "离线 {offline:.0f} token/s（{rounds} 次的中位数）：**{ratio:.2f}**。",
        "chart": "延迟与每秒 token 数随客户端数的变化",
    },
}


def markdown(results: Mapping[str, Any], chart_file: str, language: str = "en") -> str:
    """The chart, a table of all levels, and the offline figure; in "en" or "zh"."""
    words = WORDS[language]
    lines = [f"![{words['chart']}]({chart_file})", "", words["head"], "|---|---|---|---|---|---|---|"]
    for level in results["levels"]:
        first, token = (", ".join(f"{v:.0f}" for v in level[k].values()) for k in ("first_token_ms", "token_ms"))
        lines.append(
            f"| {level['clients']} | {level['requests']} ({level['left']}) | {first} | {token} | "
            f"{level['tokens_per_s']:.0f} | {level['prompt_tokens_per_s']:.0f} | {len(level['errors'])} |"
        )
    return "\n".join([*lines, "", words["share"].format(**results["share"])])


def chart(results: Mapping[str, Any], path: Path) -> None:
    """Latencies on the left, rates on the right, by clients; written as SVG."""
    import matplotlib.pyplot as plt

    levels = results["levels"]
    clients = [level["clients"] for level in levels]
    colours = {"p50": "#0a7d6c", "p95": "#d08a1d", "p99": "#b4402f"}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for axis, key, title in zip(
        axes, ("first_token_ms", "token_ms"), ("First token", "Each further token"), strict=False
    ):
        for name, colour in colours.items():
            axis.plot(clients, [level[key][name] for level in levels], marker="o", color=colour, label=name)
        axis.set(title=title, ylabel="ms", yscale="log")
        axis.legend(frameon=False)
    axes[2].plot(clients, [level["tokens_per_s"] for level in levels], marker="o", color=colours["p50"], label="served")
    axes[2].axhline(results["share"]["offline"], color="#5b6776", linestyle="--", label="offline, all at once")
    axes[2].set(title="Tokens a second", ylim=(0, None))
    axes[2].legend(frameon=False)
    for axis in axes:
        axis.set(xlabel="clients", xscale="log")
        axis.set_xticks(clients, [str(n) for n in clients])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(results["title"], fontsize=11)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
