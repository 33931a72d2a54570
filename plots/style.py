"""One look for all figures: colours by configuration, type sizes, axes that read well at README width."""

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
COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#0891b2", "#be185d", "#a16207", "#475569")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
WIDTH_IN = 10.0
PIXELS_PER_IN = 200  # 2,000 px wide: sharp when shown at half to two thirds of that

STYLE: Any = {  # matplotlib types its keys one by one
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
    "svg.hashsalt": "redline",  # the same results give the same file
}


def palette(configurations: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each configuration, the same in every figure of a report."""
    return {
        name: (COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)])
        for i, name in enumerate(configurations)
    }


def plain(value: float, _position: int | None = None) -> str:
    """A number as people write it: 0.25, 4.2, 31, 1,240."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def span(values: Sequence[int]) -> str:
    """The range of whole numbers in words: "40–200", or "40" when all are the same."""
    low, high = min(values, default=0), max(values, default=0)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def wrapped(facts: Iterable[str], width: int = 168) -> list[str]:
    """Facts joined to lines of at most `width` characters; a fact is split only if it alone is longer."""
    lines: list[str] = []
    for fact in facts:
        joined = f"{lines[-1]}  ·  {fact}" if lines else fact
        if lines and len(joined) <= width:
            lines[-1] = joined
        elif fact:
            lines += textwrap.wrap(fact, width)
    return lines


def headline(figure: Figure, text: str, height_in: float) -> None:
    """The figure's title at its top left, in smaller type where it would not fit."""
    size = min(14.0, 14.0 * 78 / max(len(text), 1))
    figure.text(0.012, 1 - 0.22 / height_in, text, fontsize=size, weight="bold", va="center")


def legend_below_headline(figure: Figure, handles: Sequence[Artist], height_in: float, **settings: Any) -> None:
    """The legend under the figure's title, from its left edge on."""
    place: Any = {"loc": "upper left", "bbox_to_anchor": (0.005, 1 - 0.36 / height_in), "borderaxespad": 0.2}
    figure.legend(handles=handles, **({"handlelength": 2.4, "labelspacing": 0.35} | place | settings))


def footnote(figure: Figure, lines: Sequence[str], height_in: float) -> None:
    """What was run and how to read it, in small type at the figure's foot."""
    figure.text(0.012, 0.1 / height_in, "\n".join(lines), fontsize=8, color=MUTED, va="bottom", linespacing=1.45)


def wants_log(values: Iterable[float]) -> bool:
    """True when a linear axis would press most of the values flat against zero."""
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) > 12 * min(positive)


def log_y(axes: Axes, values: Iterable[float]) -> None:
    """Logarithmic y axis with round numbers as ticks: 1-2-5 over a few decades, else whole decades."""
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
    """Write `path` as PNG and the same figure as SVG beside it; both names come back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    vector = path.with_suffix(".svg")
    with matplotlib.rc_context(STYLE):  # settings such as the type of SVG text count when a figure is written
        figure.savefig(path, dpi=PIXELS_PER_IN)
        figure.savefig(vector, metadata={"Date": None})
    return [path, vector]
