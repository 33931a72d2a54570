"""A figure of the dashboard: its panels in their places, with what Prometheus answers to their queries."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from plots.style import COLORS, MUTED, STYLE, WIDTH_IN, footnote, headline, plain, wrapped
from tests.perf.prometheus import Line

COLUMNS = 24  # of Grafana's grid
UNIT_IN = 0.17  # height of a unit of Grafana's grid
HEAD_IN, FOOT_IN = 0.5, 1.25
LONG_TITLE = 40  # characters
LEFT_IN, TOP_IN, BOTTOM_IN, APART_IN = 0.52, 0.24, 0.42, 0.12  # within the place of a panel


def dashboard_figure(
    panels: Sequence[dict[str, Any]], lines: dict[int, list[Line]], span: tuple[float, float], facts: Sequence[str]
) -> Figure:
    """Draw the dashboard.

    Args:
        panels: of the dashboard, headings included.
        lines: of each panel, by its id.
        span: first and last time, in seconds since 1970.
        facts: of the caption.
    """
    body = UNIT_IN * max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    height = HEAD_IN + body + FOOT_IN
    with matplotlib.rc_context({**STYLE, "font.size": 7, "axes.titlesize": 8.5, "axes.titlepad": 4}):
        figure = Figure(figsize=(WIDTH_IN, height))
        headline(figure, "Dashboard", height)
        footnote(figure, wrapped(facts), height)
        for panel in panels:
            place = panel["gridPos"]
            left = 0.1 + place["x"] / COLUMNS * (WIDTH_IN - 0.2)
            top = height - HEAD_IN - UNIT_IN * place["y"]
            if panel["type"] == "row":
                figure.text(left / WIDTH_IN, (top - UNIT_IN / 2) / height, panel["title"], weight="bold", size=10)
                continue
            width, tall = place["w"] / COLUMNS * (WIDTH_IN - 0.2), UNIT_IN * place["h"]
            inner = (left + LEFT_IN, top - tall + BOTTOM_IN, width - LEFT_IN - APART_IN, tall - TOP_IN - BOTTOM_IN)
            box = (inner[0] / WIDTH_IN, inner[1] / height, inner[2] / WIDTH_IN, inner[3] / height)
            _draw(figure.add_axes(box), panel, lines[panel["id"]], span)
        return figure


def _draw(axes: Axes, panel: dict[str, Any], lines: Sequence[Line], span: tuple[float, float]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    scale, write = _unit(defaults["unit"], [value for line in lines for value in line.values])
    axes.set_title(panel["title"], size=8.5 if len(panel["title"]) < LONG_TITLE else 7.5)
    # Lines of several servers may have the same name.
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(dict.fromkeys(one.name for one in lines))}
    for line in lines:
        minutes = [(at - span[0]) / 60 for at in line.times]
        axes.plot(minutes, [value * scale for value in line.values], color=colors[line.name], lw=1.1)
    axes.set_xlim(0, (span[1] - span[0]) / 60)
    values = [value * scale for line in lines for value in line.values if math.isfinite(value)]
    top = defaults["max"] * scale if "max" in defaults else max(values, default=0) * 1.12 or 1
    axes.set_ylim(-0.03 * top, top)  # a line at 0 is seen
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} min" if value else ""))
    axes.tick_params(length=0, pad=3)
    if not lines:
        axes.text(0.5, 0.5, "No data", transform=axes.transAxes, ha="center", va="center", color=MUTED)
        return
    marks = [axes.plot([], [], color=color, lw=3)[0] for color in colors.values()]
    axes.legend(
        marks, list(colors), loc="upper left", bbox_to_anchor=(-0.02, -0.19), borderaxespad=0,
        ncols=2 if len(colors) in (4, 5) else 3, handlelength=1, columnspacing=1.2, labelspacing=0.25, fontsize=6.5,
    )  # fmt: skip


def _unit(unit: str, values: Sequence[float]) -> tuple[float, Any]:
    """The factor of what is drawn, and how values are written."""
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    if unit == "percentunit":
        return 100, lambda value: f"{plain(value)} %"
    if unit == "bytes":
        return 2**-20, lambda value: f"{plain(value)} MiB"
    if unit == "s":
        return (1000, lambda value: f"{plain(value)} ms") if largest < 1 else (1, lambda value: f"{plain(value)} s")
    return 1, plain
