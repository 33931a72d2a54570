"""What a report draws: result folders read, merged and reduced to one curve a (configuration, workload)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.intervals import joined_gaps, percentile_interval
from bench.results import POINTS_FILE, SUMMARY_FILE, Answer, PointRow, RunFiles, Summary

P99_SAMPLES = 1000  # steps or requests: below this a P99 rests on fewer than ten and is shown with its interval
CURVE_PHASES = ("ladder", "fixed", "confirm")
ROUND_PHASES = ("ladder", "fixed")  # what may be run several times over, in turns
SAME_RATE = 1.005  # points closer than this share one place on a curve


class ReportError(Exception):
    """Results that can't be read or compared; the message is shown as one line."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One point of a curve and how many samples stand behind its percentiles."""

    point: PointRow
    requests: int
    gaps: int  # inter-token gaps of all its requests
    steps: int  # engine steps behind the gaps: the requests of a step share its gap


@dataclass(slots=True)
class Run:
    """One results folder."""

    folder: Path
    summary: Summary
    points: list[PointRow]
    labels: dict[str, str] = field(default_factory=dict)  # configuration as in the files -> as on the figures


@dataclass(frozen=True)
class Series:
    """Everything measured for one configuration (under its label) on one workload."""

    configuration: str
    workload: str
    answer: Answer | None
    points: list[PointRow]
    folder: Path

    @cached_property
    def curve(self) -> list[Drawn]:
        """The points of the line, by rate: what was measured in bounded windows if there is enough of it, else all."""
        judged = [p for p in self.points if p.valid and (p.sustained is not None or p.undecided)]
        valid = [p for p in judged if p.requests > 0]
        bounded = [p for p in valid if p.phase in CURVE_PHASES]
        chosen = _one_a_rate(bounded if len({p.rate for p in bounded}) >= 3 else valid)
        return [_drawn(RunFiles(self.folder), p) for p in chosen]

    def rounds(self, point: PointRow) -> list[PointRow]:
        """The runs of a point's rate in rounds over a ladder or given rates, in order; of any other point itself."""
        mine = [p for p in self.points if p.valid and (p.phase, p.rate) == (point.phase, point.rate)]
        same = mine if point.phase in ROUND_PHASES else []
        if len(same) < 2:
            return [with_steps(RunFiles(self.folder), point)]
        return sorted(same, key=lambda p: p.repeat)

    def sustained(self, point: PointRow) -> bool:
        """Whether a point is sustained: a short window doesn't overrule a search that found its rate too high."""
        high = self.answer.high if self.answer else None
        return bool(point.sustained) and not (point.provisional and high is not None and point.rate >= high)

    @property
    def searched(self) -> bool:
        """Whether an answer was to be found; else it was measured at given rates, or at those of another."""
        return any(p.phase in ("search", "confirm") for p in self.points)

    @property
    def unsearched(self) -> bool:
        """Whether there is no answer because none was to be found."""
        return self.answer is None and bool(self.points) and not self.searched

    @property
    def measured(self) -> list[PointRow]:
        """All load points; a single request alone is none."""
        return [p for p in self.points if p.phase != "probe"]

    @property
    def invalid(self) -> int:
        return sum(not p.valid for p in self.measured)


@dataclass(frozen=True)
class Results:
    """Result folders, merged: configurations and workloads in the order they were given."""

    runs: list[Run]
    configurations: list[str]
    workloads: list[str]
    series: dict[tuple[str, str], Series]  # (configuration, workload) -> what was measured
    baselines: dict[str, str]  # configuration -> the one its differences refer to

    def of_workload(self, workload: str) -> list[Series]:
        return [self.series[c, workload] for c in self.configurations if (c, workload) in self.series]

    @property
    def title(self) -> str:
        return " vs ".join(dict.fromkeys(run.summary.title for run in self.runs))

    @property
    def failures(self) -> dict[str, str]:
        return {k: v for run in self.runs for k, v in run.summary.failures.items()}

    @property
    def candidates(self) -> list[str]:
        """What a condition judges: with several folders those after the first, which is the reference."""
        judged = self.runs[1:] or self.runs
        return [label for run in judged for label in run.labels.values()]

    def details(self, configuration: str) -> dict[str, Any]:
        """The resolved configuration behind a label."""
        for run in self.runs:
            for name, label in run.labels.items():
                if label == configuration:
                    return run.summary.configurations.get(name, {})
        return {}


