"""A whole report from result folders: figures, markdown table and the HTML page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plots.compare import Comparison, compare
from plots.data import ReportError, Results, load
from plots.latency import latency_figure
from plots.page import page
from plots.style import save
from plots.tables import markdown
from plots.throughput import throughput_figure

PAGE_FILE = "report.html"
MARKDOWN_FILE = "comparison.md"


@dataclass(frozen=True, slots=True)
class Report:
    """What was written and what it was drawn from."""

    results: Results
    comparisons: list[Comparison]
    page: Path
    files: list[Path]


def write_report(folders: Sequence[Path], out: Path | None = None) -> Report:
    """Redraw everything from result files into `out`; left out: the folder itself, or a new one beside the last.

    Raises ReportError when a folder holds no results or no load point.
    """
    results = load(folders)
    if not any(s.measured for s in results.series.values()):
        causes = "; ".join(f"{what}: {cause}" for what, cause in results.failures.items())
        raise ReportError(
            f"{', '.join(str(f) for f in folders)}: no load point was measured{f' ({causes})' if causes else ''}"
        )
    out = out or _default_out([Path(folder) for folder in folders])
    comparisons = compare(results)
    figures: dict[str, Path] = {}
    files: list[Path] = []
    for workload in results.workloads:
        if any(s.measured for s in results.of_workload(workload)):
            path = _unused(out / f"latency-{slug(workload)}.png", files)
            files += save(latency_figure(results, workload), path)
            figures[f"P99 ITL and P99 TTFT against request rate, {workload}"] = path
    if any(s.answer for s in results.series.values()):
        path = out / "throughput.png"
        files += save(throughput_figure(results), path)
        figures["Output throughput at the highest sustained rate"] = path
    table = out / MARKDOWN_FILE
    table.write_text(markdown(results, comparisons))
    html = out / PAGE_FILE
    html.write_text(page(results, comparisons, figures))
    return Report(results, comparisons, html, [*files, table, html])


def slug(name: str) -> str:
    """A workload's name as part of a file name: "500/2000" -> "500-2000"."""
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
