"""What a server takes beside its device, from closed loops against one of known times."""

from typing import Any

import pytest

from bench.errors import BenchError
from bench.measurement import host_costs
from bench.measurement.host_costs import OUTPUT, HostTimes, measure_host
from bench.target import Target

SERVICE = 0.16  # seconds of a request, whatever its tokens


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_costs, "ARRIVE_S", (0.02, 0.4))


def measured(url: str, shown: list[int], device: float = 0.0) -> HostTimes:
    return measure_host(Target(url, "stub"), 1000, lambda _: device, lambda: device, (1, 4), 2, shown.append)


def test_times_of_the_device_are_taken_from_those_of_the_server(queue_server: Any) -> None:
    shown: list[int] = []
    times = measured(queue_server("--slots", "4", "--service", str(SERVICE)).base_url, shown, device=0.001)
    assert shown == [1, 2]
    assert set(times.steps) == {1, 4}
    for seconds in times.steps.values():
        assert seconds == pytest.approx(SERVICE / OUTPUT - 0.001, rel=0.5)
    assert SERVICE - 0.002 < times.first_token < 3 * SERVICE
    for arrivals in times.arrivals:
        at, outputs = zip(*arrivals.requests, strict=True)
        assert list(at) == sorted(at)
        assert outputs == (host_costs.STREAM_OUTPUT,) * host_costs.STREAMS + (1,) * host_costs.ARRIVING
        assert arrivals.first_token > SERVICE - 0.002


def test_a_request_that_fails_is_an_error(queue_server: Any) -> None:
    server = queue_server("--slots", "4", "--service", str(SERVICE), "--faults", "3=500")
    with pytest.raises(BenchError, match="a request of the profile failed: http 500"):
        measured(server.base_url, [])