def load(folders: Sequence[Path]) -> Results:
    """Read result folders; configurations that occur in several are prefixed with the folder's name."""
    runs = [_read(Path(folder)) for folder in folders]
    if not runs:
        raise ReportError("no results folder given")
    owners = [list(dict.fromkeys([*r.summary.configurations, *(p.configuration for p in r.points)])) for r in runs]
    names = _folder_names([run.folder for run in runs])
    for i, run in enumerate(runs):
        others = {name for j, owned in enumerate(owners) if j != i for name in owned}
        run.labels = {name: f"{names[i]}: {name}" if name in others else name for name in owners[i]}
    configurations = [label for run in runs for label in run.labels.values()]
    workloads = list(dict.fromkeys(w for r in runs for w in [*r.summary.workloads, *(p.workload for p in r.points)]))
    series = {(s.configuration, s.workload): s for run in runs for s in _series(run, workloads)}
    return Results(runs, configurations, workloads, series, _baselines(runs))


def newest(root: Path) -> Path:
    """The results folder under `root` that was written to last."""
    found = [path.parent for path in root.glob(f"*/{SUMMARY_FILE}")] if root.is_dir() else []
    if not found:
        raise ReportError(f"no results under {root}/: name a folder, or measure first (redline sweep --preset demo)")
    return max(found, key=_written)


def model_names(results: Results, configurations: Sequence[str] | None = None) -> list[str]:
    """The models behind the configurations, each once, with how their weights came about where that was said."""
    names: dict[str, None] = {}
    for configuration in configurations or results.configurations:
        details = results.details(configuration)
        name = str(details.get("model") or "")
        if Path(name).is_absolute():  # where it lies says nothing to the reader of a figure
            name = Path(name).name
        if name and _has_random_weights(details.get("serve")):
            name += " (random weights)"
        if name:
            names[name] = None
    return list(names)


def hardware_lines(results: Results) -> list[str]:
    """The machines of all runs in words, each once."""
    lines: dict[str, None] = {}
    for run in results.runs:
        hardware = run.summary.hardware
        words = [str(hardware["cpu"])] if hardware.get("cpu") else []
        words += [f"{hardware['cores']} cores"] if hardware.get("cores") else []
        words += [f"{hardware['memory_gib']:g} GiB"] if hardware.get("memory_gib") else []
        known = ("cpu", "cores", "memory_gib", "system")
        words += [f"{key} {value}" for key, value in hardware.items() if key not in known and value]
        lines[", ".join(words)] = None
    return [line for line in lines if line]


def versions_line(results: Results) -> str:
    """The version of Redline that measured, of every run once."""
    found = dict.fromkeys(run.summary.versions.get("redline-llm", "") for run in results.runs)
    return ", ".join(f"redline {version}" for version in found if version and version != "not installed")


def run_facts(results: Results, configurations: Sequence[str], samples: str) -> list[str]:
    """What a figure says of the run behind it: model, hardware, samples (in words), seeds, version."""
    models = model_names(results, configurations)
    seeds = dict.fromkeys(str(run.summary.seed) for run in results.runs)
    facts = [
        f"Model: {', '.join(models)}" if models else "",
        f"Hardware: {'; '.join(hardware_lines(results))}",
        samples,
        f"Seed {', '.join(seeds)}",
        versions_line(results),
    ]
    return [fact for fact in facts if fact]


def _has_random_weights(serve: Any) -> bool:
    """Whether the flags of a server, as a mapping or as a command line's words, ask for made-up weights."""
    words = [w for pair in serve.items() for w in pair] if isinstance(serve, dict) else (serve or [])
    said = " ".join(str(word) for word in words).replace("_", "-").replace("=", " ")
    return "load-format dummy" in said


def _read(folder: Path) -> Run:
    files = RunFiles(folder)
    if not (folder / SUMMARY_FILE).exists():
        raise ReportError(f"{folder} is not a results folder: it has no {SUMMARY_FILE}")
    try:
        return Run(folder, files.read_summary(), files.read_points())
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{folder}: {SUMMARY_FILE} or {POINTS_FILE} can't be read: {error}") from error


def _written(folder: Path) -> float:
    return max((folder / name).stat().st_mtime for name in (SUMMARY_FILE, POINTS_FILE) if (folder / name).exists())


