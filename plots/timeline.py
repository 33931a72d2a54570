"""Timeline figure of one load point: the server's queue, batch and KV cache, and the latencies over time."""

import math
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bench.results import PointRecord, RunFiles
from plots.data import Results, Series, run_facts, verdict_text
from plots.samples import Moments, read_moments
from plots.simulated import SIMULATED
from plots.style import (
    INK,
    MUTED,
    SECONDS_FROM_MS,
    STYLE,
    WIDTH_IN,
    footnote,
    headline,
    needs_log_scale,
    plain,
    wrapped,
)

RUNNING, WAITING, KV, PREEMPTED, TTFT, GAP = "#2563eb", "#ea580c", "#059669", "#dc2626", "#9333ea", "#0891b2"
OUTSIDE = "#f3f4f6"  # background of warm-up and drain
MOST_DOTS = 20_000
MOMENTS = 400  # intervals of the time axis, for thinning
HEIGHTS = (1.15, 0.85, 1.15, 1.15)


def timeline_point(series: Series) -> PointRecord | None:
    """The load point to draw by default: the first rate with preemptions, else the first not sustained, else the
    highest; None if none has its request file."""
    files = RunFiles(series.folder)
    points = sorted(
        (d.point for d in series.curve if files.requests_path(d.point.point_id).exists()), key=lambda p: p.rate
    )
    preempted = [p for p in points if p.preemptions]
    failing = [p for p in points if not series.sustained(p)]
    return next(iter([*preempted, *failing, *reversed(points)]), None)


def timeline_figure(results: Results, series: Series, point: PointRecord) -> Figure | None:
    """The timeline of one load point; None if its request file is missing."""
    moments = read_moments(series.folder, point)
    if moments is None:
        return None
    readings = _readings(series, point)
    with matplotlib.rc_context(STYLE):
        footer = _caption(results, series, point, moments, readings)
        head, foot = 0.72, 0.72 + 0.17 * len(footer)
        height = sum(HEIGHTS) + 1.45 + head + foot
        figure = Figure(figsize=(WIDTH_IN, height))
        rows = figure.subplots(4, 1, sharex=True, gridspec_kw={"height_ratios": HEIGHTS})
        figure.subplots_adjust(
            left=0.078, right=0.985, top=1 - (head + 0.24) / height, bottom=foot / height, hspace=0.5
        )
        end_s = _end(point, moments, readings)
        _draw_requests(rows[0], moments, readings, end_s)
        _draw_cache(rows[1], readings)
        _draw_first_tokens(rows[2], moments)
        gaps_shown = _draw_gaps(rows[3], moments)
        if gaps_shown < len(moments.gap):
            footer[-1] += f"  ·  {gaps_shown:,} of {len(moments.gap):,} gaps shown, always including the slowest"
        _mark_window(list(rows), point, end_s)
        rows[3].set_xlabel("Seconds since the start of the load point")
        title = f"{series.configuration}, {series.workload}: {point.rate:.3g} req/s"
        mark = results.details(series.configuration).get(SIMULATED)
        headline(figure, f"{title}, {SIMULATED} {mark['title']}" if mark else title, height)
        figure.text(0.012, 1 - 0.48 / height, _verdict(point), fontsize=9.5, color=MUTED, va="center")
        footnote(figure, footer, height)
        return figure


def _readings(series: Series, point: PointRecord) -> pd.DataFrame:
    frame = RunFiles(series.folder).read_metrics(point.point_id)
    if frame is None:
        return pd.DataFrame(columns=["at_s", "running", "waiting", "kv_use", "preemptions"], dtype=float)
    # Of the readings before the load point, keep the last one: the state at its start.
    before = frame.index[frame["at_s"] <= 0]
    return frame.loc[before[-1] :] if len(before) else frame


def _end(point: PointRecord, moments: Moments, readings: pd.DataFrame) -> float:
    """The end of the time axis: the end of the last request, or the first later reading of an idle server."""
    last = max(point.warmup_s + point.window_s, float(np.max(moments.open_s, initial=0.0)))
    after = readings[readings["at_s"] >= last]
    idle = after[(after["running"].fillna(0) + after["waiting"].fillna(0)) == 0]
    if len(after):
        last = float(idle["at_s"].iloc[0] if len(idle) else after["at_s"].iloc[-1])
    return last * 1.01


def _draw_requests(axes: Axes, moments: Moments, readings: pd.DataFrame, end_s: float) -> None:
    axes.set_title("Requests")
    axes.step(
        [0.0, *moments.open_s, end_s],
        [0, *moments.open_count, moments.open_count[-1] if len(moments.open_count) else 0],
        where="post",
        color=MUTED,
        linewidth=1.0,
        label="open at the client",
    )
    for column, color, label in (("running", RUNNING, "running"), ("waiting", WAITING, "waiting")):
        if readings[column].notna().any():
            axes.step(
                readings["at_s"], readings[column], where="post", color=color, linewidth=1.7, label=f"{label} (server)"
            )
    axes.set_ylim(0, 1.25 * max(axes.get_ylim()[1], 1.0))  # space for the names of the parts
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _legend(axes)


def _draw_cache(axes: Axes, readings: pd.DataFrame) -> None:
    axes.set_title("KV cache utilization and preemptions")
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0.0, 0.5, 1.0], ["0 %", "50 %", "100 %"])
    if readings["kv_use"].notna().any():
        axes.step(readings["at_s"], readings["kv_use"], where="post", color=KV, linewidth=1.7, label="KV use")
    steps = readings["preemptions"].diff()
    happened = readings[steps > 0]
    if len(happened):
        label = f"preemptions ({steps.sum():.0f} in total)"
        axes.vlines(happened["at_s"], 0, 1.05, color=PREEMPTED, linewidth=1.4, alpha=0.8, label=label)
    if readings["kv_use"].notna().any() or len(happened):
        _legend(axes)
    else:
        text = "the server has no KV cache metrics" if len(readings) else "the server's metrics were not recorded"
        axes.text(0.5, 0.45, text, transform=axes.transAxes, ha="center", color=MUTED)


