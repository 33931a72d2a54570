"""Latencies of a load on described hardware."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.errors import ConfigError
from engine.hardware.loads import TimedRequest, middle_mean, resolved_config, simulated_latencies
from engine.hardware.step_time import DecoderShape, StepTime, StepWork
from tests.engine.hardware.test_profile_file import description

SHAPE = DecoderShape(24, 576, 1536, 9, 3, 64, 49152)
FEW = [TimedRequest(0.2 * number, 16, 20) for number in range(8)]


@pytest.mark.parametrize("engine", ["v1", "v0"])
def test_a_request_alone_takes_its_steps_and_the_host(engine: str) -> None:
    hardware = description()
    costs = hardware.host.of(engine)
    device = StepTime(hardware, SHAPE)
    found = simulated_latencies(hardware, SHAPE, engine, [TimedRequest(1.0, 16, 2)])
    first = device.seconds(StepWork(chunks=[(16, 0)], sampled=1)) + costs.step_seconds(1, 1)
    assert found.first_token == pytest.approx(first + (costs.admitted_ms + costs.request_ms) * 1e-3)
    second, host = device.seconds(StepWork(decodes=1, context=17, sampled=1)), costs.step_seconds(1, 1)
    assert found.per_token == pytest.approx((max(second, host) if engine == "v1" else second) + host)


def test_among_others_both_latencies_are_longer() -> None:
    hardware = description()
    alone, among = (simulated_latencies(hardware, SHAPE, "v1", load) for load in (FEW[:1], [*FEW, *FEW, *FEW]))
    assert among.first_token > alone.first_token
    assert among.per_token > alone.per_token


def test_the_same_load_has_the_same_latencies() -> None:
    hardware = description()
    assert simulated_latencies(hardware, SHAPE, "v1", FEW) == simulated_latencies(hardware, SHAPE, "v1", FEW)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=30))
def test_a_middle_mean_lies_between_the_quartiles(values: list[float]) -> None:
    ordered = sorted(values)
    cut = len(ordered) // 4
    found = middle_mean(values)
    assert ordered[cut] - 1e-9 <= found <= ordered[len(ordered) - 1 - cut] + 1e-9


def test_hardware_that_was_not_measured_has_no_server_to_compare_with() -> None:
    with pytest.raises(ConfigError, match="has no defaults: only a profiled machine"):
        resolved_config(replace(description(), defaults=None), "v1", FEW)
