from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.measurement.load_point import PointPlan
from bench.measurement.run import BenchOptions, LostServerError, Subject, measure_configuration, measure_ladder
from bench.measurement.server import HttpServer
from bench.results import Answer, PointRecord, RunFiles
from bench.target import Target
from bench.target.server import ServerProcess
from bench.workloads import Workload, make_workload
from tests.bench.quiet_progress import QuietProgress

pytestmark = pytest.mark.usefixtures("patient_generator")

Start = Callable[..., ServerProcess]
SHORT: Workload = make_workload({"kind": "random", "input": 20, "output": 5}, 1000)


class Counting(QuietProgress):
    """Remembers the points that were really run."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[tuple[str, float]] = []

    def point_started(self, plan: PointPlan) -> None:
        self.started.append((plan.phase, plan.rate))


def measure(
    server: ServerProcess, folder: Path, finished: list[PointRecord] | None = None, **options: object
) -> tuple[Answer | None, list[PointRecord], Counting]:
    progress, files = Counting(), RunFiles(folder)
    chosen = BenchOptions(**({"precision": 0.2, "max_minutes": 2.0} | options))  # type: ignore[arg-type]
    subject = Subject(HttpServer(Target(server.base_url, "stub")), SHORT, "c", chosen, files, progress)
    answer = measure_configuration(subject, finished or [])
    return answer, files.read_points(), progress


def test_the_search_finds_the_capacity_of_a_real_queue_and_resumes_without_measuring_again(
    queue_server: Start, tmp_path: Path
) -> None:
    server = queue_server("--slots", "4", "--service", "0.05")  # 80 requests/s
    find = partial(measure, precision=0.45)  # how close it comes is shown by tests/perf/bench_search.py
    answer, points, progress = find(server, tmp_path, ladder=False)
    assert answer is not None
    assert answer.rate is not None
    assert 80 / 1.8 < answer.rate < 80 * 1.4
    assert answer.confirmed
    assert answer.low < answer.rate
    assert points[0].phase == "probe"
    assert {p.phase for p in points} == {"probe", "search", "confirm"}
    assert len(progress.started) == len(points) - 1
    assert any("plan: search from" in m and "at most 2 min" in m for m in progress.messages)
    files = RunFiles(tmp_path)
    for point in points:
        frame = files.read_requests(point.point_id)
        assert int(frame["in_window"].sum()) == point.requests
    assert len({(p.rate, p.seed) for p in points}) == len(points)

    again, _, resumed = find(server, tmp_path, points, ladder=False)
    assert again is not None
    assert again.line() == answer.line()
    assert resumed.started == []
    lost = points[:-1]
    assert points[-1].phase == "confirm"
    _, _, resumed = find(server, tmp_path, lost, ladder=False)
    assert resumed.started[0] == ("confirm", points[-1].rate)


def test_given_rates_without_a_metrics_page(queue_server: Start, tmp_path: Path) -> None:
    server = queue_server("--slots", "4", "--service", "0.1", "--no-metrics")
    answer, points, progress = measure(server, tmp_path, rates=[10.0, 80.0], window_s=1.0)
    assert answer is not None
    assert (answer.rate, answer.high, answer.confirmed) == (10.0, 80.0, False)
    assert answer.provisional
    assert any("no /metrics with known" in m for m in progress.messages)
    assert [(p.phase, p.rate, p.sustained) for p in points[1:]] == [("fixed", 10.0, True), ("fixed", 80.0, False)]
    assert points[1].preemptions is None
    assert "no preemption counter" in points[1].reason


def test_preemptions_make_a_rate_unsustained(queue_server: Start, tmp_path: Path) -> None:
    server = queue_server("--slots", "8", "--service", "0.1", "--preempt-above", "3")
    answer, points, _ = measure(server, tmp_path, rates=[60.0], window_s=1.0)
    assert answer is not None
    assert (answer.rate, answer.binding) == (None, "KV cache")
    assert (points[-1].preemptions or 0) > 0
    assert points[-1].sustained is False


def test_outputs_of_another_length_make_points_invalid(queue_server: Start, tmp_path: Path) -> None:
    answer, points, progress = measure(queue_server("--short"), tmp_path, rates=[5.0], window_s=1.0)
    assert answer is None
    assert any("received 2 of 5 requested tokens" in m for m in progress.messages)
    assert (points[-1].valid, points[-1].sustained) == (False, None)
    assert "requested length" in points[-1].reason


def test_failures_are_counted_by_kind(queue_server: Start, tmp_path: Path) -> None:
    server = queue_server("--faults", "5=500,6=malformed,7=cut", "--fail-from", "12")
    _, points, _ = measure(server, tmp_path, rates=[20.0], window_s=1.0)
    point = points[-1]
    assert (point.valid, point.sustained) == (True, False)
    counts = dict(part.rsplit(":", 1) for part in point.failures.split(";"))
    assert {kind: counts[kind] for kind in ("connection", "http 500", "malformed stream")} == dict.fromkeys(
        ("connection", "http 500", "malformed stream"), "1"
    )
    frame = RunFiles(tmp_path).read_requests(point.point_id)
    assert int(counts["http 429"]) == (frame["status"] == "http 429").sum() > 3
    assert point.failed == (~frame[frame["in_window"]]["status"].isin(["ok", "cut short"])).sum()
    assert f"{counts['http 429']} × http 429" in point.failure_text()
    assert point.failed_requests() == (~frame["status"].isin(["ok", "cut short"])).sum()
    assert "too many requests" in set(frame["error"])
    assert not points[0].failures


def test_a_server_that_dies_ends_the_run_with_what_was_measured(queue_server: Start, tmp_path: Path) -> None:
    server = queue_server("--exit-from", "25")
    with pytest.raises(LostServerError, match="stopped answering at 40 req/s") as caught:
        measure(server, tmp_path, rates=[10.0, 40.0, 60.0], window_s=1.0)
    assert caught.value.answer is not None
    assert caught.value.answer.rate == 10.0
    points = [p for p in RunFiles(tmp_path).read_points() if p.phase == "fixed"]
    assert [p.rate for p in points] == [10.0, 40.0]
    assert points[1].failures.startswith("connection:")


def test_a_failing_probe_is_one_clear_line(queue_server: Start, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="failed with http 429: too many requests"):
        measure(queue_server("--fail-from", "1"), tmp_path)
    (probe,) = RunFiles(tmp_path).read_points()
    assert (probe.phase, probe.valid, probe.failures) == ("probe", False, "http 429:1")


def test_time_out_reports_the_bracket(queue_server: Start, tmp_path: Path) -> None:
    answer, points, _ = measure(queue_server(), tmp_path, max_minutes=0.15, precision=0.02)
    assert answer is not None
    assert answer.rate is not None
    assert answer.provisional
    assert sum(p.warmup_s + p.window_s for p in points if p.phase != "probe") < 9


def test_a_ladder_alone_at_given_rates(queue_server: Start, tmp_path: Path) -> None:
    server, files = queue_server("--slots", "4", "--service", "0.1"), RunFiles(tmp_path)
    options = BenchOptions(precision=0.2, ladder_rates=[10.0, 80.0], window_s=1.0)
    subject = Subject(HttpServer(Target(server.base_url, "stub")), SHORT, "c", options, files, QuietProgress())
    rows = measure_ladder(subject)
    assert [(r.phase, r.rate, r.sustained) for r in rows] == [("ladder", 10.0, True), ("ladder", 80.0, False)]
    assert rows[1].window_s == pytest.approx(1.0)  # overloaded, and yet not cut
    kept = files.read_points()
    progress = Counting()
    again = measure_ladder(replace(subject, progress=progress), kept)
    assert [r.point_id for r in again] == [r.point_id for r in rows]
    assert progress.started == []


def test_a_latency_limit_narrows_what_counts_as_sustained(queue_server: Start, tmp_path: Path) -> None:
    server = queue_server("--slots", "4", "--service", "0.1")
    answer, points, _ = measure(
        server, tmp_path, rates=[10.0], window_s=1.0, limits={"e2e_p50_ms": 50.0, "ttft_p99_ms": 2000.0}
    )
    assert answer is not None
    assert (answer.rate, answer.binding) == (None, "latency limit")
    assert "e2e_p50_ms" in points[-1].reason
    assert points[-1].goodput == 0.0
