"""Ranks that divide a model, each on an asynchronous device of its own, give the tokens of one rank on the CPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ModelError
from engine.kernels.triton import launch
from engine.messages import Sampling
from engine.worker.in_process import InProcessExecutor
from tests.engine.kernels.triton import quick
from tests.engine.worker.device_driver import CoreDriver, start_executor
from tests.engine.worker.driver import Driver, Request, build_model
from tests.engine.worker.lora_files import LLAMA, write_adapter
from tests.engine.worker.rank_threads import RankThreads, launch_one_at_a_time, owner
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
        monkeypatch.setattr(launch, "place_of", lambda tensor: owner(devices, tensor))
        ranks = RankThreads(
            devices, folder, tmp_path / f"store-{len(started)}", use_triton=use_triton, **OPTIONS | more
        )
        started.append(ranks)
        return ranks, ranks.resolved

    yield begin
    for executor in started:
        executor.shutdown()


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
