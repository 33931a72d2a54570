"""Whole measurements in virtual time: the real search, criteria and files."""

from pathlib import Path

import pytest

from bench.measurement.closed_loop import ClosedPoint, measure_closed_loop
from bench.measurement.run import BenchOptions, Subject, measure_configuration
from bench.measurement.server import ServerUnderTest
from bench.results import Answer, RunFiles
from bench.search.windows import TimeBudget
from bench.simulation import SimulatedServer
from bench.workloads import make_workload
from tests.bench.quiet_progress import QuietProgress
from tests.simulated_server import SLOTS, simulation

WORKLOAD = make_workload({"kind": "random", "input": [50, 150], "output": [20, 60]}, 1000)


def search(folder: Path, **options: object) -> tuple[Answer, RunFiles, QuietProgress]:
    server: ServerUnderTest = SimulatedServer(simulation(**options), "NVIDIA H100")  # type: ignore[arg-type]
    files, progress = RunFiles(folder), QuietProgress()
    chosen = BenchOptions(precision=0.2, max_minutes=600)
    answer = measure_configuration(Subject(server, WORKLOAD, "v1", chosen, files, progress))
    assert answer is not None
    return answer, files, progress


@pytest.fixture(scope="module")
def plenty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answer, RunFiles, QuietProgress]:
    return search(tmp_path_factory.mktemp("plenty"))


def test_the_search_finds_the_capacity_and_writes_the_same_bytes_each_time(
    plenty: tuple[Answer, RunFiles, QuietProgress], tmp_path: Path
) -> None:
    answer, files, progress = plenty
    assert answer.rate is not None
    assert answer.confirmed
    assert not answer.provisional
    assert answer.binding in ("batch slots", "compute")
    points = files.read_points()
    assert {p.phase for p in points} == {"probe", "search", "confirm", "ladder"}
    assert all(p.valid for p in points)
    top = max(p.output_tok_s for p in points)
    assert answer.rate == pytest.approx(top / 40, rel=0.25)  # outputs have 40 tokens on average
    assert any("of virtual time" in message for message in progress.messages)
    again, other, _ = search(tmp_path / "second")
    assert again == answer
    assert (other.folder / "points.csv").read_bytes() == (files.folder / "points.csv").read_bytes()
    for point in points:
        assert files.read_requests(point.point_id).equals(other.read_requests(point.point_id))


def test_few_blocks_lower_the_rate_and_are_named_as_the_cause(
    plenty: tuple[Answer, RunFiles, QuietProgress], tmp_path: Path
) -> None:
    scarce, files, _ = search(tmp_path / "scarce", num_blocks=120)
    assert plenty[0].rate is not None
    assert scarce.rate is not None
    assert scarce.rate < plenty[0].rate
    assert scarce.binding == "KV cache"
    assert any(p.preemptions for p in files.read_points())


def test_a_closed_loop_in_virtual_time(tmp_path: Path) -> None:
    server, files = SimulatedServer(simulation(), "NVIDIA H100"), RunFiles(tmp_path)
    budget = TimeBudget(3600.0, server.now)
    point = ClosedPoint(server, WORKLOAD, "v1", server.open_reader(), 0, 0.1, budget.left_s)
    record, requests = measure_closed_loop(point, files, QuietProgress(), SLOTS, 128, budget)
    assert (record.valid, record.completed, record.concurrency) == (True, 128, SLOTS)
    assert record.running_max is not None
    assert SLOTS - 4 <= record.running_max <= SLOTS
    assert (record.others_cpu_share, record.generator_cpu_share, record.lateness_p99_ms) == (None, 0.0, 0.0)
    assert record.started.startswith("1970-01-01T00:00:")
    assert len(requests) == 128


def test_a_time_limit_counts_virtual_minutes(tmp_path: Path) -> None:
    server, files, progress = SimulatedServer(simulation(), "NVIDIA H100"), RunFiles(tmp_path), QuietProgress()
    options = BenchOptions(precision=0.05, max_minutes=0.5, rates=[5.0, 10.0])
    measure_configuration(Subject(server, WORKLOAD, "v1", options, files, progress))
    assert server.now() == pytest.approx(30, abs=15)
    assert all(p.provisional for p in files.read_points() if p.phase == "fixed")
