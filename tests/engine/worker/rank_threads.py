"""An executor whose ranks are threads of this process, each with an asynchronous device of its own."""

import functools
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.messages import decode_result
from engine.model.model_info import ModelInfo
from engine.resolved_config import ResolvedConfig
from engine.worker.device import Device
from engine.worker.in_process import InProcessDeviceExecutor
from engine.worker.worker_start import StartReport
from tests.engine.worker.device_driver import configure
from tests.engine.worker.stand_in_device import StandInDevice
from tests.engine.worker.tape import watch_launches


class RankThreads:
    """Implements `engine.worker.executor.StartedExecutor`; all ranks get each command, and must agree on the tokens.

    Args:
        store: a file by which the ranks find each other.
    """

    def __init__(self, devices: Sequence[Device], folder: Path, store: Path, *, use_triton: bool, **options: Any):
        size = len(devices)
        config, model_info, self.resolved = configure(folder, tensor_parallel_size=size, **options)
        building = threading.Lock()  # transformers builds a model in a context that is the process's

        def start(rank: int) -> InProcessDeviceExecutor:
            def start_rank(
                config: EngineConfig, model_info: ModelInfo, resolved: ResolvedConfig, _: Any
            ) -> tuple[Any, StartReport]:
                from engine.model.loading.open_model import open_model
                from engine.model.sharding.shard_model import shard_model
                from engine.model.sharding.tp_plan import plan_tensor_parallel
                from engine.worker.device_builder import build_device_runner

                with building:
                    meta_model = open_model(config, model_info)
                    tp_plan = plan_tensor_parallel(config, model_info)
                shard_model(meta_model, tp_plan, devices[rank].join(rank, size, str(store)))
                built = build_device_runner(
                    config, tp_plan.rank_info, resolved, meta_model, devices[rank], tp_plan, use_triton=use_triton
                )
                return built.runner, StartReport({}, built.kernels, built.warnings)

            return InProcessDeviceExecutor(config, model_info, self.resolved, start=start_rank)

        with ThreadPoolExecutor(size) as threads:
            self.executors = list(threads.map(start, range(size)))
        self.kernels = self.executors[0].kernels
        self._agreeing = ThreadPoolExecutor(1)

    def submit(self, step: bytes) -> "Future[None]":
        first, *_ = [one.submit(step) for one in self.executors]
        return first

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":
        results = [one.sample(step, masks) for one in self.executors]

        def agree() -> bytes:
            found = [decode_result(result) for result in _all(results)]
            assert len({(one.tokens, one.counts) for one in found}) == 1, "ranks disagree"
            return results[0].result()

        return self._agreeing.submit(agree)

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]":
        results = [one.call(method, arguments) for one in self.executors]

        def all_done() -> Any:
            return _all(results)[0]

        return self._agreeing.submit(all_done)

    def shutdown(self) -> None:
        for one in self.executors:
            one.shutdown()
        self._agreeing.shutdown()


def _all(results: "Sequence[Future[Any]]") -> list[Any]:
    """The results of all ranks. Raises the error of the first that fails: others may wait for it in a collective."""
    ended: SimpleQueue[Future[Any]] = SimpleQueue()
    for one in results:
        one.add_done_callback(ended.put)
    for _ in results:
        ended.get().result()
    return [one.result() for one in results]


def launch_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one thread at a time rewrite and launch an interpreted kernel.

    The interpreter has one state for all threads, and so has the parser of Python before 3.11.9: two threads that parse
    at once end in "AST constructor recursion depth mismatch".
    """
    from triton.runtime import interpreter

    watch_launches()  # before the lock: what is undone at the end of the test must leave it in place
    running = threading.RLock()

    def alone(function: Any) -> Any:
        @functools.wraps(function)
        def run_alone(*args: Any, **kwargs: Any) -> Any:
            with running:
                return function(*args, **kwargs)

        return run_alone

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", alone(interpreter.InterpretedFunction.run))
    # What a graph of the stand-in device launches again.
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", alone(interpreter.GridExecutor.__call__))


def owner(devices: Sequence[StandInDevice], tensor: Any) -> str:
    """In place of `engine.kernels.triton.launch.place_of` where several stand-in devices are used."""
    return next((f"device {rank}" for rank, one in enumerate(devices) if one.place_of(tensor) == "device"), "host")
