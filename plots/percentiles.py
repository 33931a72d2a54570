"""Percentile figure: the distributions of TTFT and ITL at one rate, one line per configuration."""

import math
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator

from bench.results import PointRecord
from plots.compare import points_at_one_rate
from plots.data import Results, run_facts, verdict_text
from plots.samples import Samples, read_samples
from plots.style import MUTED, SECONDS_FROM_MS, STYLE, framed_figure, needs_log_scale, palette, plain, span, wrapped

TITLES = {"itl": "Inter-token latency", "ttft": "Time to first token"}
SHARES = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
BEYOND = 10  # where fewer samples are slower, the curve consists of single events and is drawn dotted
DETAIL = 1500  # points per line


@dataclass(frozen=True, slots=True)
class _Line:
    """One configuration's load point and its samples."""

    configuration: str
    point: PointRecord
    samples: Samples


def percentile_figure(results: Results, workload: str) -> Figure | None:
    """Both distributions of one workload; None if no load point has its request file."""
    chosen, at = points_at_one_rate(results.of_workload(workload))
    lines = []
    for series, point in chosen:
        samples = read_samples(series.folder, point)
        if samples is not None and len(samples.ttft):
            lines.append(_Line(series.configuration, point, samples))
    if not lines:
        return None
    looks = palette(results.configurations)
    with matplotlib.rc_context(STYLE):
        footer = _caption(results, lines)
        head, foot = 0.5 + 0.24 * len(lines), 0.75 + 0.17 * len(footer)
        height = 3.5 + head + foot
        handles = [_handle(line, looks[line.configuration][0], _at(line, lines)) for line in lines]
        figure = framed_figure(f"{results.heading(workload)}, {at}", handles, footer, height)
        both = figure.subplots(1, 2)
        top = 1 - (head + 0.24) / height
        figure.subplots_adjust(left=0.088, right=0.972, top=top, bottom=foot / height, wspace=0.24)
        for axes, latency in zip(both, ("itl", "ttft"), strict=True):
            axes.set_title(TITLES[latency])
            _draw_panel(axes, [(looks[line.configuration][0], getattr(line.samples, latency)) for line in lines])
        return figure


def curve(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted samples as (latency, share of faster samples), thinned evenly on the axis of nines."""
    finite = samples[np.isfinite(samples)]
    n = len(samples)
    wanted = np.arange(len(finite))
    if n > DETAIL:
        nines = np.linspace(0, math.log10(n), DETAIL)
        wanted = np.unique(np.minimum(np.round(n * (1 - 10.0**-nines)).astype(int), len(finite) - 1))
    return finite[wanted], wanted / n


def stretch(share: np.ndarray) -> np.ndarray:
    """The number of nines of a share: 0 → 0, 0.9 → 1, 0.99 → 2."""
    return -np.log10(np.maximum(1 - np.asarray(share, dtype=float), 1e-12))


def _draw_panel(axes: Axes, lines: list[tuple[str, np.ndarray]]) -> None:
    drawn = [(color, samples, *curve(samples)) for color, samples in lines if np.isfinite(samples).any()]
    axes.set_ylabel("% of samples below")
    if not drawn:
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center", color=MUTED)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    highest = max(float(values[-1]) for _, _, values, _ in drawn)
    unit, scale = ("s", 1e-3) if highest >= SECONDS_FROM_MS else ("ms", 1.0)
    for color, samples, values, shares in drawn:
        known = shares <= 1 - BEYOND / len(samples)
        last = int(known.sum())
        axes.plot(values[:last] * scale, stretch(shares[:last]), color=color, linewidth=1.8, zorder=3)
        tail = slice(max(last - 1, 0), None)
        axes.plot(values[tail] * scale, stretch(shares[tail]), color=color, linewidth=1.5, linestyle=":", zorder=3)
    _share_axis(axes, max(len(samples) for _, samples, _, _ in drawn))
    # From the 1st percentile to the maximum: a single early token must not determine the axis.
    starts = [float(values[np.searchsorted(shares, 0.01)]) for _, _, values, shares in drawn if len(values) > 1]
    _latency_axis(axes, min(starts, default=highest) * scale, highest * scale)
    axes.set_xlabel(f"{unit} (further left is better)")


def _share_axis(axes: Axes, samples: int) -> None:
    top = max(2.0, math.log10(max(samples, 2)))
    shares = [share for share in SHARES if float(stretch(np.array(share))) <= top + 0.01]
    axes.set_ylim(0, top * 1.04)
    axes.yaxis.set_major_locator(FixedLocator([float(stretch(np.array(share))) for share in shares]))
    axes.yaxis.set_major_formatter(FixedFormatter([f"{100 * share:.6g}" for share in shares]))
    for share in (0.5, 0.99):
        axes.axhline(float(stretch(np.array(share))), color=MUTED, linewidth=0.9, linestyle=(0, (2, 3)), zorder=1)


def _latency_axis(axes: Axes, low: float, high: float) -> None:
    if low > 0 and needs_log_scale([low, high]):
        axes.set_xscale("log")
        axes.set_xlim(low / 1.2, high * 1.25)
        ratio = high / low
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 300 else (1, 3) if ratio < 3000 else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, high * 1.06)
    axes.xaxis.set_major_formatter(FuncFormatter(plain))


def _caption(results: Results, lines: list[_Line]) -> list[str]:
    requests, gaps = ([len(getattr(line.samples, kind)) for line in lines] for kind in ("ttft", "itl"))
    samples = f"Samples: {span(requests)} requests, {span(gaps)} inter-token gaps"
    reading = ["Inter-token gaps of all requests are pooled", f"Dotted: fewer than {BEYOND} samples are slower"]
    if any(not np.isfinite(line.samples.ttft).all() for line in lines):
        reading.append("Line that ends early: the remaining requests had no first token when the load point ended")
    return [*wrapped(run_facts(results, [line.configuration for line in lines], samples)), *wrapped(reading)]


def _at(line: _Line, lines: list[_Line]) -> str:
    """The rate and verdict in the legend: the rate only if lines have different ones."""
    parts = [f"{line.point.rate:.3g} req/s"] if len({other.point.rate for other in lines}) > 1 else []
    parts += [] if line.point.sustained else [verdict_text(line.point)]
    parts += ["disturbed"] if line.point.disturbed else []
    return ", ".join(parts) + ": " if parts else ""


def _handle(line: _Line, color: str, at: str) -> Line2D:
    point = line.point
    label = (
        f"{line.configuration}  ·  {at}ITL P50 {plain(point.itl_p50_ms)}, P99 {plain(point.itl_p99_ms)} ms, "
        f"TTFT P50 {plain(point.ttft_p50_ms)}, P99 {plain(point.ttft_p99_ms)} ms"
    )
    return Line2D([], [], color=color, linewidth=1.8, label=label)