def _draw_first_tokens(axes: Axes, moments: Moments) -> None:
    _latency_axis(axes, "Time to first token, by intended send time", moments.ttft)
    axes.plot(moments.sent_s, _scaled(moments.ttft), "o", color=TTFT, markersize=3.2, alpha=0.6, markeredgewidth=0)
    for times, marker, label in (
        (moments.failed_s, "x", f"failed ({len(moments.failed_s)})"),
        (moments.silent_s, "^", f"no token by the end ({len(moments.silent_s)})"),
    ):
        if len(times):
            axes.plot(
                times, np.full(len(times), 0.95), marker, color=PREEMPTED, markersize=5, markerfacecolor="none",
                transform=axes.get_xaxis_transform(), clip_on=False, label=label, linestyle="none",
            )  # fmt: skip
    if len(moments.failed_s) or len(moments.silent_s):
        _legend(axes)


def _draw_gaps(axes: Axes, moments: Moments) -> int:
    """Draw the gaps between tokens by their end; returns how many are drawn."""
    _latency_axis(axes, "Inter-token latency, by end of the gap", moments.gap)
    shown = np.arange(len(moments.gap))
    if len(shown) > MOST_DOTS:
        shown = shown[_outline(moments) | (shown % math.ceil(len(shown) / MOST_DOTS) == 0)]
    values = _scaled(moments.gap)[shown]
    # Rasterized also in the SVG: tens of thousands of dots would be slow to render.
    axes.plot(
        moments.gap_end_s[shown], values, "o", color=GAP, markersize=2.2, alpha=0.35, markeredgewidth=0, rasterized=True
    )
    return len(shown)


def _outline(moments: Moments) -> np.ndarray:
    """The gaps that are the slowest of their interval of the time axis; these are always drawn."""
    places = np.minimum(moments.gap_end_s / max(moments.gap_end_s.max(), 1e-9) * MOMENTS, MOMENTS - 1).astype(int)
    slowest = np.zeros(MOMENTS)
    np.maximum.at(slowest, places, moments.gap)
    return np.asarray(moments.gap >= slowest[places])


def _scaled(values: np.ndarray) -> np.ndarray:
    return values / 1e3 if np.max(values, initial=0.0) >= SECONDS_FROM_MS else values


def _latency_axis(axes: Axes, title: str, values: np.ndarray) -> None:
    unit = "s" if np.max(values, initial=0.0) >= SECONDS_FROM_MS else "ms"
    axes.set_title(f"{title} ({unit})")
    scaled = _scaled(values)
    positive = scaled[scaled > 0]
    if not len(positive):
        axes.set_yticks([])
        axes.text(0.5, 0.45, "no tokens", transform=axes.transAxes, ha="center", color=MUTED)
        return
    low, high = float(np.quantile(positive, 0.005)), float(positive.max())
    if needs_log_scale([low, high]):
        axes.set_yscale("log")
        axes.set_ylim(low / 1.5, high * 2)
        ratio = high / low
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if ratio < 100 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, high * 1.15)
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))


def _mark_window(rows: list[Axes], point: PointRecord, end_s: float) -> None:
    """Draw a gray background outside the window, and the names of the parts where they fit."""
    start, stop = point.warmup_s, point.warmup_s + point.window_s
    parts = (("warm-up", 0.0, start), ("window", start, stop), ("drain", stop, end_s))
    for axes in rows:
        axes.set_xlim(0, end_s)
        for name, low, high in parts:
            if name != "window" and high > low:
                axes.axvspan(low, high, color=OUTSIDE, zorder=0, linewidth=0)
        axes.xaxis.set_major_locator(MaxNLocator(10))
        axes.xaxis.set_major_formatter(FuncFormatter(plain))
    for name, low, high in parts:
        if (high - low) / end_s > 0.012 * len(name):
            place = ((low + high) / 2, 0.97)
            how: Any = {"xycoords": rows[0].get_xaxis_transform(), "ha": "center", "va": "top"}
            rows[0].annotate(name, place, fontsize=8.5, color=MUTED, zorder=5, **how)


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, fontsize=8.5, handlelength=1.6, borderaxespad=0.1,
        columnspacing=1.4, labelcolor=INK,
    )  # fmt: skip


def _verdict(point: PointRecord) -> str:
    state = verdict_text(point)
    state = f"disturbed, {state}" if point.disturbed else state
    text = f"{state}: {point.reason.removeprefix('undecided: ')}" if point.reason else state
    return text if len(text) <= 140 else text[:139] + "…"


def _caption(
    results: Results, series: Series, point: PointRecord, moments: Moments, readings: pd.DataFrame
) -> list[str]:
    samples = f"{point.requests:,} requests in the window, {len(moments.gap):,} inter-token gaps in total"
    every = float(np.median(np.diff(readings["at_s"]))) if len(readings) > 2 else None
    reading = ["Gray background: outside the window, not counted"]
    if point.disturbed:
        reading.append(f"Disturbed: {point.disturbance}")
    if every is not None:
        reading.append(f"The server's metrics were read every {every:.2g} s; shorter changes may be missing")
    return [*wrapped(run_facts(results, [series.configuration], samples, point.seed)), *wrapped(reading)]
