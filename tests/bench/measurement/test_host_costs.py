"""Loads on a server of known times."""

from typing import Any

import pytest

from bench.errors import BenchError
from bench.measurement import host_costs
from bench.measurement.host_costs import FEWEST, OUTPUT, ServedLoad, measure_loads
from bench.target import Target

SERVICE = 0.16  # seconds of a request, whatever its tokens


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_costs, "ARRIVE_S", 0.5)


def measured(url: str, shown: list[int], speed: float = 1.0) -> list[ServedLoad]:
    return measure_loads(Target(url, "stub"), 1000, (1.0, 20.0), 2, lambda: speed, shown.append)


def test_loads_have_the_latencies_of_the_server_in_rounds(queue_server: Any) -> None:
    shown: list[int] = []
    loads = measured(queue_server("--slots", "32", "--service", str(SERVICE)).base_url, shown)
    assert shown == [1, 2]
    assert [len(one.at) for one in loads] == [FEWEST, 10, FEWEST, 10]
    assert loads[0].at != loads[2].at
    for one in loads:
        assert list(one.at) == sorted(one.at)
        assert len(one.at) == len(one.first_token) == len(one.per_token)
        assert min(one.first_token) + OUTPUT * min(one.per_token) > 0.9 * SERVICE


def test_times_of_a_slow_moment_are_made_shorter(queue_server: Any) -> None:
    url = queue_server("--slots", "32", "--service", str(SERVICE)).base_url
    (slow, *_), (load, *_) = (measured(url, [], speed) for speed in (0.01, 1.0))
    assert max(slow.first_token) < min(load.first_token)
    assert slow.at == load.at


def test_a_request_that_fails_is_an_error(queue_server: Any) -> None:
    server = queue_server("--slots", "4", "--service", str(SERVICE), "--faults", "7=500")
    with pytest.raises(BenchError, match="a request of the profile failed: http 500"):
        measured(server.base_url, [])
