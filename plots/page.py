"""report.html: one self-contained page with answers, figures, tables, configurations and environment."""

import base64
import dataclasses
import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from bench.results import PointRecord
from plots.ablation import Ablation
from plots.compare import Comparison, percent_text
from plots.data import Results, Series, hardware_lines, model_names, verdict_text
from plots.simulated import all_simulated, error_texts
from plots.style import palette
from plots.tables import heading, number, trouble, verdict
from plots.template import PAGE

# column, heading, unit
POINT_COLUMNS = (
    ("configuration", "Configuration", ""),
    ("workload", "Workload", ""),
    ("phase", "Phase", ""),
    ("rate", "Rate", "req/s"),
    ("sustained", "Sustained", ""),
    ("requests", "Requests", ""),
    ("failed", "Failed", "by kind"),
    ("preemptions", "Preemptions", ""),
    ("achieved_rate", "Achieved", "req/s"),
    ("goodput", "Goodput", "req/s"),
    ("output_tok_s", "Output", "tok/s"),
    ("joules_per_output_token", "Energy", "J/token"),
    ("mean_power_w", "Power", "W"),
    ("ttft_p50_ms", "TTFT P50", "ms"),
    ("ttft_p99_ms", "TTFT P99", "ms"),
    ("itl_p50_ms", "ITL P50", "ms"),
    ("itl_p99_ms", "ITL P99", "ms"),
    ("tpot_p50_ms", "TPOT P50", "ms"),
    ("e2e_p50_ms", "E2E P50", "ms"),
    ("e2e_p99_ms", "E2E P99", "ms"),
    ("prefix_hit_rate", "Prefix hits", "share"),
    ("kv_use_max", "KV use", "max"),
    ("waiting_max", "Waiting", "max"),
    ("lateness_p99_ms", "Lateness P99", "ms"),
    ("others_cpu_share", "Others' CPU", "share"),
    ("steal_share", "Steal", "share"),
)
_MACHINE = ("others_cpu_share", "steal_share")
TEXT_COLUMNS = ("configuration", "workload", "phase")
# Shown only if a load point has a value.
OPTIONAL = (
    "goodput", "joules_per_output_token", "mean_power_w", "preemptions", "prefix_hit_rate", "kv_use_max", "waiting_max",
    *_MACHINE,
)  # fmt: skip


def page(
    results: Results,
    comparisons: list[Comparison],
    ablations: list[Ablation],
    figures: dict[str, Path],
    timelines: dict[str, Path],
) -> str:
    """The page; `figures` and `timelines` map a caption to the PNG that is embedded."""
    points = [p for s in results.series.values() for p in s.points]
    columns = [c for c in POINT_COLUMNS if c[0] not in OPTIONAL or any(getattr(p, c[0]) is not None for p in points)]
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    colors = {name: color for name, (color, _) in palette(results.configurations).items()}
    return template.render(
        title=results.title,
        models=model_names(results),
        hardware=hardware_lines(results),
        simulated=all_simulated(results.summaries),
        errors=error_texts(results.summaries),
        finished=list(dict.fromkeys(_date(run.summary.finished or run.summary.started) for run in results.runs)),
        answers=_answers(results, colors),
        failures=results.failures,
        troubles=[(f"{p.configuration} / {p.workload}", text) for p in points if (text := trouble(p))],
        figures=[(caption, _embedded(path)) for caption, path in figures.items()],
        timelines=[(caption, _embedded(path)) for caption, path in timelines.items()],
        ablations=[_ablation(a) for a in ablations],
        comparisons=[_comparison(c) for c in comparisons],
        point_columns=[(label, unit, "text" if column in TEXT_COLUMNS else "") for column, label, unit in columns],
        points=[_point(p, columns, colors) for p in points],
        configurations=[(name, *_settings(results.details(name))) for name in results.configurations],
        colors=colors,
        runs=[_run(run.folder, run.summary) for run in results.runs],
    )


def _answers(results: Results, colors: dict[str, str]) -> list[tuple[str, list[dict[str, str]]]]:
    """One group of cards per workload."""
    return [
        (workload, [_card(s, colors[s.configuration]) for s in results.of_workload(workload)])
        for workload in results.workloads
        if results.of_workload(workload)
    ]


