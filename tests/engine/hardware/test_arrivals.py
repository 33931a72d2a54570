"""First tokens of requests that arrive while others decode."""

import pytest
from msgspec.structs import replace

from engine.hardware.arrivals import ArrivingRequest, median_first_token
from engine.hardware.description import read_hardware
from engine.hardware.profile_file import MeasuredArrivals, with_request_latency
from engine.hardware.step_time import DecoderShape, StepTime, StepWork
from tests.engine.hardware.test_profile_file import description

SHAPE = DecoderShape(24, 576, 1536, 9, 3, 64, 49152)
STREAMS = [ArrivingRequest(0.0, 16, 200)] * 3
LATE = [ArrivingRequest(0.1 + 0.03 * number, 16, 1) for number in range(10)]


@pytest.mark.parametrize("engine", ["v1", "v0"])
def test_a_request_alone_takes_its_step_and_the_host(engine: str) -> None:
    hardware = description()
    costs = getattr(hardware.host, engine)
    expected = StepTime(hardware, SHAPE).seconds(StepWork(chunks=[(16, 0)], sampled=1))
    expected += costs.step_seconds(1, 1) + costs.admitted_ms * 1e-3
    assert median_first_token(hardware, SHAPE, engine, [ArrivingRequest(1.0, 16, 1)]) == pytest.approx(expected)


def test_among_others_it_waits_for_a_step() -> None:
    hardware = description()
    alone = median_first_token(hardware, SHAPE, "v1", [ArrivingRequest(0.0, 16, 1)])
    assert median_first_token(hardware, SHAPE, "v1", [*STREAMS, *LATE]) > alone


def test_what_measured_first_tokens_take_longer_is_the_latency_of_a_request() -> None:
    hardware = description()
    requests = [*STREAMS, *LATE]
    found = median_first_token(hardware, SHAPE, "v1", requests)
    slow, fast = (MeasuredArrivals(requests, found + more) for more in (0.005, 0.003))
    changed = with_request_latency(hardware, SHAPE, "v1", [slow, fast])
    assert changed.host.v1.request_ms == pytest.approx(4)
    assert changed.host.v0 == hardware.host.v0
    assert replace(changed, host=hardware.host) == hardware
    assert with_request_latency(hardware, SHAPE, "v0", [MeasuredArrivals(requests, 0.0)]).host.v0.request_ms == 0


def test_hardware_that_was_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="only a description that was measured"):
        median_first_token(read_hardware("h100"), SHAPE, "v1", LATE)
