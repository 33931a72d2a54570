"""Runs a sweep on simulated hardware in several processes, one workload in each at a time."""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.measurement.load_point import PointPlan, PointState
from bench.measurement.progress import Progress, point_line
from bench.results import (
    FLAG,
    METRICS_FOLDER,
    POINTS_FILE,
    REQUESTS_FOLDER,
    SUMMARY_FILE,
    PointRecord,
    RunFiles,
    Summary,
    slug,
)
from bench.results.writing import check_folder, writing
from bench.simulation.processes import Report, run_all
from bench.sweeps.state import STATE_FILE, SweepState
from bench.sweeps.sweep import discard, run_sweep
from bench.sweeps.sweepfile import SweepPlan
from engine.simulation import Simulate, without_core_log

PARTS_FOLDER = ".redline-parts"  # of an unfinished sweep: one folder per workload; no folder of a user has this name


def run_in_processes(
    plan: SweepPlan, folder: Path, progress: Progress, simulate: Simulate, processes: int, *, fresh: bool = False
) -> Summary:
    """As `run_sweep`, with the same results, for a sweep whose configurations are all simulated.

    An interrupted run leaves a folder for each workload, from which the next one continues, with any number of
    processes; in the end they become one.

    Args:
        simulate: a function of a module, since it is called in other processes.
        processes: at most.
    """
    check_folder(folder, FLAG)
    parts = folder / PARTS_FOLDER
    if fresh:
        discard(folder)
        shutil.rmtree(parts, ignore_errors=True)
    if (folder / SUMMARY_FILE).exists():  # written last when parts become one
        summary = run_sweep(plan, folder, progress, simulate)
        shutil.rmtree(parts, ignore_errors=True)
        return summary
    begun = any((folder / name).exists() for name in (STATE_FILE, POINTS_FILE))
    if not parts.exists() and (begun or processes == 1 or len(plan.workloads) == 1):
        return run_sweep(plan, folder, progress, simulate)
    with writing(parts, FLAG):
        parts.mkdir(parents=True, exist_ok=True)
    # Those with the longest requests take longest: they begin first, so that no process idles in the end.
    workloads = sorted(plan.workloads, key=lambda workload: -workload.max_tokens)
    jobs = [(replace(plan, workloads=[one]), parts / slug(one.name), simulate) for one in workloads]
    with contextlib.closing(run_all(_run_part, jobs, processes, lambda _, call: _pass_on(progress, call))) as results:
        for _ in results:
            pass
    return _join(plan, folder)


def _run_part(report: Report, plan: SweepPlan, folder: Path, simulate: Simulate) -> None:
    with without_core_log():
        run_sweep(plan, folder, _Reported(report), simulate)


class _Reported:
    """Implements `Progress` by reports to the process that prints."""

    def __init__(self, report: Report):
        self._report = report
        self._run = "", ""

    def message(self, text: str) -> None:
        if not text.startswith("\n"):  # the heading of a stage, which `run_state` names too
            self._report(("message", f"{' / '.join(self._run)}: {text}"))

    def point_started(self, plan: PointPlan) -> None:
        self._report(("run_state", *self._run, f"{plan.phase} {plan.rate:.4g} req/s"))

    def point_tick(self, plan: PointPlan, state: PointState) -> None:
        """A load point takes seconds."""

    def point_finished(self, record: PointRecord) -> None:
        self._report(("message", f"{' / '.join(self._run)}: {point_line(record).plain}"))

    def point_dropped(self) -> None:
        """Simulations have no generators that could be lost."""

    def run_state(self, configuration: str, workload: str, state: str) -> None:
        self._run = configuration, workload
        self._report(("run_state", configuration, workload, state))


def _pass_on(progress: Progress, call: Sequence[str]) -> None:
    method, *arguments = call
    getattr(progress, method)(*arguments)


def _join(plan: SweepPlan, folder: Path) -> Summary:
    """Make the folders of all workloads one, as if one process had run the sweep."""
    parts = [folder / PARTS_FOLDER / slug(workload.name) for workload in plan.workloads]
    summaries = [RunFiles(part).read_summary() for part in parts]
    summary = _joined(summaries)
    files = RunFiles(folder)
    files.write_points([point for part in parts for point in RunFiles(part).read_points()])
    for part in parts:
        for name in (REQUESTS_FOLDER, METRICS_FOLDER):
            if (part / name).exists():
                shutil.copytree(part / name, folder / name, dirs_exist_ok=True, copy_function=shutil.move)
    states = [SweepState.read(part) for part in parts]
    SweepState.joined([state for state in states if state is not None]).write(folder)
    files.write_summary(summary)
    shutil.rmtree(folder / PARTS_FOLDER)
    return summary


def _joined(summaries: Sequence[Summary]) -> Summary:
    first = summaries[0]
    configurations: dict[str, dict[str, Any]] = {}
    for summary in summaries:
        for name, details in summary.configurations.items():
            known = configurations.setdefault(name, {})
            resolved = (known.get("resolved") or {}) | (details.get("resolved") or {})
            known |= details
            known |= {"resolved": resolved} if resolved else {}
    return replace(
        first,
        configurations=configurations,
        workloads={name: spec for summary in summaries for name, spec in summary.workloads.items()},
        answers=[answer for summary in summaries for answer in summary.answers],
        failures={what: cause for summary in summaries for what, cause in summary.failures.items()},
        started=min(summary.started for summary in summaries),
        finished=max(summary.finished or "" for summary in summaries) or None,
    )
