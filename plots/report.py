"""Writes a report from result folders: figures, markdown tables and the HTML page."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from bench.results import PointRecord
from plots.ablation import Ablation, ablation_figure, ablations
from plots.compare import Comparison, compare
from plots.data import OFFLINE, ReportError, Results, Series, load
from plots.latency import latency_figure
from plots.offline import offline_figure, offline_points
from plots.page import page
from plots.percentiles import percentile_figure
from plots.style import save
from plots.tables import markdown
from plots.throughput import throughput_figure
from plots.timeline import timeline_figure, timeline_point

PAGE_FILE = "report.html"
MARKDOWN_FILE = "comparison.md"


@dataclass(frozen=True, slots=True)
class Report:
    """The written files, and the results that they show."""

    results: Results
    comparisons: list[Comparison]
    ablations: list[Ablation]
    page: Path
    files: list[Path]


def write_report(folders: Sequence[Path], out: Path | None = None, timelines: Sequence[str] = ()) -> Report:
    """Draw everything from result files into `out`. None: the folder itself, or for several a new one next to the last.

    `timelines` are ids of load points whose timelines are drawn, besides one per configuration and workload. Raises
    ReportError if a folder has no results, or there is no load point, or none with such an id.
    """
    results = load(folders)
    if not any(s.measured for s in results.series.values()):
        causes = "; ".join(f"{what}: {cause}" for what, cause in results.failures.items())
        raise ReportError(
            f"{', '.join(str(f) for f in folders)}: no load point was measured{f' ({causes})' if causes else ''}"
        )
    requested = [_find_point(results, point_id) for point_id in timelines]
    pictures = _Pictures(out or _default_out([Path(folder) for folder in folders]))
    comparisons = compare(results)
    parts = ablations(results)
    for ablation in parts:
        caption = f"Effect of each part, {ablation.workload}"
        pictures.add(f"ablation-{slug(ablation.workload)}", caption, ablation_figure(results, ablation))
    _draw_summaries(results, pictures)
    main_figures = dict(pictures.shown)
    _draw_timelines(results, pictures, requested)
    timeline_figures = {caption: path for caption, path in pictures.shown.items() if caption not in main_figures}
    table = pictures.out / MARKDOWN_FILE
    table.write_text(markdown(results, comparisons))
    html = pictures.out / PAGE_FILE
    html.write_text(page(results, comparisons, parts, main_figures, timeline_figures))
    return Report(results, comparisons, parts, html, [*pictures.files, table, html])


class _Pictures:
    """Writes figures to files with unique names, and keeps their captions."""

    def __init__(self, out: Path):
        self.out = out
        self.files: list[Path] = []
        self.shown: dict[str, Path] = {}  # caption -> PNG

    def add(self, name: str, caption: str, figure: Figure) -> None:
        path = _unused(self.out / f"{name}.png", self.files)
        self.files += save(figure, path)
        self.shown[caption] = path


def _draw_summaries(results: Results, pictures: _Pictures) -> None:
    offline = offline_figure(results.narrowed([workload for _, workload in offline_points(results)]))
    if offline is not None:
        pictures.add("offline", "Offline throughput by share of repeated requests", offline)
    served = {
        w: [p for s in results.of_workload(w) for p in s.measured if p.phase != OFFLINE] for w in results.workloads
    }
    measured = [workload for workload, points in served.items() if points]
    for workload in measured:
        caption = f"P99 ITL and P99 TTFT against request rate, {workload}"
        pictures.add(f"latency-{slug(workload)}", caption, latency_figure(results.narrowed([workload]), workload))
    answered = [w for w in results.workloads if any(s.answer for s in results.of_workload(w))]
    models: dict[str, list[str]] = {results.model_of(workload): [] for workload in answered}
    for model, workloads in models.items():
        workloads += [workload for workload in answered if results.model_of(workload) == model]
        of_model = f" of {model}" if len(models) > 1 else ""
        caption = f"Output throughput at the highest sustained rate{of_model}"
        name = f"throughput-{slug(model)}" if len(models) > 1 else "throughput"
        pictures.add(name, caption, throughput_figure(results.narrowed(workloads), of_model))
    for workload in measured:
        figure = percentile_figure(results.narrowed([workload]), workload)
        if figure is not None:
            pictures.add(f"percentiles-{slug(workload)}", f"Distribution of ITL and TTFT, {workload}", figure)


def _draw_timelines(results: Results, pictures: _Pictures, requested: list[tuple[Series, PointRecord]]) -> None:
    chosen = list(requested)
    for series in results.series.values():
        default = timeline_point(series)
        if default is not None and all(default is not point for _, point in requested):
            chosen.append((series, default))
    for series, point in chosen:
        figure = timeline_figure(results.narrowed([series.workload]), series, point)
        if figure is not None:
            caption = f"Timeline of {series.configuration}, {series.workload}, {point.rate:.3g} req/s ({point.phase})"
            pictures.add(f"timeline-{slug(point.point_id)}", caption, figure)


def _find_point(results: Results, point_id: str) -> tuple[Series, PointRecord]:
    found = [(s, p) for s in results.series.values() for p in s.points if p.point_id == point_id]
    if not found:
        known = [p.point_id for s in results.series.values() for p in s.measured]
        near = difflib.get_close_matches(point_id, known, n=3, cutoff=0.3) or known[:3]
        raise ReportError(f"no load point {point_id!r} (--timeline); known: {', '.join(near)}, …")
    return found[-1]  # of several folders the last


def slug(name: str) -> str:
    """A workload's name as part of a figure's file name, in lower case: "500/2000" -> "500-2000"."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "workload"


def _default_out(folders: list[Path]) -> Path:
    if len(folders) == 1:
        return folders[0]
    return folders[-1].parent / ("compare-" + "-".join(slug(folder.resolve().name) for folder in folders))


def _unused(path: Path, taken: list[Path]) -> Path:
    number = 2
    wanted = path
    while path in taken:
        path = wanted.with_stem(f"{wanted.stem}-{number}")
        number += 1
    return path
