import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd

from bench.measurement.run import BenchOptions, Subject, measure_configuration
from bench.measurement.server import HttpServer
from bench.results import Answer, GeneratorRecord, RunFiles, ServerState, Summary
from bench.target import Target
from bench.target.server import ServerProcess
from bench.workloads import make_workload
from tests.bench.quiet_progress import QuietProgress
from tests.bench.records import plain_point, plain_request
from tests.plots.made import Server, make_point


def test_readings_come_back_as_they_were_written(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    point, requests = make_point(Server(4.0), "c", "w", 2.0, "fixed", 5)
    readings = [ServerState(at_s=i / 2, running=float(i), waiting=0.0) for i in range(4)]
    files.add_point(point, requests, readings)
    frame = files.read_metrics(point.point_id)
    assert frame is not None
    assert frame["at_s"].tolist() == [0.0, 0.5, 1.0, 1.5]
    assert frame["running"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert frame["kv_use"].isna().all()
    assert set(frame.dtypes.astype(str)) == {"float64"}
    assert not list(tmp_path.glob("**/*.part"))


def test_a_point_measured_again_does_not_keep_old_readings(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    point, requests = make_point(Server(4.0), "c", "w", 2.0, "fixed", 5)
    files.add_point(point, requests, [ServerState(at_s=0.0, running=1.0)])
    files.add_point(replace(point, preemptions=None), requests)
    assert files.read_metrics(point.point_id) is None
    assert len(files.read_points()) == 1


def test_a_run_keeps_what_the_server_said_during_each_point(
    queue_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    server, files = queue_server("--slots", "2", "--service", "0.1"), RunFiles(tmp_path)
    workload = make_workload({"kind": "random", "input": 20, "output": 5}, 1000)
    options = BenchOptions(precision=0.2, rates=[10.0, 40.0], window_s=1.5)
    measure_configuration(
        Subject(HttpServer(Target(server.base_url, "stub")), workload, "c", options, files, QuietProgress())
    )
    points = [p for p in files.read_points() if p.phase == "fixed"]
    assert len(points) == 2
    for point in points:
        frame = files.read_metrics(point.point_id)
        assert frame is not None
        end_s = point.warmup_s + point.window_s
        # From before the first request to the end of the drain, on the clock of the requests.
        assert frame["at_s"].iloc[0] <= 0.5
        assert frame["at_s"].iloc[-1] >= end_s
        assert frame["at_s"].is_monotonic_increasing
        assert frame["running"].max() <= 2
        assert ((frame["running"] + frame["waiting"] == 0) & (frame["at_s"] >= end_s)).any(), "the drain is in it"
        inside = frame[(frame["at_s"] >= point.warmup_s) & (frame["at_s"] <= end_s)]
        assert inside["waiting"].max() <= (point.waiting_max or 0)


def test_a_summary_says_what_ran(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.write_summary(Summary("t", 3, {"c": {"resolved": {"w": {"block_size": "16"}}}}, {"w": {}}))
    summary = files.read_summary()
    assert summary.configurations["c"]["resolved"]["w"] == {"block_size": "16"}
    assert {"python", "redline-llm", "torch", "numpy"} <= set(summary.versions)
    assert {"cpu", "cores", "memory_gib", "system"} <= set(summary.hardware)
    assert summary.seed == 3


def test_files_of_before_there_were_undecided_verdicts_are_read(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    point, requests = make_point(Server(4.0), "c", "w", 2.0, "fixed", 5)
    files.add_point(replace(point, itl_p99_high_ms=math.inf, verdict="undecided", sustained=None), requests)
    (newer,) = files.read_points()
    assert (newer.undecided, newer.itl_p99_high_ms) == (True, math.inf)
    frame = pd.read_csv(tmp_path / "points.csv").drop(columns=["verdict", "ttft_trend", "itl_steps"])
    frame.to_csv(tmp_path / "points.csv", index=False)
    (older,) = files.read_points()
    assert (older.verdict, older.undecided, older.itl_steps, older.ttft_trend) == ("", False, 0, None)
    summary = Summary("t", 0, {"c": {}}, {"w": {}}, answers=[Answer("c", "w", 2.0, 1.9, 2.2, True, False, "compute")])
    files.write_summary(summary)
    data = json.loads((tmp_path / "summary.json").read_text())
    del data["answers"][0]["undecided"]
    (tmp_path / "summary.json").write_text(json.dumps(data))
    assert files.read_summary().answers[0].undecided is None


def test_requests_of_before_there_were_generators_are_read(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    rows = [plain_request(index=index, generator=f"host{index}:7070") for index in range(2)]
    files.add_point(plain_point(), rows)
    assert files.read_requests("p")["generator"].tolist() == ["host0:7070", "host1:7070"]
    path = files.requests_path("p")
    pd.read_parquet(path).drop(columns=["generator", "error"]).to_parquet(path)
    older = files.read_requests("p")
    assert older["generator"].tolist() == older["error"].tolist() == ["", ""]
    assert older["ttft_s"].tolist() == [row.ttft_s for row in rows]


def generator(point_id: str, name: str, **fields: object) -> GeneratorRecord:
    plain: dict[str, object] = {
        "requests": 9, "sent": 8, "lateness_p99_ms": 0.25, "loop_lag_p99_ms": 0.125, "processes": 2, "cpu_s": 1.5,
        "cpu_share": 0.5, "starved_share": 0.0, "us_per_chunk": 12.5, "clock_offset_ms": -3.5, "clock_drift_ms": 0.5,
        "clock_error_ms": 0.75, "lost": False,
    }  # fmt: skip
    return GeneratorRecord(point_id, name, **(plain | fields))  # type: ignore[arg-type]


def test_generators_come_back_as_they_were_written(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.add_point(plain_point(point_id="alone"), [])
    assert files.read_generators() == []
    assert not (tmp_path / "generators.csv").exists()
    unknown = dict.fromkeys(("processes", "cpu_s", "cpu_share", "starved_share", "us_per_chunk", "clock_drift_ms"))
    lost = generator("b", "h2:1", sent=0, lateness_p99_ms=None, loop_lag_p99_ms=None, lost=True, **unknown)
    first, second = generator("a", "h1:1"), generator("b", "h1:1")
    files.add_point(plain_point(point_id="a"), [], generators=[first])
    files.add_point(plain_point(point_id="b"), [], generators=[second, lost])
    assert files.read_generators() == [first, second, lost]
    again = generator("a", "h3:1", requests=1)
    files.add_point(plain_point(point_id="a"), [], generators=[again])
    assert files.read_generators() == [second, lost, again]
    files.add_point(plain_point(point_id="b"), [])
    assert files.read_generators() == [again]
