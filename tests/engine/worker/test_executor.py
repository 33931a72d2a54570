"""The executor of a device type of torch: chosen by the machine, and its random weights."""

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.devices.cpu import CpuMachine
from engine.errors import ConfigError
from engine.worker import executor
from engine.worker.executor import make_executor
from engine.worker.in_process import InProcessDeviceExecutor, InProcessExecutor
from tests.engine.worker.device_driver import configure
from tests.engine.worker.driver import Driver, Request, build_model


class EnqueuingCpu(CpuMachine):
    """The CPU, as a device of torch whose steps are enqueued."""

    torch_type = "cpu"
    kernels = "torch"


@pytest.fixture
def enqueuing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "machine_for", EnqueuingCpu)


def outputs(folder: Path, load_format: str) -> tuple[list[list[int]], str, type]:
    config, model_info, resolved = configure(folder, kernels="torch", load_format=load_format)
    made = make_executor(config, model_info, resolved)
    try:
        assert isinstance(made, InProcessExecutor)
        rows, size, blocks = resolved.max_num_seqs, resolved.block_size, resolved.num_blocks
        driver = Driver(made, rows=rows, block_size=size, num_blocks=blocks)
        requests = [Request([i + 1, 2, 3, 4, 5]) for i in range(3)]
        driver.run(requests, 6, seed=0, chunk=100, preempt=0.0)
        assert set(made.seconds) == {"import torch", "open model", "load weights", "prepare kernels"}
        return [request.output for request in requests], made.kernels, type(made)
    finally:
        made.shutdown()


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_device_of_torch_gives_the_tokens_of_the_cpu(
    load_format: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    build_model("llama", tmp_path)
    expected, _, _ = outputs(tmp_path, load_format)
    request.getfixturevalue("enqueuing")
    found, kernels, kind = outputs(tmp_path, load_format)
    assert found == expected
    assert kernels == "torch"
    assert kind is InProcessDeviceExecutor


def test_the_device_is_checked_before_the_model_is_loaded(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    build_model("llama", tmp_path)
    config, model_info, resolved = configure(tmp_path)
    config = EngineConfig(model=config.model, device="cuda")
    with pytest.raises(ConfigError, match="--device cuda"):
        make_executor(config, model_info, resolved)
