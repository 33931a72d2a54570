"""Compares configurations: values, differences in percent, and the conditions of --fail-if."""

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from bench.results import PointRecord
from plots.data import ReportError, Results, Series


@dataclass(frozen=True, slots=True)
class Metric:
    """One column of the comparison."""

    key: str
    label: str
    unit: str
    higher_is_better: bool


METRICS = (
    Metric("rate", "Highest sustained rate", "req/s", True),
    Metric("output_tok_s", "Output throughput at that rate", "tok/s", True),
    Metric("ttft_p50", "TTFT P50", "ms", False),
    Metric("ttft_p99", "TTFT P99", "ms", False),
    Metric("itl_p50", "ITL P50", "ms", False),
    Metric("itl_p99", "ITL P99", "ms", False),
    Metric("tpot_p50", "TPOT P50", "ms", False),
    Metric("e2e_p99", "E2E P99", "ms", False),
    Metric("goodput", "Goodput at the rate of the latencies", "req/s", True),
    Metric("joules_per_output_token", "Energy per output token at the rate of the latencies", "J", False),
    Metric("mean_power_w", "Mean power at the rate of the latencies", "W", False),
    Metric("offline_rate", "Offline throughput", "req/s", True),
    Metric("offline_tok_s", "Offline output throughput", "tok/s", True),
)
# Columns that not every run has, and what they need.
OPTIONAL = {
    "goodput": "it needs limits (--slo, or limits of the sweep)",
    "joules_per_output_token": "it needs NVIDIA GPUs on the machine of the run (--energy-gpus)",
    "mean_power_w": "it needs NVIDIA GPUs on the machine of the run (--energy-gpus)",
    "offline_rate": "it needs a run with --offline",
    "offline_tok_s": "it needs a run with --offline",
}
OFFLINE = {"offline_rate": "achieved_rate", "offline_tok_s": "output_tok_s"}  # metric -> column of an offline point
LATENCIES = tuple(m for m in METRICS if m.unit == "ms")


@dataclass(frozen=True, slots=True)
class Cell:
    """A value and its difference from the baseline in percent; None: not measured, or no baseline."""

    value: float | None
    difference: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of the configurations on one workload."""

    workload: str
    latencies_at: str  # "at 4.2 req/s, …": the rate of the latency columns; "": there are none, it ran offline
    rows: dict[str, dict[str, Cell]]  # configuration -> metric key -> cell

    @property
    def metrics(self) -> list[Metric]:
        """The metrics to show; those in OPTIONAL only if they were measured, and nothing else of offline runs."""
        known = {key for row in self.rows.values() for key, cell in row.items() if cell.value is not None}
        offline = bool(known) and known <= OFFLINE.keys()
        return [m for m in METRICS if m.key in known or not (offline or m.key in OPTIONAL)]


def compare(results: Results) -> list[Comparison]:
    """One comparison per workload; latencies are compared at one rate if a common one was measured."""
    return [_compare(results, workload) for workload in results.workloads if results.of_workload(workload)]


def percent(value: float | None, base: float | None) -> float | None:
    """The difference of `value` from `base`, in percent of `base`."""
    if value is None or not base or not math.isfinite(value) or not math.isfinite(base):
        return None
    return 100 * (value - base) / base


def percent_text(difference: float) -> str:
    """A difference with its sign: +12 %, −3.4 %; from +900 % on as a factor: ×53 instead of +5,223 %."""
    if difference >= 900:
        return f"×{1 + difference / 100:,.3g}" if difference < 99_900 else f"×{1 + difference / 100:,.0f}"
    digits = 0 if abs(difference) >= 9.95 else 1
    size = f"{abs(difference):,.{digits}f}"
    if float(size.replace(",", "")) == 0:
        return "±0 %"
    return f"{'+' if difference > 0 else '−'}{size} %"


def throughput(series: Series) -> float | None:
    """Output tokens/s at the highest sustained rate; None if no rate was sustained."""
    if series.answer is None or series.answer.rate is None:
        return None
    if series.answer.output_tok_s is not None:
        return series.answer.output_tok_s
    return _at(series, series.answer.rate, "output_tok_s")


def failed_conditions(results: Results, conditions: Iterable[str]) -> list[str]:
    """The conditions (`itl_p99>+5%`, `rate<3.5`, `ttft_p99>2s`) that hold, each as a line with the configuration.

    A condition that cannot be evaluated counts as failed, so that a build does not pass because nothing was measured.
    """
    comparisons = compare(results)
    return [line for text in conditions for line in _judge(text, results, comparisons)]


def _compare(results: Results, workload: str) -> Comparison:
    series = results.of_workload(workload)
    rate, at = _common_rate(series)
    values = {s.configuration: _values(s, rate) for s in series}
    rows = {}
    for name, own in values.items():
        base = values.get(results.baselines[name], {})
        compared = results.baselines[name] != name
        rows[name] = {k: Cell(v, percent(v, base.get(k)) if compared else None) for k, v in own.items()}
    return Comparison(workload, at, rows)


def _common_rate(series: list[Series]) -> tuple[float | None, str]:
    """The rate at which latencies are compared, and a text about it.

    It is the highest rate that all measured and sustained, else the lowest that all measured. Curves without a common
    rate are interpolated at the lowest of the sustained rates, since latencies at different rates are not comparable.
    """
    if all(s.offline_point is not None for s in series):
        return None, ""
    curves = [{_rounded(d.point.rate): s.sustained(d.point) for d in s.curve} for s in series if s.curve]
    if len(curves) == 1:
        if any(s.answer and s.answer.rate for s in series):
            return None, "at its highest sustained rate"
        return min(curves[0]), f"at {min(curves[0]):.3g} req/s, the lowest measured"
    common = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    sustained = [rate for rate in common if all(curve[rate] for curve in curves)]
    if sustained:
        return max(sustained), f"at {max(sustained):.3g} req/s, the highest rate measured and sustained by all"
    if common:
        return min(common), f"at {min(common):.3g} req/s, not sustained by all"
    found = [s.answer.rate for s in series if s.answer and s.answer.rate]
    if found and all(min(curve) <= min(found) <= max(curve) for curve in curves):
        return min(found), f"at {min(found):.3g} req/s, interpolated"
    return None, "each at its own highest sustained rate"


def points_at_one_rate(series: list[Series]) -> tuple[list[tuple[Series, PointRecord]], str]:
    """One measured load point per configuration, as near as possible to the rate of the comparison, and a text."""
    wanted, at = _common_rate(series)
    chosen: list[tuple[Series, PointRecord]] = []
    for s in series:
        rate = wanted if wanted is not None else (s.answer.rate if s.answer else None)
        points = [d.point for d in s.curve if d.requests]
        if points:
            goal = rate or min(p.rate for p in points)
            chosen.append((s, min(points, key=lambda p: abs(math.log(p.rate / goal)))))
    rates = {_rounded(p.rate) for _, p in chosen}
    if wanted is not None and rates != {_rounded(wanted)}:
        at = f"at the measured rates nearest to {wanted:.3g} req/s"
    elif wanted is not None:
        at = f"at {wanted:.3g} req/s"
    return chosen, at


def _values(series: Series, rate: float | None) -> dict[str, float | None]:
    answered = series.answer.rate if series.answer else None
    at = rate if rate is not None else answered
    latencies = {m.key: _at(series, at, f"{m.key}_ms") if at is not None else None for m in LATENCIES}
    served = OPTIONAL.keys() - OFFLINE.keys()
    optional = {key: _at(series, at, key) if at is not None else None for key in served}
    point = series.offline_point
    offline = {key: None if point is None else float(getattr(point, column)) for key, column in OFFLINE.items()}
    return {"rate": answered, "output_tok_s": throughput(series), **latencies, **optional, **offline}


def _at(series: Series, rate: float, column: str) -> float | None:
    """The value of the curve at `rate`: of the load point there, else interpolated; None outside the curve."""
    points = [d.point for d in series.curve if math.isfinite(_number(d.point, column))]
    for point in points:
        if abs(point.rate / rate - 1) < 0.01:
            return float(getattr(point, column))
    for low, high in itertools.pairwise(points):
        if low.rate <= rate <= high.rate:
            share = (rate - low.rate) / (high.rate - low.rate)
            return float((1 - share) * getattr(low, column) + share * getattr(high, column))
    return None


def _number(point: PointRecord, column: str) -> float:
    value = getattr(point, column)
    return math.nan if value is None else float(value)


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


@dataclass(frozen=True, slots=True)
class Condition:
    """`itl_p99>+5%`: a metric, a direction, and a limit in the metric's unit or, if relative, in % of the baseline."""

    metric: Metric
    above: bool
    limit: float
    relative: bool


