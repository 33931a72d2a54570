"""Ablation figure: the engine with one part switched off at a time, compared with the whole engine at one rate."""

import math
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bench.results import PointRecord
from bench.statistics.student import half_interval
from plots.compare import METRICS, Metric, percent, percent_text, points_at_one_rate
from plots.data import ROUND_PHASES, Results, Run, Series, run_facts
from plots.style import COLORS, INK, MUTED, STYLE, WIDTH_IN, footnote, headline, needs_log_scale, plain, span, wrapped

_LATENCIES = ("itl_p99", "ttft_p99")
_LATENCY_COLUMNS = tuple(m for key in _LATENCIES for m in METRICS if m.key == key)
_RATE = next(m for m in METRICS if m.key == "rate")
_NAMES_IN, _PANEL_IN, _TEXT_IN = 3.3, 1.08, 1.14  # widths of the names, of a panel, of the text beside it
_TITLES = {"rate": "Sustained rate", "served": "Completed rate", "itl_p99": "P99 ITL", "ttft_p99": "P99 TTFT"}
_ROW_IN = 0.42
_FARTHEST = 2.0  # x the highest value: longer intervals are cut off


@dataclass(frozen=True, slots=True)
class Measured:
    """A value and its 95 % interval; `difference` from the whole engine, in percent."""

    value: float | None
    low: float = math.nan
    high: float = math.nan
    sustained: bool = True
    difference: float | None = None
    clear: bool = False  # the difference exceeds chance


@dataclass(frozen=True, slots=True)
class AblationRow:
    """One configuration: the whole engine, the engine without one part, or V0."""

    configuration: str
    note: str
    cells: dict[str, Measured]  # metric key -> value


@dataclass(frozen=True, slots=True)
class Ablation:
    """The rows of one workload, the whole engine first."""

    workload: str
    at: str  # "at 4.2 req/s": the rate of the latencies
    columns: tuple[Metric, ...]  # sustained or completed rate, P99 ITL and P99 TTFT
    rows: list[AblationRow]
    series: list[Series]
    points: list[PointRecord]  # of the latencies

    @property
    def heading(self) -> str:
        return f"{self.workload}: one part switched off at a time, latencies {self.at}"


def ablations(results: Results) -> list[Ablation]:
    """One per workload, for every results folder with configurations that switch parts off (`ablate`)."""
    found = []
    for run in results.runs:
        members = _members(run)
        for workload in results.workloads if members else []:
            series = [results.series[c, workload] for c in members if (c, workload) in results.series]
            if len(series) > 1 and series[0].configuration == members[0]:
                found.append(_ablation(results, workload, series))
    return found


def ablation_figure(results: Results, ablation: Ablation) -> Figure:
    """One row per configuration with rate, P99 ITL and P99 TTFT and their differences from the whole engine."""
    rows = ablation.rows
    with matplotlib.rc_context(STYLE):
        footer = _caption(results, ablation)
        head, foot = 0.85, 0.75 + 0.17 * len(footer)
        body = _ROW_IN * len(rows)
        height = head + body + foot
        figure = Figure(figsize=(WIDTH_IN, height))
        for i, metric in enumerate(ablation.columns):
            left = _NAMES_IN + i * (_PANEL_IN + _TEXT_IN)
            axes = figure.add_axes((left / WIDTH_IN, foot / height, _PANEL_IN / WIDTH_IN, body / height))
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_yticks([])
            _draw_dots(axes, metric, rows)
            if i == 0:
                _name_rows(axes, rows)
        headline(figure, results.heading(ablation.workload), height)
        footnote(figure, footer, height)
        return figure


def _members(run: Run) -> list[str]:
    """The labels of an ablation: the first whole configuration, then those without one part and V0; empty if none of
    them switches a part off."""
    whole, without, removes = "", [], False
    for name, label in run.labels.items():
        serve = run.summary.configurations.get(name, {}).get("serve")
        flags = {str(k).replace("_", "-"): v for k, v in serve.items()} if isinstance(serve, dict) else {}
        removes |= bool(flags.get("ablate"))
        if flags.get("ablate") or flags.get("engine", "v1") != "v1":
            without.append(label)
        else:
            whole = whole or label
    return [whole, *without] if whole and removes else []


