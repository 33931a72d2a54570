"""A step that runs out of memory is tried once more, and its effects are applied once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.columns import column
from engine.errors import EngineDeadError
from engine.messages import Sampling, SlotAssignment, StepMessage, encode
from engine.worker.device import DeviceMemory
from engine.worker.device_steps import EagerSteps
from tests.engine.worker.device_driver import CoreDriver, start_executor
from tests.engine.worker.driver import build_model
from tests.engine.worker.stand_in_device import StandInDevice

REQUESTS = [([5, 6, 7], Sampling()), ([8, 9], Sampling(temperature=0.8, seed=1))]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build_model("llama", folder, num_hidden_layers=1)
    return folder


@pytest.fixture
def device() -> StandInDevice:
    return StandInDevice(memory_facts=DeviceMemory(80 << 30, 1 << 30, 70 << 30, 75 << 30))


@pytest.fixture
def executor(device: StandInDevice, llama: Path) -> Iterator[tuple[Any, Any]]:
    started = start_executor(device, llama, kernels="torch", max_model_len=40)
    yield started
    started[0].shutdown()


@pytest.mark.parametrize("operation", [0, 7])
def test_memory_is_released_and_the_step_runs_again(
    operation: int, device: StandInDevice, executor: tuple[Any, Any]
) -> None:
    driver = CoreDriver(*executor)
    expected = driver.run(REQUESTS, 6)
    device.spared, device.shortages = operation, 1
    assert driver.run(REQUESTS, 6) == expected
    assert device.releases == 1


def test_a_step_of_several_ranks_is_not_repeated(device: StandInDevice, executor: tuple[Any, Any]) -> None:
    steps = executor[0]._device_runner._steps
    once = EagerSteps(device, steps.backend, steps._state, steps.stager, steps._kernels, repeats=False)
    calls = []

    def fail() -> None:
        calls.append(1)
        raise torch.OutOfMemoryError("no memory is left")

    with pytest.raises(EngineDeadError, match="a step needs more memory than the device has"):
        once._with_memory(fail)
    assert len(calls) == 1


def test_a_second_failure_ends_the_engine_with_figures(device: StandInDevice, executor: tuple[Any, Any]) -> None:
    row = SlotAssignment(0, 1, column([5, 6, 7]), 3, 0, (column([1]),), Sampling())
    device.shortages = 2
    with pytest.raises(
        EngineDeadError,
        match=r"of 80.0 GiB, 1.0 GiB are free, and tensors took 75.0 GiB at most .lower --gpu-memory-utilization or",
    ):
        executor[0].submit(encode(StepMessage(0, assigned_slots=(row,), chunks=column([[0, 3]])))).result(10)
