"""Latency figure: P99 ITL and P99 TTFT against the request rate, one line per configuration."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from bench.results import DISTURBED_SHARE, PointRecord
from plots.data import P99_SAMPLES, Drawn, Results, Series, run_facts
from plots.style import (
    MUTED,
    SECONDS_FROM_MS,
    STYLE,
    framed_figure,
    linear_y,
    log_y,
    needs_log_scale,
    palette,
    plain,
    span,
    wrapped,
)

_ARROW = 0.2  # length of the arrow of an unknown upper end, as a multiple of the value
UNDECIDED = "#c9ccd1"  # fill of a marker


@dataclass(frozen=True)
class Panel:
    """One latency: its title, and its value, interval and number of observations of a load point."""

    title: str
    p99: Callable[[PointRecord], float]
    interval: Callable[[PointRecord], tuple[float, float]]
    samples: Callable[[Drawn], int]


PANELS = (
    Panel(
        "P99 inter-token latency",
        lambda p: p.itl_p99_ms,
        lambda p: (p.itl_p99_low_ms, p.itl_p99_high_ms),
        lambda d: d.steps,
    ),
    Panel(
        "P99 time to first token",
        lambda p: p.ttft_p99_ms,
        lambda p: (p.ttft_p99_low_ms, p.ttft_p99_high_ms),
        lambda d: d.requests,
    ),
)


def latency_figure(results: Results, workload: str) -> Figure:
    """The two latencies of every configuration on one workload; the caption describes the run."""
    series = results.of_workload(workload)
    looks = palette(results.configurations)
    with matplotlib.rc_context(STYLE):
        footer = caption(results, workload)
        handles = [_handle(s, looks[s.configuration]) for s in series]
        head, foot = 0.5 + 0.24 * len(handles), 0.75 + 0.17 * len(footer)
        height = 3.5 + head + foot
        figure = framed_figure(results.heading(workload), handles, footer, height)
        both = figure.subplots(1, 2)
        figure.subplots_adjust(
            left=0.09, right=0.985, top=1 - (head + 0.24) / height, bottom=foot / height, wspace=0.235
        )
        for axes, panel in zip(both, PANELS, strict=True):
            _draw_panel(axes, panel, series, looks)
        return figure


def caption(results: Results, workload: str) -> list[str]:
    """The lines of the caption: what was measured, and how to read the figure."""
    series = results.of_workload(workload)
    drawn = [d for s in series for d in s.curve]
    gaps = f"{span([d.gaps for d in drawn])} inter-token gaps in {span([d.steps for d in drawn])} engine steps"
    samples = f"Samples per load point: {span([d.requests for d in drawn])} requests, {gaps}"
    reading = ["Dashed: highest sustained rate", "Hollow: not sustained"]
    if any(d.point.undecided for d in drawn):
        reading.append("Gray fill: undecided (window too short)")
    if any(panel.samples(d) < P99_SAMPLES for panel in PANELS for d in drawn):
        reading.append(f"Whiskers: 95 % interval of a P99 of fewer than {P99_SAMPLES:,} steps or requests")
        if any(panel.interval(d.point)[1] == math.inf for panel in PANELS for d in drawn):
            reading.append("Arrow: upper end unknown (window too short)")
    if any(d.point.cut_short for d in drawn):
        reading.append("Requests open at the end of a load point count with their waiting time so far")
    if any(d.point.provisional for d in drawn):
        reading.append("Provisional: windows too short for the precision")
    if any(d.point.disturbed for d in drawn):
        reading.append(f"Ring: disturbed (other processes used more than {100 * DISTURBED_SHARE:.0f} % of the cores)")
    invalid = sum(s.invalid for s in series)
    if invalid:
        reading.append(f"{invalid} invalid load point{'s' if invalid > 1 else ''} omitted")
    return [*wrapped(run_facts(results, [s.configuration for s in series], samples)), *wrapped(reading)]


def series_text(series: Series) -> str:
    """What was found for a configuration, as in a legend."""
    if series.offline_point is not None:
        return f"{series.offline_point.achieved_rate:.3g} req/s offline"
    return "not searched" if series.unsearched else series.answer.text() if series.answer else "no answer"


def _draw_panel(axes: Axes, panel: Panel, series: list[Series], looks: dict[str, tuple[str, str]]) -> None:
    drawn = [d for s in series for d in s.curve]
    values = [panel.p99(d.point) for d in drawn if math.isfinite(panel.p99(d.point))]
    unit, scale = ("s", 1e-3) if values and max(values) >= SECONDS_FROM_MS else ("ms", 1.0)
    scaled = [value * scale for value in values]
    for s in series:
        _draw_line(axes, panel, s, looks[s.configuration], scale)
    axes.set_title(panel.title)
    axes.set_ylabel(f"{unit} (lower is better)")
    axes.set_xlabel("Request rate (req/s)")
    highest = max(
        [d.point.rate for d in drawn] + [s.answer.rate for s in series if s.answer and s.answer.rate] or [1.0]
    )
    axes.set_xlim(0, highest * 1.05)
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    if not scaled:
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set_yticks([])
    elif needs_log_scale(scaled):
        log_y(axes, scaled)
    else:
        linear_y(axes, scaled)


def _draw_line(axes: Axes, panel: Panel, series: Series, look: tuple[str, str], scale: float) -> None:
    color, marker = look
    shown = [d for d in series.curve if math.isfinite(panel.p99(d.point))]
    rates = [d.point.rate for d in shown]
    values = [panel.p99(d.point) * scale for d in shown]
    axes.plot(rates, values, color=color, linewidth=1.8, zorder=3)
    for d, value in zip(shown, values, strict=True):
        low, high = panel.interval(d.point)
        if panel.samples(d) < P99_SAMPLES and math.isfinite(low):
            _draw_interval(axes, (d.point.rate, value), (low * scale, high * scale), color)
        face = color if series.sustained(d.point) else UNDECIDED if d.point.undecided else "white"
        dot: Any = {"color": color, "markerfacecolor": face, "markersize": 6, "markeredgewidth": 1.6, "zorder": 4}
        axes.plot(d.point.rate, value, marker, **dot)
        if d.point.disturbed:
            ring = {"color": MUTED, "markerfacecolor": "none", "markersize": 12, "markeredgewidth": 1.2, "zorder": 5}
            axes.plot(d.point.rate, value, "o", **dot | ring)
    if series.answer and series.answer.rate:
        axes.axvline(series.answer.rate, color=color, linestyle=(0, (4, 3)), linewidth=1.2, alpha=0.85, zorder=1)


def _draw_interval(axes: Axes, at: tuple[float, float], ends: tuple[float, float], color: str) -> None:
    """The interval around a value; an arrow if its upper end is not known."""
    (rate, value), (low, high) = at, ends
    look: Any = {"fmt": "none", "ecolor": color, "alpha": 0.55, "elinewidth": 1.1, "capsize": 2.5, "zorder": 2}
    below = max(0.0, value - low)
    if math.isfinite(high):
        axes.errorbar(rate, value, [[below], [max(0.0, high - value)]], **look)
        return
    axes.errorbar(rate, value, [[below], [0.0]], **look)
    axes.errorbar(rate, value, [[0.0], [_ARROW * value]], lolims=True, **look)


def _handle(series: Series, look: tuple[str, str]) -> Line2D:
    color, marker = look
    label = f"{series.configuration}  ·  {series_text(series)}"
    return Line2D([], [], color=color, marker=marker, markersize=6, linewidth=1.8, label=label)
