"""A plan as a picture: ms a token against context for each number of ranks, and what a token's time is made of.

Drawn with matplotlib (the optional extra `picture`). An SVG follows the reader's light or dark theme; a PNG is light.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold.errors import UserError
from fourfold.plan.tables import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")
INK, PAPER, GRID = "#24292f", "#fffffe", "#d0d4d8"
DARK = {INK: "#e6e9ec", PAPER: "#15191e", GRID: "#3a4149"}
# Okabe and Ito's colours: told apart by colour-blind eyes, and on either background.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
PART_COLOURS = {"weights": "#0072b2", "kv": "#009e73", "reduction": "#e69f00", "overhead": "#999999"}


def check_picture(path: Path) -> None:
    """Raises UserError where the name is not that of a picture, its folder is not there, or matplotlib is missing."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} must end in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UserError(f"there is no directory {path.parent} to write {path.name} in")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'fourfold[picture]'") from None


def draw(answer: Mapping[str, Any], path: Path) -> None:
    """Writes the picture of what `plan` returned, over a file that is there. Raises UserError where it cannot."""
    check_picture(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fourfold",  # the same picture, the same bytes
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"],
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "axes.facecolor": PAPER,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": GRID,
        "legend.frameon": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(11, 5), facecolor=PAPER, layout="constrained")
        figure.suptitle(_title(answer), fontsize=13, fontweight="bold", color=INK)
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _curves(left, answer)
        _parts(right, answer)
        metadata = {"Date": None, "Creator": "fourfold plan", "Title": _title(answer)} if path.suffix == ".svg" else {}
        try:
            figure.savefig(path, dpi=150, metadata=metadata)
            if path.suffix == ".svg":
                path.write_text(_themed(path.read_text(encoding="utf-8")), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def _title(answer: Mapping[str, Any]) -> str:
    return f"{answer['model']}, {answer['format']} weights, {answer['kv']} KV cache, on {answer['machine']['name']}"


def _curves(axes: Axes, answer: Mapping[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter

    highest = 0.0
    for number, curve in enumerate(answer["by_ranks"]):
        label = f"{curve['ranks']} rank{'s' if curve['ranks'] > 1 else ''}"
        if curve["longest_context"] < answer["memory"]["model_context"]:
            fits = f"fits up to {curve['longest_context']}" if curve["longest_context"] else "does not fit"
            label += f" ({fits})"
        asked = curve["ranks"] == answer["ranks"]
        colour = LINES[number % len(LINES)]
        axes.plot(curve["contexts"], curve["ms"], color=colour, linewidth=2.6 if asked else 1.4, label=label)
        if curve["contexts"]:
            axes.plot(curve["contexts"][-1], curve["ms"][-1], "o", color=colour, markersize=5)
        highest = max([highest, *curve["ms"]])
    if answer["memory"]["fits"]:
        axes.axvline(answer["context"], color=INK, linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    axes.tick_params(axis="x", labelrotation=30)
    axes.set_ylim(0, 1.35 * highest or 1)
    axes.grid(visible=True, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title("A token takes longer as the text grows")
    axes.set_xlabel("context (tokens of the text so far, logarithmic)")
    axes.set_ylabel("time of one token (ms)")
    axes.legend(loc="upper left", ncols=3)


def _parts(axes: Axes, answer: Mapping[str, Any]) -> None:
    """Bars, one for each number of ranks, stacked of the parts."""
    curves = answer["by_ranks"]
    places = range(len(curves))
    bottom = [0.0] * len(curves)
    for part, name in PARTS.items():
        heights = [curve["at_context"][part] for curve in curves]
        axes.bar(places, heights, bottom=bottom, width=0.6, color=PART_COLOURS[part], label=name)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    for place, curve in zip(places, curves, strict=True):
        axes.annotate(
            f"{curve['at_context']['tokens_per_s']:.1f}/s",
            (place, bottom[place]),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
        )
    axes.set_xticks(list(places), [str(curve["ranks"]) for curve in curves])
    axes.set_ylim(0, 1.35 * max(bottom))
    axes.grid(visible=True, axis="y", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(f"What it is made of after {answer['context']} tokens")
    axes.set_xlabel("ranks (slices of the model); above: tokens/s")
    axes.set_ylabel("time of one token (ms)")
    axes.legend(loc="upper right", ncols=2)


def _themed(svg: str) -> str:
    """The same SVG with a style sheet that swaps ink, paper and grid where the reader prefers dark."""
    rules = "".join(
        f'[style*="{what}: {light}"] {{ {what}: {dark} !important }} '
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    begin = svg.index("<defs>")
    return f"{svg[:begin]}<style>@media (prefers-color-scheme: dark) {{ {rules}}}</style>\n {svg[begin:]}"
