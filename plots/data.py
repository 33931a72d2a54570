"""Reads and merges result folders, and reduces them to one curve per (configuration, workload)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.results import POINTS_FILE, SUMMARY_FILE, Answer, PointRecord, RunFiles, Summary
from bench.statistics.intervals import joined_gaps, percentile_interval
from plots.simulated import all_simulated, error_texts, hardware_texts, label_marks, marked_title

P99_SAMPLES = 1000  # steps or requests: a P99 of fewer rests on less than ten samples and is shown with its interval
CURVE_PHASES = ("ladder", "fixed", "confirm")
OFFLINE = "offline"  # phase of runs without a server
ROUND_PHASES = ("ladder", "fixed")  # phases that may have several rounds
SAME_RATE = 1.005  # ratio of rates below which load points share one place on a curve


class ReportError(Exception):
    """Results that cannot be read or compared; the message is shown as one line."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One point of a curve and the number of samples of its percentiles."""

    point: PointRecord
    requests: int
    gaps: int  # inter-token gaps of all its requests
    steps: int  # engine steps of the gaps: the requests of a step share its gap


@dataclass(slots=True)
class Run:
    """One results folder."""

    folder: Path
    summary: Summary
    points: list[PointRecord]
    labels: dict[str, str] = field(default_factory=dict)  # configuration in the files -> in the figures


@dataclass(frozen=True)
class Series:
    """Everything measured for one configuration (under its label) on one workload."""

    configuration: str
    workload: str
    answer: Answer | None
    points: list[PointRecord]
    folder: Path

    @cached_property
    def curve(self) -> list[Drawn]:
        """The points of the line, by rate: of ladder, given rates and confirmation if at least three, else all."""
        judged = [p for p in self.points if p.valid and (p.sustained is not None or p.undecided)]
        valid = [p for p in judged if p.requests > 0]
        bounded = [p for p in valid if p.phase in CURVE_PHASES]
        chosen = _one_per_rate(bounded if len({p.rate for p in bounded}) >= 3 else valid)
        return [_drawn(RunFiles(self.folder), p) for p in chosen]

    def rounds(self, point: PointRecord) -> list[PointRecord]:
        """The runs of a load point's rate over all rounds of the ladder or the given rates; of others itself."""
        mine = [p for p in self.points if p.valid and (p.phase, p.rate) == (point.phase, point.rate)]
        same = mine if point.phase in ROUND_PHASES else []
        if len(same) < 2:
            return [with_steps(RunFiles(self.folder), point)]
        return sorted(same, key=lambda p: p.repeat)

    def sustained(self, point: PointRecord) -> bool:
        """Whether a load point is sustained; a short window does not outvote a search in which its rate failed."""
        high = self.answer.high if self.answer else None
        return bool(point.sustained) and not (point.provisional and high is not None and point.rate >= high)

    @property
    def searched(self) -> bool:
        """Whether it was searched, and not only measured at given rates or at those of another configuration."""
        return any(p.phase in ("search", "confirm") for p in self.points)

    @property
    def unsearched(self) -> bool:
        """Whether there is no answer because it was not searched; offline there is none to search."""
        return self.answer is None and any(p.phase != OFFLINE for p in self.points) and not self.searched

    @property
    def offline_point(self) -> PointRecord | None:
        """The last valid run, if it was measured without a server only."""
        if any(p.phase != OFFLINE for p in self.points):
            return None
        return next((p for p in reversed(self.points) if p.valid), None)

    @property
    def measured(self) -> list[PointRecord]:
        """All load points without the probe."""
        return [p for p in self.points if p.phase != "probe"]

    @property
    def invalid(self) -> int:
        return sum(not p.valid for p in self.measured)