def _folder_names(folders: list[Path]) -> list[str]:
    """The shortest tails of the paths that tell the folders apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ReportError(f"{folders[0]} is given twice")


def _baselines(runs: list[Run]) -> dict[str, str]:
    """Each configuration is compared with its namesake in the first folder, else with the first configuration."""
    first = next(iter(runs[0].labels.values()), "")
    return {
        label: runs[0].labels.get(name, first) if run is not runs[0] else first
        for run in runs
        for name, label in run.labels.items()
    }


def _series(run: Run, workloads: list[str]) -> list[Series]:
    made = []
    for name, label in run.labels.items():
        for workload in workloads:
            points = [
                replace(p, configuration=label) for p in run.points if (p.configuration, p.workload) == (name, workload)
            ]
            answers = [a for a in run.summary.answers if (a.configuration, a.workload) == (name, workload)]
            answer = replace(answers[-1], configuration=label) if answers else None
            if points or answer:
                made.append(Series(label, workload, answer, points, run.folder))
    return made


def verdict_words(point: PointRow) -> str:
    """The verdict of a load point; "–" where none was passed (one request alone, a closed loop)."""
    if not point.valid:
        return "invalid"
    if point.undecided:
        return "undecided"
    return {True: "sustained", False: "not sustained", None: "–"}[point.sustained]


def _one_a_rate(points: list[PointRow]) -> list[PointRow]:
    """Where a rate was measured more than once, the median point of the long ones, by P99 ITL, stands for it.

    Rounds come before what a search measured at the same rate; disturbed points stand for it where there are no others.
    """
    groups: list[list[PointRow]] = []
    for point in sorted(points, key=lambda p: p.rate):
        if groups and point.rate < groups[-1][0].rate * SAME_RATE:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [_middle(group) for group in groups]


def _middle(group: list[PointRow]) -> PointRow:
    rounds = [p for p in group if p.phase in ROUND_PHASES]
    group = rounds if len({p.repeat for p in rounds}) > 1 else group
    group = [p for p in group if not p.disturbed] or group
    most = max(p.requests for p in group)
    long = sorted((p for p in group if 2 * p.requests > most), key=lambda p: p.itl_p99_ms)
    return long[(len(long) - 1) // 2]


def _drawn(files: RunFiles, point: PointRow) -> Drawn:
    """Counts what the percentiles of a point were taken over: requests of its window, also those cut at its end."""
    try:
        rows = _measured_rows(files, point)
    except FileNotFoundError:  # a folder may be passed on without its request files; the point still tells roughly
        gaps = point.output_tok_s * point.window_s / point.tokens_per_chunk - point.requests
        point = with_steps(files, point)
        return Drawn(point, point.requests, max(0, round(gaps)) if math.isfinite(gaps) else 0, point.itl_steps)
    point = with_steps(files, point, rows)
    return Drawn(point, len(rows), int(rows["chunk_gaps_s"].map(len).sum()), point.itl_steps)


def with_steps(files: RunFiles, point: PointRow, rows: pd.DataFrame | None = None) -> PointRow:
    """The point with its engine steps counted, and intervals that respect them.

    Files of before steps were counted hold intervals that took all gaps for independent, and a largest sample for the
    upper end of a P99: both are computed anew from the requests; without these the intervals are not known.
    """
    if point.itl_steps or not point.requests:
        return point
    try:
        rows = _measured_rows(files, point) if rows is None else rows
    except FileNotFoundError:
        below, above = -math.inf, math.inf
        point = replace(point, itl_p99_low_ms=below, itl_p99_high_ms=above)
        return replace(point, ttft_p99_low_ms=below, ttft_p99_high_ms=above)
    begun = rows[rows["ttft_s"].notna()]
    gaps, steps = joined_gaps(
        (begun["intended_s"] + begun["ttft_s"]).tolist(), [np.asarray(g, dtype=float) for g in begun["chunk_gaps_s"]]
    )
    itl = percentile_interval(gaps * 1e3, 99, steps)
    changed = replace(point, itl_steps=len(np.unique(steps)), itl_p99_low_ms=itl[0], itl_p99_high_ms=itl[1])
    if len(begun) == len(rows):  # how long those without a first token had waited is not in the files
        ttft = percentile_interval(begun["ttft_s"].to_numpy(dtype=float) * 1e3, 99)
        changed = replace(changed, ttft_p99_low_ms=ttft[0], ttft_p99_high_ms=ttft[1])
    return changed


def _measured_rows(files: RunFiles, point: PointRow) -> pd.DataFrame:
    rows = files.read_requests(point.point_id)
    return rows[rows["in_window"] & rows["status"].isin(["ok", "cut short"])]
