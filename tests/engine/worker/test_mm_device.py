"""Multimodal models on asynchronous devices equal plain transformers; steps without inputs are captured ones."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from engine.errors import ConfigError
from engine.kernels.triton import launch
from engine.worker.device import Device
from engine.worker.torch_device import TorchDevice
from tests.engine.kernels.triton import quick
from tests.engine.worker import stand_in_device
from tests.engine.worker.device_driver import start_executor
from tests.engine.worker.mm_driver import BLOCK, ROWS, MMDriver, Prompts
from tests.engine.worker.mm_models import MM_MODELS
from tests.engine.worker.mm_parity import CHUNKED, NEW, MMReference, compare, serve
from tests.engine.worker.parity import _Forgetful
from tests.engine.worker.stand_in_device import StandInDevice

quick.patch()

Start = Callable[..., MMDriver]


@pytest.fixture
def start() -> Iterator[Start]:
    executors: list[Any] = []

    def make(device: Device, folder: Path, **options: Any) -> MMDriver:
        executor, resolved = start_executor(
            device, folder, rows=ROWS, block_size=BLOCK, num_blocks=500, kernels="torch", **options
        )
        executors.append(executor)
        return MMDriver(executor, resolved)

    yield make
    for executor in executors:
        executor.shutdown()


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Prompts, MMReference]:
    folder, entry = tmp_path_factory.mktemp("llava"), MM_MODELS["llava"]
    reference = MMReference(entry.build(folder), entry)
    return folder, Prompts(folder, entry), reference


def test_the_class_of_transformers_on_a_device(llava: tuple[Path, Prompts, MMReference], start: Start) -> None:
    folder, prompts, reference = llava
    driver = start(StandInDevice(), folder)
    assert driver.executor.kernels == "torch"
    row = compare("llava", CHUNKED, serve(driver, prompts, CHUNKED), reference)
    assert row.passed, row


def test_the_stack_in_triton_with_captured_steps(
    llava: tuple[Path, Prompts, MMReference], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, prompts, reference = llava
    device = StandInDevice(captures=True)
    monkeypatch.setattr(launch, "place_of", device.place_of)
    driver = start(device, folder, use_triton=True, max_num_batched_tokens=32)
    assert driver.executor.kernels == "triton, fused stack"
    while driver.executor.call("capture_graph", {}).result():
        pass
    replays, puts = device.replays, device.puts
    requests = prompts.samples()[:2]
    driver.run(requests, NEW, seed=3, chunk=9, preempt=0, prefixes=_Forgetful())
    row = compare("llava", CHUNKED, requests, reference)
    assert row.passed, row
    assert driver.split > 0
    assert device.replays - replays < 2 * (device.puts - puts), "a step with embeddings was captured"
    assert device.replays - replays >= 2 * NEW - 2, "steps that decode after an input weren't captured"


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_mrope_and_deepstack_in_the_stack_in_triton(
    kind: str, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tower of Qwen3-VL makes tensors on the host, which real devices accept.
    device = StandInDevice(captures=True) if kind == "qwen2_vl" else TorchDevice("cpu")
    if isinstance(device, StandInDevice):
        monkeypatch.setattr(launch, "place_of", device.place_of)
        for name in ("HOST_READS", "WAITS"):  # towers read the grids of images, for which real devices wait
            monkeypatch.setattr(stand_in_device, name, set())
    entry = MM_MODELS[kind]
    reference = MMReference(entry.build(tmp_path), entry)
    driver = start(device, tmp_path, use_triton=True, max_num_batched_tokens=16)
    assert driver.executor.kernels == "triton, fused stack"
    while driver.executor.call("capture_graph", {}).result():
        pass
    requests = Prompts(tmp_path, entry).samples()[:2]
    driver.run(requests, NEW, seed=3, chunk=9, preempt=0, prefixes=_Forgetful())
    row = compare(kind, CHUNKED, requests, reference)
    assert row.passed, row


def test_inputs_whose_tokens_attend_to_each_other_are_refused(tmp_path: Path, start: Start) -> None:
    MM_MODELS["gemma3"].build(tmp_path)
    with pytest.raises(ConfigError, match=r"the tokens of each image attend to each other.*use --device cpu"):
        start(TorchDevice("cpu"), tmp_path)
