"""Results of simulated steps arrive when they are due, from a thread that sleeps meanwhile."""

import threading
import time
from typing import Any

import pytest

from engine.clock import MonotonicClock
from engine.columns import column
from engine.errors import RequestError
from engine.hardware.description import read_hardware
from engine.hardware.executor import SimulatedExecutor, SimulatedHost
from engine.hardware.real_time import RealTimeExecutor
from engine.hardware.step_time import DecoderShape, StepTime
from engine.messages import Sampling, SlotAssignment, StepMessage, decode_result, encode

H100 = read_hardware("h100")
SHAPE = DecoderShape(32, 4096, 14336, 32, 8, 128, 1000)


def make() -> RealTimeExecutor:
    clock = MonotonicClock()
    host = SimulatedHost(H100.host.v1, 1, overlaps=True)
    return RealTimeExecutor(SimulatedExecutor(clock, StepTime(H100, SHAPE), host, 4, 1000), clock)


def assignment(prompt: int) -> SlotAssignment:
    return SlotAssignment(0, 0, column(range(prompt)), prompt, 0, (), Sampling())


def test_a_result_comes_no_earlier_than_its_step_ends() -> None:
    executor = make()
    begun = time.monotonic()
    submitted = executor.submit(encode(StepMessage(1, assigned_slots=(assignment(2000),), chunks=column([0, 2000]))))
    assert submitted.done()
    first = executor.sample(1)
    executor.submit(encode(StepMessage(2)))
    second = executor.sample(2)
    one = decode_result(first.result(30))
    assert time.monotonic() - begun >= one.seconds > 0.02
    two = decode_result(second.result(30))
    assert time.monotonic() - begun >= one.seconds + two.seconds
    assert (one.step, two.step) == (1, 2)
    executor.shutdown()


def test_the_thread_waits_for_a_result_without_looking_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pump, calls = SimulatedExecutor.pump, list[None]()

    def counted(self: SimulatedExecutor) -> bool:
        calls.append(None)
        return pump(self)

    monkeypatch.setattr(SimulatedExecutor, "pump", counted)
    executor = make()
    thread = next(one for one in threading.enumerate() if one.name == "simulated-device")
    executor.submit(encode(StepMessage(1, assigned_slots=(assignment(8000),), chunks=column([0, 8000]))))
    executor.sample(1).result(30)
    assert len(calls) < 10, "at the start, for the step, and when it is due"
    executor.shutdown()
    thread.join(60)
    assert not thread.is_alive()


def test_calls_are_refused() -> None:
    executor = make()
    with pytest.raises(RequestError, match="simulated hardware has no load_adapter"):
        executor.call("load_adapter", {}).result()
    executor.shutdown()


def test_a_fault_of_the_thread_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: Any) -> bool:
        raise ValueError("broken")

    monkeypatch.setattr(SimulatedExecutor, "pump", fail)
    executor = make()
    assert isinstance(executor.ended.exception(30), ValueError)
    executor.shutdown()


class SlowCore:
    """A clock that moves as the core takes its time."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time


@pytest.mark.parametrize("core_ms", [0.0, 0.5, 5.0])
def test_the_cost_of_the_host_includes_what_the_core_takes(core_ms: float) -> None:
    clock = SlowCore()
    host = SimulatedHost(H100.host.v0, 1, overlaps=False)
    executor = SimulatedExecutor(clock, StepTime(H100, SHAPE), host, 4, 1000)
    executor.real_time = True
    executor.submit(encode(StepMessage(1, assigned_slots=(assignment(8),), chunks=column([0, 8]))))
    executor.sample(1)
    assert executor.next_due is not None
    clock.time = first = executor.next_due
    executor.pump()
    clock.time += core_ms * 1e-3
    executor.submit(encode(StepMessage(2)))
    result = executor.sample(2)
    due = executor.next_due
    clock.time = due
    executor.pump()
    cost = H100.host.v0.step_seconds(1, 1)
    assert due - first == pytest.approx(decode_result(result.result()).seconds + max(cost, core_ms * 1e-3))