def _ablation(results: Results, workload: str, series: list[Series]) -> Ablation:
    chosen, at = points_at_one_rate(series)
    points = {s.configuration: s.rounds(p) for s, p in chosen}
    overload, overloaded = _overload(series, points)
    base: dict[str, Measured] = {}
    rows: list[AblationRow] = []
    for s in series:
        runs = points.get(s.configuration, [])
        cells = _measured(s, runs, overloaded.get(s.configuration, []))
        cells = {key: _compared(cell, base.get(key)) for key, cell in cells.items()}
        if len(runs) > 1 and rows:
            whole = rows[0].configuration
            behind = dict.fromkeys(_LATENCIES, points) | ({"served": overloaded} if overload else {})
            cells |= {k: _paired(cells[k], k, mine[s.configuration], mine.get(whole, [])) for k, mine in behind.items()}
        base = base or cells
        rows.append(AblationRow(s.configuration, str(results.details(s.configuration).get("note") or ""), cells))
    columns = (overload or _RATE, *_LATENCY_COLUMNS)
    return Ablation(workload, at, columns, rows, series, [point for runs in points.values() for point in runs])


def _overload(
    series: list[Series], points: dict[str, list[PointRecord]]
) -> tuple[Metric | None, dict[str, list[PointRecord]]]:
    """The load points at the highest rate, if all were measured at it and none sustains it.

    They replace the sustained rates if not all configurations were searched: the completed rate under overload shows
    the capacity. Returns the column and the load points; None without such a rate.
    """
    overloaded: dict[str, list[PointRecord]] = {}
    for s in series:
        measured = [d.point for d in s.curve if d.point.phase in ROUND_PHASES]
        if measured:
            overloaded[s.configuration] = s.rounds(max(measured, key=lambda p: p.rate))
    rates = {runs[0].rate for runs in overloaded.values()}
    if all(s.searched for s in series) or len(overloaded) < len(series) or len(rates) > 1:
        return None, {}
    if any(2 * sum(bool(p.sustained) for p in runs) >= len(runs) for runs in overloaded.values()):
        return None, {}
    if any(runs == points[name] for name, runs in overloaded.items()):
        return None, {}
    return Metric("served", f"Completed rate at {rates.pop():.3g} req/s", "req/s", True), overloaded


def _measured(series: Series, runs: list[PointRecord], overloaded: list[PointRecord]) -> dict[str, Measured]:
    """The cells of one configuration; of several rounds the median, with the lowest and highest as the interval."""
    answer = series.answer
    cells = {key: Measured(None) for key in ("rate", "served", *_LATENCIES)}
    if answer is not None and answer.rate is not None:
        cells["rate"] = Measured(answer.rate, answer.low, math.nan if answer.high is None else answer.high)
    for key in _LATENCIES if runs else ():
        values = [value for value in (_value(run, key) for run in runs) if math.isfinite(value)]
        ends = [_value(runs[0], f"{key}_low"), _value(runs[0], f"{key}_high")] if len(runs) == 1 else values
        if values:
            sustained = 2 * sum(map(series.sustained, runs)) > len(runs)
            cells[key] = Measured(median(values), min(ends), max(ends), sustained)
    if overloaded:
        served = [_value(run, "served") for run in overloaded]
        cells["served"] = Measured(median(served), min(served), max(served))
    return cells


def _value(point: PointRecord, key: str) -> float:
    return point.achieved_rate if key == "served" else float(getattr(point, f"{key}_ms"))


def _paired(cell: Measured, key: str, runs: list[PointRecord], base: list[PointRecord]) -> Measured:
    """The cell with the median of the differences within each round, since a machine's speed drifts.

    The difference is clear if the 95 % interval of the mean log ratio over the rounds (Student's t) excludes 0.
    """
    theirs = {run.repeat: _value(run, key) for run in base}
    pairs = [(_value(run, key), theirs.get(run.repeat, math.nan)) for run in runs]
    differences = [d for d in (percent(mine, other) for mine, other in pairs if other > 0) if d is not None]
    if not differences:
        return cell
    positive = all(mine > 0 for mine, _ in pairs)
    compared = [math.log1p(d / 100) for d in differences] if positive else differences
    clear = len(compared) > 2 and abs(fmean(compared)) > half_interval(compared)
    return replace(cell, difference=median(differences), clear=clear)


def _compared(cell: Measured, base: Measured | None) -> Measured:
    """The cell with its difference from the base, which is clear if their intervals do not overlap."""
    if base is None:
        return cell
    apart = cell.low > base.high or cell.high < base.low  # False if an end is not known
    difference = percent(cell.value, base.value)
    return Measured(cell.value, cell.low, cell.high, cell.sustained, difference, apart and difference is not None)


