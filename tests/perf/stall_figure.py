"""Figure of `make bench-mm-stall`: gaps between decode steps by engine and load, and the loop's own time."""

import textwrap
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from plots.style import COLORS, MUTED, STYLE, plain, wrapped
from tests.perf.bar_charts import add_texts, bar_figure

LOADS = {
    "none": ("no pictures", "#94a3b8"),
    "beside": ("decoded beside the server", COLORS[6]),
    "processing": ("requests, processing only", COLORS[0]),
    "served": ("requests, served", COLORS[2]),
}
MARKS = (("gap_p50_ms", "|", "median"), ("gap_p99_ms", "o", "P99"), ("gap_max_ms", "x", "longest"))
_ROW_IN, _APART = 0.27, 0.8  # height of a row; space between engines, in rows
_NAMES_IN = 2.2


def stall_figure(records: list[dict[str, Any]]) -> Figure:
    """Left: median, P99 and longest gap. Right: P99 of the loop's own time in percent of a step without pictures."""
    rows = [record for record in records if record["part"] == "stall"]
    places = _places(rows)
    with matplotlib.rc_context(STYLE):
        footer = _caption(rows)
        boxes = (_NAMES_IN, 4.4), (_NAMES_IN + 5.1, 2.3)
        figure, panels, height = bar_figure(places, _ROW_IN, len(footer), boxes)
        _draw_gaps(panels[0], rows, places)
        _draw_loop(panels[1], rows, places)
        _name(panels[0], rows, places)
        handles = [(color, name) for load, (name, color) in LOADS.items() if any(row["load"] == load for row in rows)]
        add_texts(figure, "Text requests while pictures are processed", handles, 4, footer, height)
        return figure


def _places(rows: list[dict[str, Any]]) -> list[float]:
    places: list[float] = []
    for i, row in enumerate(rows):
        step = 1 + _APART * (row["engine"] != rows[i - 1]["engine"]) if i else 0
        places.append((places[-1] if i else 0.0) + step)
    return places


def _draw_gaps(axes: Axes, rows: list[dict[str, Any]], places: list[float]) -> None:
    axes.set_title("Gap between decode steps")
    axes.set_xscale("log")
    for row, place in zip(rows, places, strict=True):
        color = LOADS[row["load"]][1]
        values = [row[key] for key, _, _ in MARKS]
        axes.plot([values[0], values[-1]], [place, place], color=color, linewidth=1.5)
        for value, (_, mark, _) in zip(values, MARKS, strict=True):
            axes.plot([value], [place], mark, color=color, markersize=6, markeredgewidth=1.6)
    ends = [row[key] for row in rows for key in ("gap_p50_ms", "gap_max_ms")]
    axes.set_xlim(min(ends) / 1.3, max(ends) * 1.3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("ms: median |, P99 •, longest ×")


def _draw_loop(axes: Axes, rows: list[dict[str, Any]], places: list[float]) -> None:
    axes.set_title("The loop's own time, P99")
    shares = [100 * row["loop_p99_of_step"] for row in rows]
    for row, place, share in zip(rows, places, shares, strict=True):
        axes.barh(place, share, 0.8, color=LOADS[row["load"]][1])
        axes.annotate(f"{share:.1f} %" if share < 10 else f"{share:.0f} %", (share, place), (5, 0),
                      textcoords="offset points", fontsize=9, va="center")  # fmt: skip
    axes.set_xlim(0, max(shares) * 1.35)
    axes.set_xlabel("% of a step without pictures")


def _name(axes: Axes, rows: list[dict[str, Any]], places: list[float]) -> None:
    how: Any = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "right", "va": "center"}
    groups: dict[str, list[float]] = {}
    for row, place in zip(rows, places, strict=True):
        ratio = f"× {row['gap_p99_ratio']:.2f}" if row["load"] != "none" else ""
        axes.annotate(ratio, (0, place), (-7, 0), fontsize=8.5, color=MUTED, **how)
        groups.setdefault(row["engine"], []).append(place)
    for engine, own in groups.items():
        name = textwrap.fill(engine, 12)
        axes.annotate(name, (0, sum(own) / len(own)), (-52, 0), fontsize=10, weight="bold", **how)


def _caption(rows: list[dict[str, Any]]) -> list[str]:
    first = rows[0]
    facts = [
        f"Model: {first['model']}; {first['streams']} text requests decode, {first['rounds']} runs of each",
        f"Pictures: {first['picture']}, each with bytes of its own",
        f"Hardware: {first['hardware']}",
    ]
    reading = [
        "Gap: between the ends of steps in which all text requests got a token; × is the ratio of P99 to no pictures",
        "Processing only: prompts that are refused after it, because they are too long",
        "The loop's own time: CPU time of the core's loop thread per gap",
    ]
    return [*wrapped(facts), *wrapped(reading)]