def parse_condition(text: str) -> Condition:
    """Parse a condition of `--fail-if`; raises ReportError."""
    match = re.fullmatch(r"\s*([a-z0-9_]+)\s*([<>])\s*([+-]?\d{1,12}(?:\.\d{1,12})?)\s*(%|ms|s)?\s*", text)
    known = {m.key: m for m in METRICS}
    key = re.sub(r"_ms$", "", match[1]) if match else ""
    if match is None or key not in known:
        raise ReportError(
            f"invalid condition {text!r}: use METRIC>LIMIT or METRIC<LIMIT, with a limit such as +5%, 50ms or 3.5, and "
            f"one of the metrics {', '.join(known)} (--fail-if)"
        )
    metric, unit = known[key], match[4]
    if unit in ("ms", "s") and metric.unit != "ms":
        raise ReportError(f"--fail-if {text!r}: {key} is in {metric.unit}, not in {unit}")
    limit = float(match[3]) * (1000 if unit == "s" else 1)
    return Condition(metric, match[2] == ">", limit, unit == "%")


def _judge(text: str, results: Results, comparisons: list[Comparison]) -> list[str]:
    condition = parse_condition(text)
    lines = []
    judged = 0
    candidates = results.candidates
    for comparison in comparisons:
        for name, row in comparison.rows.items():
            if name not in candidates or (condition.relative and results.baselines[name] == name):
                continue
            judged += 1
            cell = row[condition.metric.key]
            value = cell.difference if condition.relative else cell.value
            where = f"{name} / {comparison.workload}"
            if value is None:
                why = _why_unknown(condition.metric, results.series[name, comparison.workload])
                lines.append(f"{where}: {condition.metric.key} cannot be evaluated for {text!r}: {why}")
            elif value > condition.limit if condition.above else value < condition.limit:
                shown = percent_text(value) if condition.relative else f"{value:.4g} {condition.metric.unit}"
                lines.append(f"{where}: {condition.metric.key} is {shown}: {text!r} holds")
    if not judged:
        raise ReportError(f"--fail-if {text!r}: nothing to compare; pass two results folders or two configurations")
    return lines


def _why_unknown(metric: Metric, series: Series) -> str:
    if metric.key in OPTIONAL:
        return f"it was not measured; {OPTIONAL[metric.key]}"
    if series.answer is not None and series.answer.undecided is not None:
        return f"the windows were too short at {series.answer.undecided:.3g} req/s"
    return "it was not measured"
