"""What each part of the engine is worth: one taken away at a time, at one request rate, against the whole."""

import math
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bench.results import PointRow, half_interval
from plots.compare import METRICS, Metric, percent, percent_words, points_at_one_rate
from plots.data import ROUND_PHASES, Results, Run, Series, run_facts
from plots.style import COLOURS, INK, MUTED, STYLE, WIDTH_IN, footnote, headline, plain, span, wants_log, wrapped

_LATENCIES = ("itl_p99", "ttft_p99")
_LATENCY_COLUMNS = tuple(m for key in _LATENCIES for m in METRICS if m.key == key)
_RATE = next(m for m in METRICS if m.key == "rate")
_NAMES_IN, _PANEL_IN, _WORDS_IN = 3.3, 1.08, 1.14  # widths of a row's name, of a panel's dots, of the words beside them
_TITLES = {"rate": "Sustained rate", "served": "Served of more", "itl_p99": "P99 ITL", "ttft_p99": "P99 TTFT"}
_ROW_IN = 0.42
_FARTHEST = 2.0  # x the highest value: an interval that reaches further leaves the panel


@dataclass(frozen=True, slots=True)
class Measured:
    """A value and its 95 % interval; `difference` is from the whole engine's, in percent."""

    value: float | None
    low: float = math.nan
    high: float = math.nan
    sustained: bool = True
    difference: float | None = None
    clear: bool = False  # the two intervals lie apart


@dataclass(frozen=True, slots=True)
class AblationRow:
    """One configuration: the whole engine, one without a part, or one without any."""

    configuration: str
    note: str
    cells: dict[str, Measured]  # metric key -> value


@dataclass(frozen=True, slots=True)
class Ablation:
    """The rows of one workload, the whole engine first."""

    workload: str
    at: str  # in words: the rate of the latencies
    columns: tuple[Metric, ...]  # what it can take, P99 ITL and P99 TTFT
    rows: list[AblationRow]
    series: list[Series]
    points: list[PointRow]  # behind the latencies

    @property
    def heading(self) -> str:
        return f"{self.workload}: one part taken away at a time, latencies {self.at}"


def ablations(results: Results) -> list[Ablation]:
    """One a workload for every results folder whose configurations take parts away (`ablate`)."""
    found = []
    for run in results.runs:
        members = _members(run)
        for workload in results.workloads if members else []:
            series = [results.series[c, workload] for c in members if (c, workload) in results.series]
            if len(series) > 1 and series[0].configuration == members[0]:
                found.append(_ablation(results, workload, series))
    return found


def ablation_figure(results: Results, ablation: Ablation) -> Figure:
    """A row a configuration; what it can take, P99 ITL and P99 TTFT, each with its difference from the whole."""
    rows = ablation.rows
    with matplotlib.rc_context(STYLE):
        footer = _caption(results, ablation)
        head, foot = 0.85, 0.75 + 0.17 * len(footer)
        body = _ROW_IN * len(rows)
        height = head + body + foot
        figure = Figure(figsize=(WIDTH_IN, height))
        for i, metric in enumerate(ablation.columns):
            left = _NAMES_IN + i * (_PANEL_IN + _WORDS_IN)
            axes = figure.add_axes((left / WIDTH_IN, foot / height, _PANEL_IN / WIDTH_IN, body / height))
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_yticks([])
            _draw_dots(axes, metric, rows)
            if i == 0:
                _name_rows(axes, rows)
        title = results.title if ablation.workload in results.title else f"{results.title}: {ablation.workload}"
        headline(figure, title, height)
        footnote(figure, footer, height)
        return figure


def _members(run: Run) -> list[str]:
    """The labels that belong together: the first configuration that is whole, then those without a part or all of them;
    empty where none takes a part away."""
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
    overload, flooded = _overload(series, points)
    base: dict[str, Measured] = {}
    rows: list[AblationRow] = []
    for s in series:
        runs = points.get(s.configuration, [])
        cells = _measured(s, runs, flooded.get(s.configuration, []))
        cells = {key: _against(cell, base.get(key)) for key, cell in cells.items()}
        if len(runs) > 1 and rows:
            whole = rows[0].configuration
            behind = dict.fromkeys(_LATENCIES, points) | ({"served": flooded} if overload else {})
            cells |= {k: _paired(cells[k], k, mine[s.configuration], mine.get(whole, [])) for k, mine in behind.items()}
        base = base or cells
        rows.append(AblationRow(s.configuration, str(results.details(s.configuration).get("note") or ""), cells))
    columns = (overload or _RATE, *_LATENCY_COLUMNS)
    return Ablation(workload, at, columns, rows, series, [point for runs in points.values() for point in runs])


def _overload(
    series: list[Series], points: dict[str, list[PointRow]]
) -> tuple[Metric | None, dict[str, list[PointRow]]]:
    """Where not all were searched: the highest rate, measured on all, which none of them sustains.

    What they serve of it is what they can take. Returns its column, None where there is no such rate, and its points.
    """
    flooded: dict[str, list[PointRow]] = {}
    for s in series:
        measured = [d.point for d in s.curve if d.point.phase in ROUND_PHASES]
        if measured:
            flooded[s.configuration] = s.rounds(max(measured, key=lambda p: p.rate))
    rates = {runs[0].rate for runs in flooded.values()}
    if all(s.searched for s in series) or len(flooded) < len(series) or len(rates) > 1:
        return None, {}
    if any(2 * sum(bool(p.sustained) for p in runs) >= len(runs) for runs in flooded.values()):
        return None, {}
    if any(runs == points[name] for name, runs in flooded.items()):
        return None, {}
    return Metric("served", f"Served of {rates.pop():.3g} req/s", "req/s", True), flooded


