"""No load point finds another's prompts in a server's cache, and configurations are sent the same ones."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench.measurement.load_point import LoadPoint, PointPlan
from bench.measurement.server import HttpServer
from bench.results import PointRecord
from bench.search.windows import Timing
from bench.target import Target
from bench.target.metrics import MetricsReader
from bench.workloads import make_workload
from bench.workloads.encoding import server_encoder

pytestmark = pytest.mark.usefixtures("patient_generator")

STUB = Path(__file__).with_name("caching_server.py")
Start = Callable[[], tuple[str, Path]]


@pytest.fixture
def caching_server(tmp_path: Path) -> Iterator[Start]:
    """Starts a server with an empty cache; hands back its URL and the file of what it was sent."""
    from bench.target.server import ServerProcess

    with ExitStack() as stack:
        count = 0

        def start() -> tuple[str, Path]:
            nonlocal count
            count += 1
            record = tmp_path / f"record-{count}.jsonl"
            command = [sys.executable, str(STUB), "--port", "{port}", "--record", str(record)]
            server = stack.enter_context(ServerProcess(command, tmp_path / f"server-{count}.log", start_limit_s=60))
            return server.base_url, record

        yield start


def rows_at(url: str, spec: dict[str, Any], rates: list[float], configuration: str = "c") -> list[PointRecord]:
    """One load point of half a second for each rate."""
    workload = make_workload(spec, 30_000, server_encoder(Target(url, "stub")))
    found = []
    with MetricsReader(url) as reader:
        point = LoadPoint(HttpServer(Target(url, "stub")), workload, configuration, reader, 7, 0.2, lambda: 60.0)
        for rate in rates:
            repeat = rates[: len(found)].count(rate)
            row, requests, _ = point.run(
                PointPlan(rate, "fixed", repeat, Timing(0.1, 0.5, 2.0), 0.1, cut_overload=False), lambda _: None
            )
            assert [r.status for r in requests if r.in_window] == ["ok"] * row.requests
            assert row.requests == round(rate / 2)
            found.append(row)
    return found


def recorded(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def spec_of(kind: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    if kind == "visionarena":
        return {"kind": kind, "dataset": "vision-sample", "output": 2}
    if kind == "random":
        return {"kind": kind, "input": [20, 60], "output": 2}
    return {"kind": kind, "dataset": str(request.getfixturevalue(kind))}


@pytest.mark.parametrize("kind", ["random", "sharegpt", "jsonl", "visionarena"])
def test_rates_and_repeats_do_not_hit_each_other(
    kind: str, caching_server: Start, request: pytest.FixtureRequest
) -> None:
    url, record = caching_server()
    rows = rows_at(url, spec_of(kind, request), [24.0, 40.0, 24.0])
    # Rows of a data set that comes round again within a point are salted anew, so nothing is found there either; what
    # is found of the sample are the three pictures about which it has two questions.
    most = 0.16 if kind == "visionarena" else 0.0
    for row in rows:
        assert row.prefix_hit_rate is not None
        assert row.prefix_hit_rate <= most
    sent = recorded(record)
    assert len({row["sha"] for row in sent}) == len(sent)
    pictures = [picture for row in sent for picture in row["pictures"]]
    if kind == "visionarena":
        assert {row["path"] for row in sent} == {"/v1/chat/completions"}
        assert {(p["type"], p["format"]) for p in pictures} == {("data:image/jpeg", "JPEG")}
        assert len(pictures) == len(sent)
    else:
        assert not pictures


def test_a_cache_that_is_hit_shows_in_the_point(caching_server: Start, request: pytest.FixtureRequest) -> None:
    url, _ = caching_server()
    spec = spec_of("sharegpt", request) | {"fresh": False}
    first, second = rows_at(url, spec, [72.0, 40.0])
    assert second.prefix_hit_rate is not None
    assert first.prefix_hit_rate is not None
    assert second.prefix_hit_rate > 0.6 > first.prefix_hit_rate


def test_multi_turn_hits_its_history_and_no_other_rate_does(caching_server: Start) -> None:
    url, _ = caching_server()
    spec = {"kind": "multi-turn", "input": 128, "output": 32, "turns": 4, "conversations": 2}
    rows = rows_at(url, spec, [48.0, 32.0])
    # Of 4 turns with 128, 288, 448 and 608 tokens all but the newest 160 (the first time 128) were sent before: 58 %.
    for row in rows:
        assert row.prefix_hit_rate == pytest.approx(0.58, abs=0.12)


def test_configurations_are_sent_the_same_requests(caching_server: Start, request: pytest.FixtureRequest) -> None:
    records = []
    for configuration in ("caching on", "caching off"):
        url, record = caching_server()
        rows_at(url, spec_of("visionarena", request), [30.0, 20.0], configuration)
        records.append({row["sha"] for row in recorded(record)})
    # How many requests follow the window, to keep up the load, depends on when its last answer comes.
    assert len(records[0] & records[1]) >= 25  # the windows alone
    assert len(records[0] ^ records[1]) <= 10
