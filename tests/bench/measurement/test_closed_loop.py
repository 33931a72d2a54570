"""A closed loop as a load point; and a generator that is starved of its core."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BenchError
from bench.measurement.closed_loop import ClosedPoint, measure_closed_loop
from bench.measurement.load_point import LoadPoint, PointPlan, PointState
from bench.measurement.server import HttpServer
from bench.results import PointRecord, RunFiles
from bench.search.windows import TimeBudget, Timing
from bench.target import Target
from bench.target.metrics import MetricsReader
from bench.workloads import make_workload
from tests.bench.quiet_progress import QuietProgress

WORKLOAD = {"kind": "random", "input": 20, "output": 5}


def closed_point(url: str, budget: TimeBudget) -> ClosedPoint:
    workload = make_workload(WORKLOAD, 1000)
    return ClosedPoint(HttpServer(Target(url, "stub")), workload, "c", MetricsReader(url), 0, 0.1, budget.left_s)


def test_figures_and_files_of_a_closed_loop(queue_server: Any, tmp_path: Path) -> None:
    server = queue_server("--slots", "8", "--service", "0.1")
    budget, files = TimeBudget(60.0), RunFiles(tmp_path)
    row, requests = measure_closed_loop(closed_point(server.base_url, budget), files, QuietProgress(), 4, 24, budget)
    assert [r.status for r in requests] == ["ok"] * 24
    assert (row.phase, row.concurrency, row.requests, row.completed, row.failed) == ("closed", 4, 24, 24, 0)
    assert row.sustained is None
    assert row.running_max is None or row.running_max <= 4
    # Four at a time, each at least 0.1 s long.
    assert 5 < row.achieved_rate <= 40.5
    assert row.generator_us_per_chunk > 0
    probe, saved = files.read_points()
    assert (probe.phase, saved.phase, saved.concurrency) == ("probe", "closed", 4)
    assert saved.output_tok_s == pytest.approx(row.output_tok_s, rel=1e-4)
    assert len(files.read_requests(saved.point_id)) == 24


def test_it_shows_how_far_it_is(queue_server: Any, tmp_path: Path) -> None:
    class Watching(QuietProgress):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[str, int | None, int]] = []

        def point_started(self, plan: PointPlan) -> None:
            self.seen.append(("started", plan.requests, 0))

        def point_tick(self, plan: PointPlan, state: PointState) -> None:
            self.seen.append(("tick", plan.requests, state.finished))

        def point_finished(self, row: PointRecord) -> None:
            self.seen.append(("finished", row.requests, row.completed))

    server = queue_server("--slots", "4", "--service", "0.3")
    budget, progress = TimeBudget(60.0), Watching()
    measure_closed_loop(closed_point(server.base_url, budget), RunFiles(tmp_path), progress, 4, 12, budget)
    assert progress.seen[0] == ("started", 12, 0)
    assert progress.seen[-1] == ("finished", 12, 12)
    counts = [finished for kind, _, finished in progress.seen if kind == "tick"]
    assert counts == sorted(counts)
    assert counts[-1] == 12


def test_refused_requests_are_counted_and_leave_the_others(queue_server: Any, tmp_path: Path) -> None:
    server = queue_server("--slots", "8", "--service", "0.05", "--fail-from", "12")
    budget = TimeBudget(60.0)
    point = closed_point(server.base_url, budget)
    row, _ = measure_closed_loop(point, RunFiles(tmp_path), QuietProgress(), 4, 20, budget)
    assert (row.completed + row.failed, row.failures) == (20, f"http 429:{row.failed}")
    assert row.failed > 0


def test_a_server_that_refuses_everything(queue_server: Any, tmp_path: Path) -> None:
    server = queue_server("--fail-from", "1")
    budget = TimeBudget(60.0)
    point = closed_point(server.base_url, budget)
    with pytest.raises(BenchError, match=r"http 429 too many requests"):
        measure_closed_loop(point, RunFiles(tmp_path), QuietProgress(), 4, 20, budget)


def test_time_that_runs_out_leaves_an_invalid_point(queue_server: Any, tmp_path: Path) -> None:
    server = queue_server("--slots", "1", "--service", "0.5")
    budget = TimeBudget(3.0)
    point = closed_point(server.base_url, budget)
    row, requests = measure_closed_loop(point, RunFiles(tmp_path), QuietProgress(), 2, 50, budget)
    assert not row.valid
    assert "--max-minutes" in row.reason
    assert any(r.status == "ok" for r in requests)


@pytest.fixture
def hogged_core() -> Iterator[int]:
    """A core on which endless loops run: six, since beside two the delays are hardly above what counts as late."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("threads can't be pinned on this system")
    core = max(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    hogs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(6)]
    try:
        for hog in hogs:
            assert hog.stdout is not None
            hog.stdout.readline()
        yield core
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
            assert hog.stdout is not None
            hog.stdout.close()


def test_a_starved_generator_is_not_a_slow_server(queue_server: Any, hogged_core: int) -> None:
    server = queue_server("--slots", "64", "--service", "0.5")
    workload = make_workload({"kind": "random", "input": 20, "output": 25}, 1000)
    rows = []

    def measure() -> None:
        # Affinity and priority are the thread's own: the hogs get most of its core.
        os.sched_setaffinity(0, {hogged_core})
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        reader = MetricsReader(server.base_url)
        point = LoadPoint(HttpServer(Target(server.base_url, "stub")), workload, "c", reader, 0, 0.2, lambda: 60.0)
        plan = PointPlan(20.0, "fixed", 0, Timing(0.5, 3.0, 20.0), 0.5, cut_overload=False)
        rows.append(point.run(plan, lambda _: None)[0])

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    (row,) = rows
    assert (row.valid, row.sustained, row.binding) == (False, None, "client"), row
    assert "the load generator was the bottleneck" in row.reason
    assert "a core used by other processes" in row.reason
    assert row.generator_starved_share > row.generator_cpu_share