def _measured(series: Series, runs: list[PointRow], flooded: list[PointRow]) -> dict[str, Measured]:
    """Of several rounds the median, and the lowest and the highest in the place of an interval."""
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
    if flooded:
        served = [_value(run, "served") for run in flooded]
        cells["served"] = Measured(median(served), min(served), max(served))
    return cells


def _value(point: PointRow, key: str) -> float:
    return point.achieved_rate if key == "served" else float(getattr(point, f"{key}_ms"))


def _paired(cell: Measured, key: str, runs: list[PointRow], base: list[PointRow]) -> Measured:
    """Compared round by round, since a machine's speed drifts: the median difference.

    It is clear where the 95 % interval of the rounds' mean ratio (of logarithms, which chance bends to neither side;
    Student's t) doesn't hold one.
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


def _against(cell: Measured, base: Measured | None) -> Measured:
    if base is None:
        return cell
    apart = cell.low > base.high or cell.high < base.low  # False where an end is not known
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
        colour = INK if place == 0 else COLOURS[0]
        if math.isfinite(cell.low) and not math.isnan(cell.high):
            _draw_interval(axes, place, (cell.low, cell.high), colour)
        face = colour if cell.sustained else "white"
        axes.plot(cell.value, place, "o", color=colour, markerfacecolor=face, markersize=6, zorder=3)
    if cells[0].value is not None:
        axes.axvline(cells[0].value, color=INK, linestyle=(0, (4, 3)), linewidth=1.0, alpha=0.7, zorder=1)
    _scale(axes, values, [cell.high for cell in cells if math.isfinite(cell.high)])


def _draw_interval(axes: Axes, place: int, ends: tuple[float, float], colour: str) -> None:
    """The interval as a line; an arrow to the edge of the panel where its upper end is not known."""
    low, high = ends
    if math.isfinite(high):
        axes.hlines(place, low, high, color=colour, alpha=0.5, linewidth=1.4, zorder=2)
    else:
        edge = axes.get_yaxis_transform()
        axes.annotate(
            "", (1, place), (low, place), xycoords=edge, textcoords="data",
            arrowprops={"arrowstyle": "-|>", "color": colour, "alpha": 0.5, "linewidth": 1.4, "shrinkA": 0},
        )  # fmt: skip


def _scale(axes: Axes, values: list[float], highs: list[float]) -> None:
    top = max(values, default=1.0)
    reach = max(top, min(max(highs, default=top), _FARTHEST * top))
    if min(values, default=0) > 0 and wants_log(values):
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 1.6, reach * 1.4)
        axes.xaxis.set_major_locator(LogLocator(numticks=4))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, reach * 1.08)
        axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))


def _write_beside(axes: Axes, place: int, cell: Measured) -> None:
    """The value, and its difference in bold where it is more than chance."""
    how: Any = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "va": "center", "fontsize": 9}
    axes.annotate(plain(cell.value) if cell.value is not None else "–", (1, place), (6, 0), **how)
    if cell.difference is not None:
        look: Any = {"weight": "bold"} if cell.clear else {"color": MUTED}
        axes.annotate(percent_words(cell.difference), (1, place), (37, 0), **how, **look)


def _name_rows(axes: Axes, rows: list[AblationRow]) -> None:
    how: Any = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "right", "va": "center"}
    for place, row in enumerate(rows):
        axes.annotate(row.configuration, (0, place), (-9, 5.5 if row.note else 0), fontsize=10, weight="bold", **how)
        if row.note:
            axes.annotate(row.note, (0, place), (-9, -6), fontsize=8, color=MUTED, **how)


def _caption(results: Results, ablation: Ablation) -> list[str]:
    names = [row.configuration for row in ablation.rows]
    samples = f"Samples behind the latencies: {span([p.requests for p in ablation.points])} requests each"
    rounds = len(ablation.points) // len(ablation.rows)
    reading = [f"P99s {ablation.at}", f"Dashed: {names[0]}, from which differences are"]
    if ablation.columns[0] is not _RATE:
        reading.insert(0, f"{ablation.columns[0].label}: requests answered when more are sent than any can take")
    if rounds > 1:
        rate = "; of a rate the 95 % interval" if _RATE in ablation.columns else ""
        reading += [
            f"{'Latencies: m' if rate else 'M'}edian, lowest and highest of {rounds} rounds in turns{rate}",
            f"Differences: the median of those from {names[0]} within a round; bold: 95 % sure not to be zero",
        ]
    else:
        reading += [
            "Lines: 95 % intervals (arrow: the upper end is not known); of a rate, up to the lowest that failed",
            f"Bold: its interval and that of {names[0]} lie apart",
        ]
    if any(not cell.sustained for row in ablation.rows for cell in row.cells.values()):
        reading.append("Hollow: the rate was not shown to be sustained")
    return [*wrapped(run_facts(results, names, samples)), *wrapped(reading)]
