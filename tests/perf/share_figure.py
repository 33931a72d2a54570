"""Figure of `make bench-share`: the share of a step's time outside the device, by model size and engine."""

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from plots.style import COLORS, STYLE, plain, wrapped
from tests.perf.bar_charts import add_texts, bar_figure

DEVICE, OUTSIDE, CORE, FRONT_END = "#cbd5e1", COLORS[1], COLORS[0], COLORS[3]
TIME_PARTS = (("device_ms", "device busy", DEVICE), ("outside_ms", "outside the device", OUTSIDE))
CPU_PARTS = (("core_ms", "core (CPU time)", CORE), ("frontend_ms", "front end (CPU time)", FRONT_END))
_BAR_IN, _APART = 0.3, 0.6  # height of a bar; space between models, in bars
_NAMES_IN = 1.55


def share_figure(rows: list[dict[str, Any]]) -> Figure:
    """Left: wall time of a step. Right: concurrent CPU time. Both in percent of the step."""
    places = _places(rows)
    with matplotlib.rc_context(STYLE):
        footer = _caption(rows)
        boxes = (_NAMES_IN, 4.5), (_NAMES_IN + 5.25, 2.5)
        figure, panels, height = bar_figure(places, _BAR_IN, len(footer), boxes)
        for axes in panels:
            axes.set_xlabel("% of the step")
        _draw_time(panels[0], rows, places)
        _draw_cpu(panels[1], rows, places)
        _name(panels[0], rows, places)
        handles = [(color, name) for _, name, color in (*TIME_PARTS, *CPU_PARTS)]
        add_texts(figure, "Share of a step outside the device", handles, 4, footer, height)
        return figure


def _places(rows: list[dict[str, Any]]) -> list[float]:
    """Positions of the bars from the top, grouped by model."""
    places: list[float] = []
    for i, row in enumerate(rows):
        step = 1 + _APART * (row["layers"] != rows[i - 1]["layers"]) if i else 0
        places.append((places[-1] if i else 0.0) + step)
    return places


def _draw_time(axes: Axes, rows: list[dict[str, Any]], places: list[float]) -> None:
    axes.set_title("Time of a step")
    axes.set_xlim(0, 100)
    for row, place in zip(rows, places, strict=True):
        device = 100 * row["device_ms"] / row["step_ms"]
        axes.barh(place, device, 0.86, color=DEVICE)
        axes.barh(place, 100 - device, 0.86, left=device, color=OUTSIDE)
        text = f"{plain(row['step_ms'])} ms, {_percent(100 - device)} outside"
        axes.annotate(text, (0, place), (6, 0), textcoords="offset points", fontsize=9, va="center")


def _draw_cpu(axes: Axes, rows: list[dict[str, Any]], places: list[float]) -> None:
    axes.set_title("Concurrent CPU time")
    sums = []
    for row, place in zip(rows, places, strict=True):
        shares = [100 * row[key] / row["step_ms"] for key, _, _ in CPU_PARTS]
        axes.barh(place, shares[0], 0.86, color=CORE)
        axes.barh(place, shares[1], 0.86, left=shares[0], color=FRONT_END)
        sums.append(sum(shares))
        text = " + ".join(f"{plain(row[key])}" for key, _, _ in CPU_PARTS) + " ms"
        axes.annotate(text, (sums[-1], place), (5, 0), textcoords="offset points", fontsize=9, va="center")
    axes.set_xlim(0, max(sums) * 1.75)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))


def _name(axes: Axes, rows: list[dict[str, Any]], places: list[float]) -> None:
    how: Any = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "right", "va": "center"}
    groups: dict[int, list[float]] = {}
    for row, place in zip(rows, places, strict=True):
        axes.annotate(row["engine"], (0, place), (-7, 0), fontsize=10, **how)
        groups.setdefault(row["layers"], []).append(place)
    for layers, own in groups.items():
        middle = sum(own) / len(own)
        axes.annotate(f"{layers} layers", (0, middle), (-32, 0), fontsize=10, weight="bold", **how)


def _caption(rows: list[dict[str, Any]]) -> list[str]:
    first = rows[0]
    facts = [
        f"Model: {first['model']} with this number of layers (random weights)",
        f"Hardware: {first['hardware']}",
        f"Step: one token for each of {first['streams']} requests over HTTP, all decoding",
        f"Medians of {first['rounds']} runs of at least {round(min(row['steps'] for row in rows))} steps",
    ]
    reading = [
        "Outside the device: the time of a step in which the device, on a core of its own, was idle",
        "Device busy: measured in its thread, including waits for Python's global interpreter lock",
        "CPU times may overlap with the device's; only the time that the device waits for them is lost",
    ]
    return [*wrapped(facts), *wrapped(reading)]


def _percent(value: float) -> str:
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.1f} %"
