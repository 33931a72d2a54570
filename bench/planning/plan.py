"""Makes a plan: examines every candidate, in several processes, and keeps what is done on disk."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.errors import BenchError
from bench.planning.options import Candidate, Wanted
from bench.planning.replica import Found, examine
from bench.planning.rows import PLAN_FILE, Row, read_rows, with_price, write_plan
from bench.results import FLAG, SUMMARY_FILE, RunFiles, Summary
from bench.results.environment import versions
from bench.results.writing import check_folder
from bench.simulation.processes import run_all
from bench.workloads import ANY_VOCABULARY, make_workload
from engine.hardware.accuracy import description_version
from engine.simulation import Simulate


def make_plan(
    wanted: Wanted,
    candidates: Sequence[Candidate],
    simulate: Simulate,
    show: Callable[[Candidate, str], None],
    *,
    folder: Path | None = None,
    processes: int = 1,
) -> Iterator[Row]:
    """The rows as they are found; those that `folder` has from an interrupted run come first.

    Args:
        simulate: makes engines; it is called in other processes, so it must be a function of a module.
        show: called with the state of a candidate, in a few words.
        folder: for plan.json, plan.csv and the load points; None: nothing is written.
        processes: at most.

    Raises BenchError if the folder has another plan, CannotWriteError, KeyboardInterrupt.
    """
    kept = _Folder(wanted, folder)
    known = {(row.hardware, row.tp): row for row in kept.rows}
    for candidate in candidates:
        if (row := known.get((candidate.hardware, candidate.tp))) is not None:
            yield with_price(row, wanted.prices.get(row.hardware))
    left = [one for one in candidates if (one.hardware, one.tp) not in known]
    jobs = [(candidate, wanted, simulate) for candidate in left]
    results = run_all(examine, jobs, processes, lambda number, text: show(left[number], text)) if jobs else ()
    for _, found in results:
        kept.add(found)
        yield with_price(found.row, wanted.prices.get(found.row.hardware))


class _Folder:
    """What a plan has on disk so far: its rows, and beside them the result files that `redline report` draws."""

    def __init__(self, wanted: Wanted, path: Path | None):
        self._wanted, self._path = wanted, path
        self._digest = wanted.digest(_product())
        self.rows: list[Row] = []
        if path is None:
            return
        check_folder(path, FLAG)
        if (path / SUMMARY_FILE).exists() and not (path / PLAN_FILE).exists():
            raise BenchError(f"{path} contains other results: choose another folder with --out")
        found = read_rows(path, self._digest)
        self.rows = [row for row in found if row.description == description_version(row.hardware)]

    def add(self, found: Found) -> None:
        self.rows.append(found.row)
        if self._path is None:
            return
        rows = [with_price(row, self._wanted.prices.get(row.hardware)) for row in self.rows]
        write_plan(self._path, self._digest, dataclasses.asdict(self._wanted), rows)
        self._add_results(found, RunFiles(self._path))

    def _add_results(self, found: Found, files: RunFiles) -> None:
        name = Candidate(found.row.hardware, found.row.tp).name
        summary = self._summary(files)
        others = {one: details for one, details in summary.configurations.items() if one != name}
        mine = {name: found.described} if found.described is not None else {}
        summary.configurations = dict(sorted((others | mine).items()))
        answers = [answer for answer in summary.answers if answer.configuration != name]
        answers += [found.answer] if found.answer is not None else []
        summary.answers = sorted(answers, key=lambda answer: answer.configuration)
        points = [point for point in files.read_points() if point.configuration != name] + found.points
        files.write_points(sorted(points, key=lambda point: point.configuration))
        files.write_summary(summary)

    def _summary(self, files: RunFiles) -> Summary:
        if (files.folder / SUMMARY_FILE).exists():
            return files.read_summary()
        workload = make_workload(self._wanted.workload, ANY_VOCABULARY)
        title = f"{workload.name} on {self._wanted.model}"
        return Summary(title, self._wanted.seed, {}, {workload.name: workload.describe()})


@functools.cache
def _product() -> str:
    found = versions()
    return f"{found['redline-llm']} {found.get('commit', '')}"
