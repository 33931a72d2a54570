"""Families as transformers' classes with the attention in torch, on a device without Triton: xpu, mps, hpu, ….

Nothing of a step meets a tensor of the host, and nothing waits for the device: the stand-in device refuses both.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.worker.device_driver import make_device_driver
from tests.engine.worker.driver import Driver, build_model
from tests.engine.worker.parity import Reference, compare, serve
from tests.engine.worker.stand_in_device import StandInDevice


@pytest.fixture
def make_driver() -> Iterator[Callable[..., Driver]]:
    executors: list[Any] = []

    def make(device: StandInDevice, folder: Path) -> Driver:
        driver = make_device_driver(device, folder)
        executors.append(driver.executor)
        return driver

    yield make
    for executor in executors:
        executor.shutdown()


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "gemma2",  # softcap, windows
        "gpt_oss",  # sinks, windows, experts
        "mixtral",  # experts
        "deepseek_v3",  # values shorter than keys
    ],
)
def test_families_on_a_device_equal_transformers(kind: str, tmp_path: Path, make_driver: Callable[..., Driver]) -> None:
    reference, device = Reference(build_model(kind, tmp_path)), StandInDevice()
    driver = make_driver(device, tmp_path)
    assert driver.executor.kernels == "torch"
    for case in ("chunked", "preempted"):
        row = compare(kind, case, serve(driver, case), reference)
        assert row.passed, row
    assert device.fetches > 0
