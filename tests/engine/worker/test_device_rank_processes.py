"""Ranks in processes of their own, each on a device that torch drives: here the CPU as an asynchronous device."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.columns import column, int32s
from engine.errors import EngineDeadError, ModelError
from engine.messages import Sampling, SlotAssignment, StepMessage, decode_result, encode
from engine.worker.multiprocess import MultiprocessExecutor
from engine.worker.rank_protocol import DeviceKind
from tests.engine.worker.device_driver import CoreDriver, configure, start_executor
from tests.engine.worker.driver import build_model
from tests.engine.worker.test_device_runner import ON_HOST, SAMPLINGS, mixed_requests
from tests.engine.worker.test_multiprocess import PATIENCE_S, exit_codes, gone, pids_of, submit

OPTIONS = {"rows": 4, "max_num_batched_tokens": 16, "max_model_len": 100, "num_blocks": 120}
FIRST = SlotAssignment(0, 1, column([1, 2, 3]), 3, 0, (column(range(1, 21)),), Sampling())
Start = Callable[..., tuple[MultiprocessExecutor, Any]]


@pytest.fixture
def start() -> Iterator[Start]:
    executors: list[MultiprocessExecutor] = []

    def begin(folder: Path, *, use_triton: bool = False, **options: Any) -> tuple[MultiprocessExecutor, Any]:
        config, model_info, resolved = configure(folder, tensor_parallel_size=2, **OPTIONS | options)
        device = DeviceKind("cpu", use_triton)
        executors.append(MultiprocessExecutor(config, model_info, resolved, device=device))
        return executors[-1], resolved

    yield begin
    for executor in executors:
        executor.shutdown()


@pytest.mark.parametrize(("use_triton", "count", "new"), [(False, 9, 6), (True, 2, 3)], ids=["torch", "triton"])
def test_ranks_give_the_tokens_of_one(use_triton: bool, count: int, new: int, tmp_path: Path, start: Start) -> None:
    if use_triton:
        pytest.importorskip("triton")
    build_model("llama", tmp_path, num_hidden_layers=2)
    requests = mixed_requests([*SAMPLINGS, *ON_HOST] if not use_triton else SAMPLINGS[:2], count)
    requests = [(prompt[:12], sampling) for prompt, sampling in requests]
    # Random weights are made by each rank, as by one rank, and cut; those of a folder are read.
    weights = {"load_format": "dummy" if use_triton else "auto"}
    alone, resolved = start_executor(None, tmp_path, kernels="torch", **OPTIONS, **weights)
    try:
        expected = CoreDriver(alone, resolved).run(requests, new)
    finally:
        alone.shutdown()
    executor, resolved = start(tmp_path, use_triton=use_triton, **weights)
    assert executor.kernels == ("triton, fused stack" if use_triton else "torch")
    driver = CoreDriver(executor, resolved)  # type: ignore[arg-type]
    assert driver.run(requests, new) == expected
    assert driver.most_in_flight == 2
    assert set(executor.seconds) == {
        "start ranks", "import torch", "open model", "join ranks", "load weights", "prepare kernels"
    }  # fmt: skip
    executor.shutdown()
    assert exit_codes(executor) == [0, 0], "none had to be ended by force"
    assert not executor.ended.done()


def test_steps_run_ahead_and_a_killed_rank_fails_what_is_pending(tmp_path: Path, start: Start) -> None:
    build_model("llama", tmp_path, num_hidden_layers=2)
    executor, _ = start(tmp_path)
    with pytest.raises(ModelError, match="missing"):
        executor.call("load_adapter", {"key": "a", "path": str(tmp_path / "missing")}).result(PATIENCE_S)
    steps = [StepMessage(0, assigned_slots=(FIRST,), chunks=column([[0, 3]])), *(StepMessage(i) for i in range(1, 30))]
    results = [submit(executor, message)[1] for message in steps]
    tokens = [int32s(decode_result(result.result(PATIENCE_S)).tokens) for result in results]
    assert [len(one) for one in tokens] == [1] * 30
    pids = pids_of(executor)
    later = [submit(executor, StepMessage(i)) for i in range(30, 60)]
    os.kill(pids[1], signal.SIGKILL)
    cause = rf"^rank 1 \(process {pids[1]}\) was killed by SIGKILL"
    with pytest.raises(EngineDeadError, match=cause):
        executor.ended.result(PATIENCE_S)
    assert any(future.exception(PATIENCE_S) is not None for future in later[-1])
    assert all(gone(pid) for pid in pids)


def test_an_error_in_the_ranks_is_shown_with_its_rank(tmp_path: Path, start: Start) -> None:
    build_model("llama", tmp_path, num_hidden_layers=2)
    executor, _ = start(tmp_path)
    _, result = submit(executor, StepMessage(0, new_blocks=column([[0, 7, 1]])))
    with pytest.raises(EngineDeadError, match=r"^rank [01] \(process \d+\): RuntimeError: .*KV group 7 of slot 0"):
        result.result(PATIENCE_S)
    assert isinstance(executor.submit(encode(StepMessage(1))).exception(PATIENCE_S), EngineDeadError)