def _draw_dots(axes: Axes, metric: Metric, rows: list[AblationRow]) -> None:
    cells = [row.cells[metric.key] for row in rows]
    values = [cell.value for cell in cells if cell.value is not None]
    axes.set_title(_TITLES[metric.key], fontsize=10.5)
    axes.set_xlabel(f"{metric.unit} ({'higher' if metric.higher_is_better else 'lower'} is better)", fontsize=8.5)
    axes.tick_params(axis="x", labelsize=8.5)
    for place, cell in enumerate(cells):
        _write_beside(axes, place, cell)
        if cell.value is None:
            continue
        color = INK if place == 0 else COLORS[0]
        if math.isfinite(cell.low) and not math.isnan(cell.high):
            _draw_interval(axes, place, (cell.low, cell.high), color)
        face = color if cell.sustained else "white"
        axes.plot(cell.value, place, "o", color=color, markerfacecolor=face, markersize=6, zorder=3)
    if cells[0].value is not None:
        axes.axvline(cells[0].value, color=INK, linestyle=(0, (4, 3)), linewidth=1.0, alpha=0.7, zorder=1)
    _scale(axes, values, [cell.high for cell in cells if math.isfinite(cell.high)])


def _draw_interval(axes: Axes, place: int, ends: tuple[float, float], color: str) -> None:
    """The interval as a line, or as an arrow to the edge of the panel if its upper end is not known."""
    low, high = ends
    if math.isfinite(high):
        axes.hlines(place, low, high, color=color, alpha=0.5, linewidth=1.4, zorder=2)
    else:
        edge = axes.get_yaxis_transform()
        axes.annotate(
            "", (1, place), (low, place), xycoords=edge, textcoords="data",
            arrowprops={"arrowstyle": "-|>", "color": color, "alpha": 0.5, "linewidth": 1.4, "shrinkA": 0},
        )  # fmt: skip


def _scale(axes: Axes, values: list[float], highs: list[float]) -> None:
    top = max(values, default=1.0)
    reach = max(top, min(max(highs, default=top), _FARTHEST * top))
    if min(values, default=0) > 0 and needs_log_scale(values):
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 1.6, reach * 1.4)
        axes.xaxis.set_major_locator(LogLocator(numticks=4))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, reach * 1.08)
        axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))


def _write_beside(axes: Axes, place: int, cell: Measured) -> None:
    """The value and its difference, in bold if it exceeds chance."""
    how: Any = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "va": "center", "fontsize": 9}
    axes.annotate(plain(cell.value) if cell.value is not None else "–", (1, place), (6, 0), **how)
    if cell.difference is not None:
        look: Any = {"weight": "bold"} if cell.clear else {"color": MUTED}
        axes.annotate(percent_text(cell.difference), (1, place), (37, 0), **how, **look)


def _name_rows(axes: Axes, rows: list[AblationRow]) -> None:
    how: Any = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "right", "va": "center"}
    for place, row in enumerate(rows):
        axes.annotate(row.configuration, (0, place), (-9, 5.5 if row.note else 0), fontsize=10, weight="bold", **how)
        if row.note:
            axes.annotate(row.note, (0, place), (-9, -6), fontsize=8, color=MUTED, **how)


def _caption(results: Results, ablation: Ablation) -> list[str]:
    names = [row.configuration for row in ablation.rows]
    samples = f"Samples of the latencies: {span([p.requests for p in ablation.points])} requests each"
    rounds = len(ablation.points) // len(ablation.rows)
    reading = [f"P99 latencies {ablation.at}", f"Dashed: {names[0]}, the reference of the differences"]
    if ablation.columns[0] is not _RATE:
        reading.insert(0, f"{ablation.columns[0].label}: no configuration sustains this rate")
    if rounds > 1:
        rate = "; rates: 95 % interval" if _RATE in ablation.columns else ""
        reading += [
            f"{'Latencies: m' if rate else 'M'}edian, lowest and highest value of {rounds} interleaved rounds{rate}",
            f"Differences: median of the differences from {names[0]} within each round",
            "Bold: significant (95 % confidence)",
        ]
    else:
        reading += [
            "Lines: 95 % intervals (arrow: upper end unknown); those of rates end at the lowest rate that failed",
            f"Bold: the interval does not overlap that of {names[0]}",
        ]
    if any(not cell.sustained for row in ablation.rows for cell in row.cells.values()):
        reading.append("Hollow: the rate was not shown to be sustained")
    return [*wrapped(run_facts(results, names, samples)), *wrapped(reading)]
