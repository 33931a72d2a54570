"""Ranks that divide a model, each on an asynchronous device of its own, give the tokens of one rank on the CPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ModelError
from engine.kernels.triton import launch
from engine.messages import Sampling
from engine.worker import in_process
from engine.worker.in_process import InProcessExecutor
from tests.engine.kernels.triton import quick
from tests.engine.worker.device_driver import CoreDriver, start_executor
from tests.engine.worker.driver import Driver, Request, build_model
from tests.engine.worker.lora_files import LLAMA, write_adapter
from tests.engine.worker.rank_threads import RankThreads, launch_one_at_a_time
from tests.engine.worker.stand_in_device import StandInDevice
from tests.engine.worker.test_device_runner import ON_HOST, SAMPLINGS, mixed_requests
from tests.engine.worker.test_triton_products import quantized_model

pytest.importorskip("triton")
quick.patch()

SIZE = 2
OPTIONS = {"rows": 4, "max_num_batched_tokens": 16, "max_model_len": 100}
Start = Callable[..., tuple[Any, Any]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts one rank on the CPU, or two on stand-in devices; returns the executor and the resolved configuration."""
    started: list[InProcessExecutor | RankThreads] = []
    launch_one_at_a_time(monkeypatch)

    def begin(folder: Path, devices: list[StandInDevice], *, use_triton: bool = True, **more: Any) -> tuple[Any, Any]:
        if not devices:
            executor, resolved = start_executor(None, folder, kernels="torch", **OPTIONS | more)
            started.append(executor)
            return executor, resolved
        monkeypatch.setattr(launch, "place_of", lambda tensor: _owner(devices, tensor))
        ranks = RankThreads(
            devices, folder, tmp_path / f"store-{len(started)}", use_triton=use_triton, **OPTIONS | more
        )
        started.append(ranks)
        return ranks, ranks.resolved

    yield begin
    for executor in started:
        executor.shutdown()


def _owner(devices: list[StandInDevice], tensor: Any) -> str:
    return next((f"device {rank}" for rank, one in enumerate(devices) if one.place_of(tensor) == "device"), "host")


def make_devices() -> list[StandInDevice]:
    return [StandInDevice(delay_s=0.05) for _ in range(SIZE)]


@pytest.mark.parametrize(
    ("kind", "use_triton", "kernels", "count", "new"),
    [
        ("llama", True, "triton, fused stack", 5, 3),
        ("mistral", True, "triton, fused stack", 4, 3),  # a window in all layers
        ("starcoder2", True, "triton (the kernels", 4, 3),  # the generic backend, with biases that one rank adds
        ("qwen2", False, "torch", 7, 6),
    ],
)
def test_ranks_that_run_ahead_give_the_tokens_of_one(
    kind: str, use_triton: bool, kernels: str, count: int, new: int, tmp_path: Path, start: Start
) -> None:
    build_model(kind, tmp_path, num_hidden_layers=2, vocab_size=127)  # one rank has a token more
    # Without filters ranks exchange sums of logits, with filters the logits.
    samplings = SAMPLINGS[:2] if count == 4 else [*SAMPLINGS[::2], ON_HOST[2], ON_HOST[0]]
    requests = [(prompt[:14], sampling) for prompt, sampling in mixed_requests(samplings, count)]
    expected = CoreDriver(*start(tmp_path, [])).run(requests, new)
    devices = make_devices()
    executor, resolved = start(tmp_path, devices, use_triton=use_triton)
    assert executor.kernels.startswith(kernels)
    driver = CoreDriver(executor, resolved)
    assert driver.run(requests, new) == expected
    assert driver.most_in_flight >= 2
    assert len({tuple(tokens) for tokens in expected}) > 2


@pytest.mark.parametrize("kind", ["llama", "starcoder2"])
def test_ranks_quantize_their_parts_of_the_weights(kind: str, tmp_path: Path, start: Start) -> None:
    """To the numbers of the whole weights, whose groups of inputs are not divided."""
    _, rounded = quantized_model(kind, "int4", tmp_path / "model")
    rounded.save_pretrained(tmp_path / "rounded")
    requests = [(prompt[:14], sampling) for prompt, sampling in mixed_requests(SAMPLINGS, 2)]
    expected = CoreDriver(*start(tmp_path / "rounded", [])).run(requests, 3)
    driver = CoreDriver(*start(tmp_path / "model", make_devices(), quantization="int4"))
    assert driver.run(requests, 3) == expected


class _NoCapture:
    """In place of the thread of each executor: ranks capture by the same calls."""

    def __init__(self, *_: Any):
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("fails", [False, True], ids=["captured", "one fails"])
def test_ranks_replay_the_same_steps(
    fails: bool, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collectives are part of captured steps. If one rank can't capture a size, none replays it."""
    monkeypatch.setattr(in_process, "GraphCapture", _NoCapture)
    build_model("llama", tmp_path, num_hidden_layers=1)
    options = {"rows": 2, "max_num_batched_tokens": 8, "max_model_len": 30}
    requests = [([5, 6, 7], Sampling()), ([9, 8], Sampling(temperature=0.9, seed=3))]
    requests.append(([4], Sampling(temperature=0.8, top_k=7, seed=4)))
    expected = CoreDriver(*start(tmp_path, [], **options)).run(requests, 4)
    devices = [StandInDevice(delay_s=0.02, captures=True) for _ in range(SIZE)]
    executor, resolved = start(tmp_path, devices, **options)
    if fails:
        monkeypatch.setattr(devices[1], "capture", _refuse)
    while executor.call("capture_graph", {}).result():
        pass
    steps = [one._device_runner._steps for one in executor.executors]
    assert [one.captured for one in steps] == [0 if fails else 3] * SIZE  # decode 1, 2; mixed 8
    assert CoreDriver(executor, resolved).run(requests, 4) == expected
    assert [device.replays > 0 for device in devices] == [not fails] * SIZE


def _refuse(run: Callable[[], None]) -> Callable[[], None]:
    for _ in range(2):  # before the capture, and what the other rank's stand-in executes while it records
        run()
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("use_triton", [True, False], ids=["stack", "generic"])
def test_adapters_are_divided_among_the_ranks(use_triton: bool, tmp_path: Path, start: Start) -> None:
    model = build_model("llama", tmp_path / "model", num_hidden_layers=2)
    folder = write_adapter(tmp_path / "all", model, LLAMA, seed=1)
    outputs = []
    for devices in ([], make_devices()):
        executor, resolved = start(tmp_path / "model", devices, use_triton=use_triton)
        executor.call("load_adapter", {"key": "one", "path": str(folder)}).result()
        with pytest.raises(ModelError, match="missing"):
            executor.call("load_adapter", {"key": "two", "path": str(tmp_path / "missing")}).result()
        driver = Driver(
            executor, rows=resolved.max_num_seqs, block_size=resolved.block_size, num_blocks=resolved.num_blocks
        )
        requests = [Request([5, 6, 7], Sampling(), key) for key in ("", "one")] + [Request([9] * 6, Sampling(), "one")]
        driver.run(requests, 4, seed=3)
        outputs.append([request.output for request in requests])
    assert outputs[0] == outputs[1]
    assert outputs[0][0] != outputs[0][1]
