"""Captured steps give the tokens of launched ones; the stand-in device replays them without their Python code."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from engine.kernels.triton import launch
from engine.messages import Sampling
from tests.engine.kernels.triton import quick
from tests.engine.worker.device_driver import CoreDriver, make_device_driver, start_executor
from tests.engine.worker.driver import Request, build_model
from tests.engine.worker.lora_files import write_adapter
from tests.engine.worker.parity import Reference, merged
from tests.engine.worker.stand_in_device import StandInDevice
from tests.engine.worker.test_device_runner import ON_HOST, SAMPLINGS

quick.patch()

ROWS = 3
OPTIONS: dict[str, Any] = {
    "kernels": "torch", "use_triton": True, "rows": ROWS, "num_blocks": 17, "max_model_len": 60,
    "max_num_batched_tokens": 16,
}  # fmt: skip
SIZES = 4  # decode 1, 2, 3; mixed 16
NEW = 9
LENGTHS = (22, 3, 17, 9, 20, 1)  # of prompts

Start = Callable[..., CoreDriver]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build_model("llama", folder, num_hidden_layers=2)
    return folder


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    executors: list[Any] = []

    def make(device: StandInDevice | None, folder: Path, **options: Any) -> CoreDriver:
        if device is not None:
            monkeypatch.setattr(launch, "place_of", device.place_of)
        executor, resolved = start_executor(device, folder, **{**OPTIONS, **options})
        executors.append(executor)
        return CoreDriver(executor, resolved)

    yield make
    for executor in executors:
        executor.shutdown()


def requests_of(samplings: list[Sampling], count: int) -> list[tuple[list[int], Sampling]]:
    """With other first ids, a number drawn for the second prompt may lie 3e-8 from the edge between two tokens."""
    return [
        ([(7 * i + at) % 90 + 5 for at in range(LENGTHS[i % len(LENGTHS)])], samplings[i % len(samplings)])
        for i in range(count)
    ]


def graphs_of(driver: CoreDriver) -> Any:
    executor: Any = driver.executor
    return executor._device_runner._steps


def wait_for_captures(driver: CoreDriver) -> None:
    deadline = time.monotonic() + 60
    while graphs_of(driver).num_left:
        assert time.monotonic() < deadline, "steps aren't captured"
        time.sleep(0.01)
    driver.executor.call("capture_graph", {}).result()


def test_captured_steps_give_the_cpus_tokens(llama: Path, start: Start) -> None:
    """Chunks, ragged batches, preemptions, prefix hits, bursts; some requests sample on the host."""
    requests = requests_of(SAMPLINGS + ON_HOST[:1], 6)
    expected = start(None, llama).run(requests, NEW)
    device = StandInDevice(delay_s=0.05, captures=True)
    driver = start(device, llama)
    wait_for_captures(driver)
    assert graphs_of(driver).captured == SIZES
    before = device.puts
    assert driver.run(requests, NEW) == expected
    assert driver.stats.preemptions > 0
    assert driver.most_in_flight >= 2
    assert device.replays >= device.puts - before, "a step is one copy, and one or two replays"
    assert driver.run(requests[4:], NEW) == expected[4:], "with prefixes of the first time"
    assert driver.stats.prefix_hits > 0


def test_a_captured_step_launches_and_allocates_nothing(llama: Path, start: Start) -> None:
    device = StandInDevice(captures=True)
    driver = start(device, llama)
    wait_for_captures(driver)
    steps = graphs_of(driver)
    tokens = {key: captured.tokens.data_ptr() for key, captured in steps._choices.items()}
    before = device.allocations
    driver.run([([5, 6, 7], Sampling()), ([8, 9], Sampling(temperature=0.8, seed=1))], 4)
    assert device.allocations == before
    assert tokens == {key: captured.tokens.data_ptr() for key, captured in steps._choices.items()}


def test_steps_are_captured_while_requests_are_served(llama: Path, start: Start) -> None:
    requests = requests_of(SAMPLINGS, 3)
    expected = start(None, llama).run(requests, 6)
    device = StandInDevice(captures=True)
    driver = start(device, llama)
    assert driver.run(requests, 6) == expected
    wait_for_captures(driver)
    assert driver.run(requests, 6) == expected
    assert device.replays > 0


def test_steps_of_transformers_classes_are_captured(tmp_path: Path, start: Start) -> None:
    build_model("granite", tmp_path, num_hidden_layers=2)
    requests = requests_of(SAMPLINGS, 2)
    expected = start(None, tmp_path).run(requests, 4)
    device = StandInDevice(captures=True)
    driver = start(device, tmp_path)
    assert driver.executor.kernels.startswith("triton (")
    wait_for_captures(driver)
    assert graphs_of(driver).captured == SIZES
    before = device.allocations
    assert driver.run(requests, 4) == expected
    assert device.allocations == before


def test_steps_with_an_adapter_are_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama", tmp_path / "model", num_hidden_layers=2)
    folder = write_adapter(tmp_path / "one", model, ("q_proj", "down_proj"), 1)
    device = StandInDevice(captures=True)
    monkeypatch.setattr(launch, "place_of", device.place_of)
    driver = make_device_driver(device, tmp_path / "model", **{**OPTIONS, "num_blocks": 40})
    executor: Any = driver.executor
    requests = [Request([5, 6, 7]), Request([5, 6, 7], adapter="one#1"), Request([9, 8, 7])]
    try:
        while executor.call("capture_graph", {}).result():
            pass
        executor.call("load_adapter", {"key": "one#1", "path": str(folder)}).result()
        before = device.replays
        driver.run(requests, 4, seed=3, preempt=0.0)
        assert device.replays > before, "steps in which nobody has an adapter"
    finally:
        executor.shutdown()
    plain, adapted = Reference(model), merged(model, folder, 2.0)
    for request in requests:
        assert request.output == (adapted if request.adapter else plain).run(request.prompt)[0][:4]


def test_steps_with_draft_tokens_are_launched(llama: Path, start: Start) -> None:
    requests = [([5, 6, 7, 8, 5, 6, 7, 8, 5], Sampling())]
    expected = start(None, llama).run(requests, 30)
    device = StandInDevice(captures=True)
    driver = start(device, llama, speculative="ngram", num_speculative_tokens=3)
    wait_for_captures(driver)
    assert driver.run(requests, 30) == expected
    assert driver.stats.num_draft_tokens > 0
    assert device.replays > 0


def test_enforce_eager_captures_nothing(llama: Path, start: Start) -> None:
    device = StandInDevice(captures=True)
    driver = start(device, llama, enforce_eager=True)
    driver.run([([5, 6, 7], Sampling())], 3)
    assert graphs_of(driver).num_left == 0
    assert device.replays == 0


def test_a_model_that_can_not_be_captured_is_served(
    llama: Path, start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = StandInDevice(captures=True)

    def refuse(run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(device, "capture", refuse)
    with caplog.at_level(logging.WARNING):
        driver = start(device, llama)
        wait_for_captures(driver)
    assert "0 sizes of steps are captured" in caplog.text
    assert "operation not permitted when stream is capturing" in caplog.text
    assert len(driver.run([([5, 6, 7], Sampling())], 3)[0]) == 3