@dataclass(frozen=True)
class Results:
    """Merged result folders; configurations and workloads are in the order of the folders and files."""

    runs: list[Run]
    configurations: list[str]
    workloads: list[str]
    series: dict[tuple[str, str], Series]  # (configuration, workload) -> what was measured
    baselines: dict[str, str]  # configuration -> the one that it is compared with

    def of_workload(self, workload: str) -> list[Series]:
        return [self.series[c, workload] for c in self.configurations if (c, workload) in self.series]

    @property
    def summaries(self) -> list[Summary]:
        return [run.summary for run in self.runs]

    @property
    def title(self) -> str:
        return marked_title(" vs ".join(dict.fromkeys(run.summary.title for run in self.runs)), self.summaries)

    def heading(self, workload: str) -> str:
        """The title of a figure about one workload, which the title of the results may name already."""
        return self.title if workload in self.title else f"{self.title}: {workload}"

    def narrowed(self, workloads: Sequence[str]) -> "Results":
        """What was measured on some workloads, for a figure of them; everything if no workload has its own model."""
        if not any(self.model_of(workload) for workload in self.workloads):
            return self
        series = {key: one for key, one in self.series.items() if key[1] in workloads}
        configurations = [name for name in self.configurations if any(name == key[0] for key in series)]
        chosen = [workload for workload in self.workloads if workload in workloads]
        return replace(self, configurations=configurations, workloads=chosen, series=series)

    def model_of(self, workload: str) -> str:
        """The model that a sweep sets for a workload; "" if it has that of its configuration."""
        specs = (run.summary.workloads.get(workload, {}) for run in self.runs)
        return next((str(spec["model"]) for spec in specs if spec.get("model")), "")

    @property
    def failures(self) -> dict[str, str]:
        return {k: v for run in self.runs for k, v in run.summary.failures.items()}

    @property
    def candidates(self) -> list[str]:
        """The configurations that conditions apply to: with several folders those after the first, the baseline."""
        judged = self.runs[1:] or self.runs
        return [label for run in judged for label in run.labels.values()]

    def details(self, configuration: str) -> dict[str, Any]:
        """The configuration of a label, as in the summary."""
        for run in self.runs:
            for name, label in run.labels.items():
                if label == configuration:
                    return run.summary.configurations.get(name, {})
        return {}


def load(folders: Sequence[Path]) -> Results:
    """Read result folders; configurations that occur in several get the folder's name as a prefix."""
    runs = [_read(Path(folder)) for folder in folders]
    if not runs:
        raise ReportError("no results folder")
    owners = [list(dict.fromkeys([*r.summary.configurations, *(p.configuration for p in r.points)])) for r in runs]
    names = _folder_names([run.folder for run in runs])
    marks = label_marks([run.summary for run in runs])
    for i, run in enumerate(runs):
        others = {name for j, owned in enumerate(owners) if j != i for name in owned}
        shown = {name: f"{names[i]}: {name}" if name in others else name for name in owners[i]}
        run.labels = {name: label + marks[i].get(name, "") for name, label in shown.items()}
    configurations = [label for run in runs for label in run.labels.values()]
    workloads = list(dict.fromkeys(w for r in runs for w in [*r.summary.workloads, *(p.workload for p in r.points)]))
    series = {(s.configuration, s.workload): s for run in runs for s in _series(run, workloads)}
    return Results(runs, configurations, workloads, series, _baselines(runs))


def newest(root: Path) -> Path:
    """The results folder under `root` that was written to last."""
    found = [path.parent for path in root.glob(f"*/{SUMMARY_FILE}")] if root.is_dir() else []
    if not found:
        raise ReportError(f"no results in {root}/: pass a folder, or measure first (redline sweep --preset demo)")
    return max(found, key=_written)


def model_names(results: Results, configurations: Sequence[str] | None = None) -> list[str]:
    """The models of workloads or else of the configurations, each once; dummy weights are marked."""
    own = [results.model_of(workload) for workload in results.workloads]
    names = {_model_name(name): None for name in own if name}
    for configuration in (configurations or results.configurations) if not all(own) else ():
        details = results.details(configuration)
        name = _model_name(str(details.get("model") or ""))
        if name and _has_random_weights(details.get("serve")):
            name += " (random weights)"
        if name:
            names[name] = None
    return list(names)


def _model_name(name: str) -> str:
    """A model without its folder, which is irrelevant in a figure."""
    return Path(name).name if Path(name).is_absolute() else name


def hardware_lines(results: Results) -> list[str]:
    """The machines of all runs, each once; simulated ones take the place of those that computed them."""
    lines: dict[str, None] = {}
    for run in results.runs:
        lines |= dict.fromkeys(hardware_texts(run.summary))
        if all_simulated([run.summary]):
            continue
        hardware = run.summary.hardware
        parts = [str(hardware["cpu"])] if hardware.get("cpu") else []
        parts += [f"{hardware['cores']} cores"] if hardware.get("cores") else []
        parts += [f"{hardware['memory_gib']:g} GiB"] if hardware.get("memory_gib") else []
        known = ("cpu", "cores", "memory_gib", "system")
        parts += [f"{key} {value}" for key, value in hardware.items() if key not in known and value]
        lines[", ".join(parts)] = None
    return [line for line in lines if line]


def versions_line(results: Results) -> str:
    """The versions of Redline that measured, each once."""
    found = dict.fromkeys(run.summary.versions.get("redline-llm", "") for run in results.runs)
    return ", ".join(f"redline {version}" for version in found if version and version != "not installed")


