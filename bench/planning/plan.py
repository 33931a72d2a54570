"""Makes a plan: examines every candidate, in several processes, and keeps what is done on disk."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.planning.options import Candidate, PlanRequest
from bench.planning.replica import Examined, examine
from bench.planning.rows import PLAN_FILE, Row, read_plan, with_price, write_plan
from bench.results import FLAG, SUMMARY_FILE, RunFiles, Summary
from bench.results.environment import versions
from bench.results.writing import check_folder
from bench.simulation.processes import run_all
from bench.workloads import ANY_VOCABULARY, make_workload
from engine.hardware.accuracy import description_version
from engine.hardware.description import is_described
from engine.simulation import Simulate


def make_plan(
    request: PlanRequest,
    candidates: Sequence[Candidate],
    simulate: Simulate,
    show: Callable[[Candidate, str], None],
    *,
    folder: Path | None = None,
    processes: int = 1,
) -> Generator[Row, None, None]:
    """The rows as they are found; those that `folder` has from an interrupted run come first.

    Args:
        simulate: makes engines; it is called in other processes, so it must be a function of a module.
        show: called with the state of a candidate, in a few words.
        folder: for plan.json, plan.csv and the load points; None: nothing is written.
        processes: at most.

    Raises BenchError if the folder has another plan, CannotWriteError, KeyboardInterrupt.
    """
    kept = _Folder(request, folder)
    known = {(row.hardware, row.tp): row for row in kept.rows}
    for candidate in candidates:
        if (row := known.get((candidate.hardware, candidate.tp))) is not None:
            yield with_price(row, request.prices.get(row.hardware))
    left = [one for one in candidates if (one.hardware, one.tp) not in known]
    if not left:
        return
    jobs = [(candidate, request, simulate) for candidate in left]
    results = run_all(examine, jobs, processes, lambda number, text: show(left[number], text))
    with contextlib.closing(results):
        for _, examined in results:
            kept.add(examined)
            yield with_price(examined.row, request.prices.get(examined.row.hardware))


class _Folder:
    """What a plan has on disk so far: its rows, and beside them the result files that `redline report` draws."""

    def __init__(self, request: PlanRequest, path: Path | None):
        self._request, self._path = request, path
        self._digest = request.digest(_product())
        self._hardware: dict[str, dict[str, Any]] = {}
        self.rows: list[Row] = []
        if path is None:
            return
        check_folder(path, FLAG)
        if (path / SUMMARY_FILE).exists() and not (path / PLAN_FILE).exists():
            raise BenchError(f"{path} contains other results: choose another folder with --out")
        rows, self._hardware = read_plan(path, self._digest)
        self.rows = [row for row in rows if not _is_stale(row)]
        if self.rows:
            self._write_plan(path)  # prices are not part of the digest: they may have changed

    def add(self, examined: Examined) -> None:
        self.rows.append(examined.row)
        if examined.described is not None:
            self._hardware[examined.row.hardware] = examined.described["simulated"]
        if self._path is None:
            return
        self._write_plan(self._path)
        self._add_results(examined, RunFiles(self._path))

    def _write_plan(self, path: Path) -> None:
        rows = [with_price(row, self._request.prices.get(row.hardware)) for row in self.rows]
        write_plan(path, self._digest, dataclasses.asdict(self._request), self._hardware, rows)

    def _add_results(self, examined: Examined, files: RunFiles) -> None:
        name = Candidate(examined.row.hardware, examined.row.tp).name
        summary = self._summary(files)
        configurations = {one: details for one, details in summary.configurations.items() if one != name}
        if examined.described is not None:
            configurations[name] = examined.described
        summary.configurations = dict(sorted(configurations.items()))
        answers = [answer for answer in summary.answers if answer.configuration != name]
        answers += [examined.answer] if examined.answer is not None else []
        summary.answers = sorted(answers, key=lambda answer: answer.configuration)
        points = [point for point in files.read_points() if point.configuration != name] + examined.points
        files.write_points(sorted(points, key=lambda point: point.configuration))
        files.write_summary(summary)

    def _summary(self, files: RunFiles) -> Summary:
        if (files.folder / SUMMARY_FILE).exists():
            return files.read_summary()
        workload = make_workload(self._request.workload, ANY_VOCABULARY)
        title = f"{workload.name} on {self._request.model}"
        return Summary(title, self._request.seed, {}, {workload.name: workload.describe()})


def _is_stale(row: Row) -> bool:
    """Whether the description of the hardware has changed. A row whose description is not here now is kept."""
    return is_described(row.hardware) and row.description != description_version(row.hardware)


@functools.cache
def _product() -> str:
    found = versions()
    return f"{found['redline-llm']} {found.get('commit', '')}"
