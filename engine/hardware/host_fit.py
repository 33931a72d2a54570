"""Fits the costs of an engine's processes to latencies of loads that were measured on the cores of its device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from engine.hardware.description import Hardware, HostCosts
from engine.hardware.device_fit import SOURCE
from engine.hardware.least_squares import Floats, nonnegative_least_squares
from engine.hardware.loads import Latencies, TimedRequest, simulated_latencies
from engine.hardware.step_time import DecoderShape

# Fitted: milliseconds of a step, microseconds of each of its requests, milliseconds of a step for each request that it
# begins, and milliseconds of a request on its way.
START = (1.0, 30.0, 1.0, 3.0)
DIFFERENCES = (0.4, 20.0, 0.5, 1.5)  # for the derivatives; smaller ones would show single requests
HOLD = 0.02  # weight of the distance to the values before, in DIFFERENCES: what loads don't tell apart stays
ROUNDS, LEAST_GAIN = 6, 0.02  # at most; and of the squares, below which a further one is not worth its time


@dataclass(frozen=True, slots=True)
class MeasuredLoad:
    """Requests by time, and the latencies that a client measured."""

    requests: Sequence[TimedRequest]
    latencies: Latencies


def fit_host(hardware: Hardware, shape: DecoderShape, engine: str, loads: Sequence[MeasuredLoad]) -> Hardware:
    """The hardware with costs of an engine that minimize the squares of the relative errors of both latencies.

    The processes run on the cores of the device, so that all of their time delays its steps. Gauss-Newton steps with
    derivatives of simulations, while they help.

    Args:
        hardware: described but for these costs.
        shape: of the model that was served.
        engine: v1 or v0.
        loads: two or more, that differ in the number of requests at a time.
    """
    measured = np.log([[one.latencies.first_token, one.latencies.per_token] for one in loads]).ravel()

    def errors(costs: Floats) -> Floats:
        changed = with_costs(hardware, engine, costs)
        found = [simulated_latencies(changed, shape, engine, one.requests) for one in loads]
        return np.log([[one.first_token, one.per_token] for one in found]).ravel() - measured

    steps = np.array(DIFFERENCES)
    costs = np.array(START)
    best, best_costs = np.inf, costs
    for _ in range(ROUNDS):
        now = errors(costs)
        before, size = best, float(now @ now)
        if size < best:
            best, best_costs = size, costs
        if size > (1 - LEAST_GAIN) * before:
            break
        slopes = np.stack([(errors(costs + one) - now) / step for one, step in zip(np.diag(steps), steps, strict=True)])
        matrix = np.vstack((slopes.T, HOLD * np.diag(1 / steps)))
        costs = nonnegative_least_squares(matrix, np.concatenate((slopes.T @ costs - now, HOLD * costs / steps)))
    return with_costs(hardware, engine, best_costs)


def with_costs(hardware: Hardware, engine: str, costs: Floats) -> Hardware:
    """The hardware with these costs of an engine, in the order of START."""
    step_ms, request_us, admitted_ms, request_ms = costs.tolist()
    host = HostCosts(
        SOURCE, step_ms=step_ms, request_us={1: request_us}, serial=1, request_ms=request_ms, admitted_ms=admitted_ms
    )
    return replace(hardware, host=replace(hardware.host, **{engine: host}))
