"""Figure of `make bench-ranks`: the cost of sending a step to all ranks, V1 and V0's broadcast of all inputs."""

import itertools
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from plots.style import COLORS, INK, STYLE, plain, wrapped
from tests.perf.bar_charts import add_texts, bar_figure

WAYS = {
    "v1": ("V1: one message", COLORS[0]),
    "v1-tcp": ("V1: over TCP, encrypted", COLORS[2]),
    "v0": ("V0: broadcasts of all inputs", COLORS[1]),
    "v0-joined": ("V0: in one broadcast", "#fdba74"),
}
_BAR_IN, _APART, _FURTHER = 0.27, 0.5, 1.3  # height of a bar; space between batch sizes and between ranks, in bars
_NAMES_IN = 1.75


def ranks_figure(rows: list[dict[str, Any]]) -> Figure:
    """Left: bytes sent to each rank per step. Right: time until the last rank has them."""
    places = _places(rows)
    with matplotlib.rc_context(STYLE):
        footer = _caption(rows)
        boxes = (_NAMES_IN, 3.5), (_NAMES_IN + 4.1, 3.9)
        figure, panels, height = bar_figure(places, _BAR_IN, len(footer), boxes)
        for axes in panels:
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(FuncFormatter(plain))
        _draw_bytes(panels[0], rows, places)
        _draw_time(panels[1], rows, places)
        _name(panels[0], rows, places)
        handles = [(color, name) for name, color in WAYS.values()]
        add_texts(figure, "Cost of sending a step to all ranks, V1 and V0", handles, 4, footer, height)
        return figure


def _color(engine: str) -> str:
    return WAYS[engine][1]


def _places(rows: list[dict[str, Any]]) -> list[float]:
    """Positions of the bars from the top, grouped by ranks and batch size."""
    places = [0.0]
    for before, row in itertools.pairwise(rows):
        apart = _FURTHER if row["ranks"] != before["ranks"] else _APART * (row["rows"] != before["rows"])
        places.append(places[-1] + 1 + apart)
    return places


def _draw_bytes(axes: Axes, rows: list[dict[str, Any]], places: list[float]) -> None:
    axes.set_title("Sent to each rank")
    axes.set_xlabel("kB per step")
    for row, place in zip(rows, places, strict=True):
        axes.barh(place, row["bytes"] / 1e3, 0.86, color=_color(row["engine"]))
        _annotate(axes, row["bytes"] / 1e3, place, _size(row["bytes"]))
    axes.set_xlim(0, max(row["bytes"] for row in rows) / 1e3 * 1.28)


def _draw_time(axes: Axes, rows: list[dict[str, Any]], places: list[float]) -> None:
    axes.set_title("From scheduling until the last rank starts")
    axes.set_xlabel("ms per step")
    for row, place in zip(rows, places, strict=True):
        low, high = ((row["us"] - row["us_low"]) / 1e3, (row["us_high"] - row["us"]) / 1e3)
        axes.barh(place, row["us"] / 1e3, 0.86, color=_color(row["engine"]))
        axes.errorbar(row["us"] / 1e3, place, xerr=[[max(0.0, low)], [max(0.0, high)]], color=INK, lw=1, capsize=2)
        _annotate(axes, max(row["us"], row["us_high"]) / 1e3, place, f"{row['us']:,.0f} µs")
    axes.set_xlim(0, max(max(row["us"], row["us_high"]) for row in rows) / 1e3 * 1.24)


def _annotate(axes: Axes, at: float, place: float, words: str) -> None:
    axes.annotate(words, (at, place), (5, 0), textcoords="offset points", fontsize=9, va="center")


def _name(axes: Axes, rows: list[dict[str, Any]], places: list[float]) -> None:
    how: Any = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "right", "va": "center"}
    sizes: dict[tuple[int, int], list[float]] = {}
    for row, place in zip(rows, places, strict=True):
        sizes.setdefault((row["ranks"], row["rows"]), []).append(place)
    groups: dict[int, list[float]] = {}
    for (ranks, size), own in sizes.items():
        middle = sum(own) / len(own)
        axes.annotate(f"batch {size}", (0, middle), (-7, 0), fontsize=10, **how)
        groups.setdefault(ranks, []).append(middle)
    for ranks, own in groups.items():
        axes.annotate(f"--tp {ranks}", (0, sum(own) / len(own)), (-66, 0), fontsize=10, weight="bold", **how)


def _caption(rows: list[dict[str, Any]]) -> list[str]:
    first = rows[0]
    facts = [
        f"Hardware: {first['hardware']}; more ranks share the cores",
        f"Model: {first['model']}",
        f"Step: one token per request, contexts from {first['context']} tokens, blocks of {first['block_size']}",
        f"Medians of {first['steps']} interleaved steps; lines: lowest and highest median of a round",
    ]
    reading = [
        "Steps run one at a time, without V1's run-ahead and bursts",
        "V1: each rank builds its inputs from one message, in shared memory or over TCP",
        "V0 (--ablate driver-broadcast): rank 0 broadcasts a description of the batch, then each tensor, over gloo",
    ]
    return [*wrapped(facts), *wrapped(reading)]


def _size(count: float) -> str:
    return f"{count:,.0f} B" if count < 1000 else f"{count / 1e3:.1f} kB"
