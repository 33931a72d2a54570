"""The style of all figures: colors, font sizes, axes, title and caption."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

INK = "#1f2937"
MUTED = "#6b7280"
GRID = "#e5e7eb"
COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#0891b2", "#be185d", "#a16207", "#475569")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
WIDTH_IN = 10.0
SECONDS_FROM_MS = 10_000  # an axis with larger values is labeled in seconds
LINE_WIDTH = 168  # characters of a caption
PIXELS_PER_IN = 200  # 2,000 px wide, sharp at half of that

STYLE: Any = {  # matplotlib's type is a literal of all keys
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9ca3af",
    "axes.linewidth": 0.8,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "redline",  # makes SVG files reproducible
}


def palette(configurations: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Color and marker of each configuration, the same in all figures of a report."""
    return {
        name: (COLORS[i % len(COLORS)], MARKERS[(i + i // len(COLORS)) % len(MARKERS)])
        for i, name in enumerate(configurations)
    }


def plain(value: float, _position: int | None = None) -> str:
    """A number as text: 0.25, 4.2, 31, 1,240."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def span(values: Sequence[int]) -> str:
    """The range of integers: "40–200", or "40" if all are equal."""
    low, high = min(values, default=0), max(values, default=0)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def wrapped(facts: Iterable[str]) -> list[str]:
    """Parts of a caption joined to lines of at most LINE_WIDTH characters; only a longer part is split."""
    lines: list[str] = []
    for fact in facts:
        joined = f"{lines[-1]}  ·  {fact}" if lines else fact
        if lines and len(joined) <= LINE_WIDTH:
            lines[-1] = joined
        elif fact:
            lines += textwrap.wrap(fact, LINE_WIDTH)
    return lines


def framed_figure(
    title: str, handles: Sequence[Artist], footer: Sequence[str], height_in: float, **legend: Any
) -> Figure:
    """A figure with its title and legend, and the caption at its foot; the settings are the legend's."""
    figure = Figure(figsize=(WIDTH_IN, height_in))
    headline(figure, title, height_in)
    legend_below_headline(figure, handles, height_in, **legend)
    footnote(figure, footer, height_in)
    return figure


def headline(figure: Figure, text: str, height_in: float) -> None:
    """Write the figure's title at its top left, in a smaller font if necessary."""
    size = min(14.0, 14.0 * 78 / max(len(text), 1))
    figure.text(0.012, 1 - 0.22 / height_in, text, fontsize=size, weight="bold", va="center")


def legend_below_headline(figure: Figure, handles: Sequence[Artist], height_in: float, **settings: Any) -> None:
    """Draw the legend below the figure's title."""
    place: Any = {"loc": "upper left", "bbox_to_anchor": (0.005, 1 - 0.36 / height_in), "borderaxespad": 0.2}
    figure.legend(handles=handles, **({"handlelength": 2.4, "labelspacing": 0.35} | place | settings))


def footnote(figure: Figure, lines: Sequence[str], height_in: float) -> None:
    """Write the caption at the foot of the figure."""
    figure.text(0.012, 0.1 / height_in, "\n".join(lines), fontsize=8, color=MUTED, va="bottom", linespacing=1.45)


def needs_log_scale(values: Iterable[float]) -> bool:
    """Whether a logarithmic axis is better: on a linear one, most values would be close to zero."""
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) > 12 * min(positive)


def log_y(axes: Axes, values: Iterable[float]) -> None:
    """Set a logarithmic y axis with ticks at 1-2-5 over a few decades, else at decades."""
    positive = [value for value in values if value > 0]
    low, high = min(positive), max(positive)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.35, high * 1.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(plain))


def linear_y(axes: Axes, values: Iterable[float]) -> None:
    axes.set_ylim(0, max(values, default=1.0) * 1.15 or 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))


def save(figure: Figure, path: Path) -> list[Path]:
    """Write the figure to `path` as PNG and as SVG; returns both paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    vector = path.with_suffix(".svg")
    with matplotlib.rc_context(STYLE):  # settings such as svg.fonttype apply when a figure is written
        figure.savefig(path, dpi=PIXELS_PER_IN)
        figure.savefig(vector, metadata={"Date": None})
    return [path, vector]