def _card(series: Series, color: str) -> dict[str, str]:
    card = {"configuration": series.configuration, "color": color, "rate": "–", "unit": "", "note": ""}
    answer = series.answer
    if series.offline_point is not None:
        rate = f"{series.offline_point.achieved_rate:.3g}"
        return card | {"rate": rate, "unit": "req/s", "detail": "offline: all requests were submitted at once"}
    if series.unsearched:
        return card | {"detail": "not searched: measured at the rates of another configuration"}
    if answer is None:
        return card | {"detail": "no answer: the measurement did not finish"}
    high = f"{answer.high:.3g}" if answer.high is not None else "unknown"
    states = [f"{answer.low:.3g} to {high}"] if answer.rate is not None else []
    states.append(f"binding: {answer.binding}")
    states += [f"undecided from {answer.undecided:.3g} req/s"] if answer.undecided is not None else []
    states += [answer.provisional_text()] * answer.provisional + ["not confirmed"] * (not answer.confirmed)
    rate, unit = f"less than {high}", "req/s sustained"
    if answer.rate is not None:
        rate = f"{answer.rate:.3g}"
    elif answer.undecided is not None:
        rate, unit = "undecided", ""
    elif not answer.high:
        rate, unit = "none", "of the measured rates sustained"
    return card | {"rate": rate, "unit": unit, "detail": " · ".join(states), "note": answer.note}


def _comparison(comparison: Comparison) -> dict[str, Any]:
    rows = []
    for name, row in comparison.rows.items():
        cells = []
        for metric in comparison.metrics:
            cell = row[metric.key]
            difference = percent_text(cell.difference) if cell.difference is not None else ""
            cells.append((_sort_key(cell.value), number(cell.value), difference, verdict(metric, cell)))
        rows.append((name, cells))
    return {"heading": heading(comparison), "metrics": comparison.metrics, "rows": rows}


def _ablation(ablation: Ablation) -> dict[str, Any]:
    rows = []
    for row in ablation.rows:
        cells = []
        for cell in (row.cells[metric.key] for metric in ablation.columns):
            difference = percent_text(cell.difference) if cell.difference is not None else ""
            cells.append((_sort_key(cell.value), number(cell.value), difference, "clear" if cell.clear else ""))
        rows.append((row.configuration, row.note, cells))
    return {"heading": ablation.heading, "metrics": ablation.columns, "rows": rows}


def _point(point: PointRecord, columns: list[tuple[str, str, str]], colors: dict[str, str]) -> dict[str, Any]:
    values = dataclasses.asdict(point)
    cells = []
    for column, _, _ in columns:
        value = values[column]
        if column == "sustained":
            shown = {"sustained": "yes", "not sustained": "no"}.get(verdict_text(point), verdict_text(point))
            cells.append(("" if value is None else int(value), shown, shown if point.valid else "worse"))
        elif column == "failed":
            kinds = point.failure_text()
            cells.append((str(value), f"{value} ({kinds})" if kinds else str(value), "worse" if value else "number"))
        elif isinstance(value, str):
            cells.append((value, value, "text"))
        elif column in _MACHINE:
            cells.append((_sort_key(value), number(_finite(value)), "worse" if point.disturbed else "number"))
        else:
            cells.append((_sort_key(value), number(_finite(value)), "number"))
    state = "invalid" if not point.valid else "sustained" if point.sustained else "not-sustained"
    state = "undecided" if point.undecided else state
    reason = f"{point.reason}{' (provisional: short window)' if point.provisional else ''}"
    reason += f"; disturbed: {point.disturbance}" if point.disturbed else ""
    reason += f" · {point.point_id}"
    return {"state": state, "reason": reason, "color": colors[point.configuration], "cells": cells}


def _run(folder: Path, summary: Any) -> dict[str, Any]:
    environment = {"seed": summary.seed, "started": summary.started, "finished": summary.finished or "not finished"}
    environment |= {str(k).replace("_", " "): v for k, v in summary.hardware.items()}
    environment |= {f"{name} version": version for name, version in summary.versions.items()}
    return {
        "name": folder.resolve().name,
        "environment": _plain_rows(environment),
        "workloads": [(name, _plain_rows(spec)) for name, spec in summary.workloads.items()],
    }


def _settings(details: dict[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """A configuration as requested and as resolved by its server; values that differ by workload name it."""
    resolved: dict[str, dict[str, str]] = {}  # key -> workload -> value
    for workload, found in (details.get("resolved") or {}).items():
        for key, value in _plain_rows(found):
            resolved.setdefault(key, {})[workload] = value
    rows = []
    for key, values in resolved.items():
        same = len(set(values.values())) == 1
        each = [value if same else f"{value} ({workload})" for workload, value in values.items()]
        rows.append((key, ", ".join(dict.fromkeys(each))))
    return _plain_rows({key: value for key, value in details.items() if key != "resolved"}), rows


def _plain_rows(data: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested plain data as (dotted name, value) pairs."""
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        if isinstance(value, dict):
            rows += _plain_rows(value, f"{prefix}{key}.")
        elif isinstance(value, list) and all(isinstance(word, str) for word in value):
            rows.append((f"{prefix}{key}", " ".join(value)))
        elif value is not None:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


def _date(moment: str) -> str:
    """An ISO 8601 time in a readable form; anything else unchanged."""
    try:
        return f"{datetime.fromisoformat(moment):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return moment


def _sort_key(value: float | None) -> str:
    return "" if _finite(value) is None else repr(value)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _embedded(path: Path) -> Markup:
    return Markup("data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())
