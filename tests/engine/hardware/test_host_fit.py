"""Costs of a host that are found again from the latencies which they cause."""

import numpy as np
import pytest

from engine.hardware.host_fit import MeasuredLoad, fit_host, with_costs
from engine.hardware.loads import Latencies, TimedRequest, simulated_latencies
from engine.hardware.step_time import DecoderShape
from tests.engine.hardware.test_profile_file import description

SHAPE = DecoderShape(24, 576, 1536, 9, 3, 64, 49152)


def load(count: int, seed: int) -> list[TimedRequest]:
    times = np.sort(np.random.default_rng(seed).uniform(0, 3, count))
    return [TimedRequest(float(at), 48, 20) for at in times]


LOADS = [load(count, seed) for seed in (1, 2) for count in (3, 16)]


@pytest.mark.parametrize(("engine", "costs"), [("v1", (0.5, 60.0, 2.0, 4.0)), ("v0", (1.0, 90.0, 2.0, 6.0))])
def test_latencies_of_other_loads_are_predicted(engine: str, costs: tuple[float, ...]) -> None:
    true = with_costs(description(), engine, np.array(costs))
    measured = [MeasuredLoad(one, simulated_latencies(true, SHAPE, engine, one)) for one in LOADS]
    fitted = fit_host(description(), SHAPE, engine, measured)
    other = load(10, 3)
    expected, found = (simulated_latencies(hardware, SHAPE, engine, other) for hardware in (true, fitted))
    assert found.first_token == pytest.approx(expected.first_token, rel=0.05)
    assert found.per_token == pytest.approx(expected.per_token, rel=0.03)


def test_only_the_costs_of_that_engine_change_and_none_is_negative() -> None:
    hardware = description()
    fast = [MeasuredLoad(one, Latencies(1e-4, 1e-5)) for one in LOADS[:2]]
    fitted = fit_host(hardware, SHAPE, "v0", fast)
    assert fitted.host.v1 == hardware.host.v1
    costs = fitted.host.v0
    assert min(costs.step_ms, costs.request_us[1], costs.admitted_ms, costs.request_ms) >= 0
    assert costs.serial == 1