def run_facts(results: Results, configurations: Sequence[str], samples: str, seed: int | None = None) -> list[str]:
    """The caption of a figure about its run: model, hardware, samples (a text), seed (None: of all runs), version."""
    models = model_names(results, configurations)
    seeds = dict.fromkeys(str(run.summary.seed) for run in results.runs) if seed is None else [str(seed)]
    caption = [
        f"Model: {', '.join(models)}" if models else "",
        f"Hardware: {'; '.join(hardware_lines(results))}",
        samples,
        f"Seed {', '.join(seeds)}",
        versions_line(results),
        *error_texts(results.summaries),
    ]
    return [part for part in caption if part]


def _has_random_weights(serve: Any) -> bool:
    """Whether the flags of a server (a mapping, or a list of arguments) include --load-format dummy."""
    arguments = [w for pair in serve.items() for w in pair] if isinstance(serve, dict) else (serve or [])
    line = " ".join(str(argument) for argument in arguments).replace("_", "-").replace("=", " ")
    return "load-format dummy" in line


def _read(folder: Path) -> Run:
    files = RunFiles(folder)
    if not (folder / SUMMARY_FILE).exists():
        raise ReportError(f"{folder} is not a results folder: it has no {SUMMARY_FILE}")
    try:
        return Run(folder, files.read_summary(), files.read_points())
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{folder}: {SUMMARY_FILE} or {POINTS_FILE} cannot be read: {error}") from error


def _written(folder: Path) -> float:
    return max((folder / name).stat().st_mtime for name in (SUMMARY_FILE, POINTS_FILE) if (folder / name).exists())


def _folder_names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that distinguish the folders."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ReportError(f"{folders[0]} was passed twice")


def _baselines(runs: list[Run]) -> dict[str, str]:
    """The baseline of each configuration: the one of the same name in the first folder, else the first one."""
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


def verdict_text(point: PointRecord) -> str:
    """The verdict of a load point; "–" for a probe or a closed loop."""
    if not point.valid:
        return "invalid"
    if point.undecided:
        return "undecided"
    return {True: "sustained", False: "not sustained", None: "–"}[point.sustained]


def _one_per_rate(points: list[PointRecord]) -> list[PointRecord]:
    """One load point per rate: of several, the median one by P99 ITL among those with long windows.

    Rounds take precedence over what a search measured at the same rate; disturbed load points are used only if there
    are no others.
    """
    groups: list[list[PointRecord]] = []
    for point in sorted(points, key=lambda p: p.rate):
        if groups and point.rate < groups[-1][0].rate * SAME_RATE:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [_middle(group) for group in groups]


def _middle(group: list[PointRecord]) -> PointRecord:
    rounds = [p for p in group if p.phase in ROUND_PHASES]
    group = rounds if len({p.repeat for p in rounds}) > 1 else group
    group = [p for p in group if not p.disturbed] or group
    most = max(p.requests for p in group)
    long = sorted((p for p in group if 2 * p.requests > most), key=lambda p: p.itl_p99_ms)
    return long[(len(long) - 1) // 2]


def _drawn(files: RunFiles, point: PointRecord) -> Drawn:
    """The load point with the number of samples of its percentiles, including requests that were cut short."""
    try:
        rows = _measured_rows(files, point)
    except FileNotFoundError:  # without the request files, the gaps are estimated from the load point
        gaps = point.output_tok_s * point.window_s / point.tokens_per_chunk - point.requests
        point = with_steps(files, point)
        return Drawn(point, point.requests, max(0, round(gaps)) if math.isfinite(gaps) else 0, point.itl_steps)
    point = with_steps(files, point, rows)
    return Drawn(point, len(rows), int(rows["chunk_gaps_s"].map(len).sum()), point.itl_steps)


def with_steps(files: RunFiles, point: PointRecord, rows: pd.DataFrame | None = None) -> PointRecord:
    """The load point with the number of its engine steps, and intervals that respect them.

    Older files have no steps; their intervals assume independent gaps and end at the largest sample. Both are computed
    again from the request files; without these the intervals are unknown.
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
    if len(begun) == len(rows):  # the wait of requests without a first token is not in the files
        ttft = percentile_interval(begun["ttft_s"].to_numpy(dtype=float) * 1e3, 99)
        changed = replace(changed, ttft_p99_low_ms=ttft[0], ttft_p99_high_ms=ttft[1])
    return changed


def _measured_rows(files: RunFiles, point: PointRecord) -> pd.DataFrame:
    rows = files.read_requests(point.point_id)
    return rows[rows["in_window"] & rows["status"].isin(["ok", "cut short"])]
