"""An executor whose pipeline stages are threads of this process, connected as processes are."""

import dataclasses
import datetime
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.memory import resolve
from engine.model.loading.open_model import open_model
from engine.model.model_info import ModelInfo, read_model_info
from engine.model.sharding.pipeline_plan import plan_pipeline
from engine.resolved_config import ResolvedConfig
from engine.worker.backend_builder import open_for_backend
from engine.worker.in_process import InProcessExecutor
from engine.worker.stage_links import StageGroup, StageLinks
from engine.worker.stage_start import build_stage_runner
from engine.worker.worker_start import StartReport
from tests.engine.worker.driver import Driver
from tests.engine.worker.mm_driver import BLOCK, BLOCKS, ROWS, MMDriver


class PatientGroup(StageGroup):
    """A stage that fails leaves the others waiting in this process, where no connection breaks."""

    timeout = datetime.timedelta(seconds=30)


class StageThreads:
    """Implements `engine.worker.executor.StartedExecutor`. All stages get each command, the last one answers.

    Args:
        folder: of the model.
        store: a file by which the stages find each other.
        options: of the configuration.
    """

    def __init__(self, folder: Path, store: Path, stages: int, *, num_blocks: int, **options: Any):
        config = EngineConfig(
            model=str(folder), pipeline_parallel_size=stages, kv_cache_memory_bytes=1 << 30, **options
        )
        model_info = read_model_info(config)
        self.resolved = dataclasses.replace(resolve(config, model_info).config, num_blocks=num_blocks)
        plan = plan_pipeline(config, model_info)
        building = threading.Lock()  # transformers builds a model in a context that is the process's

        def start(number: int) -> InProcessExecutor:
            def start_stage(
                config: EngineConfig, model_info: ModelInfo, resolved: ResolvedConfig, _: Any
            ) -> tuple[Any, StartReport]:
                with building:
                    meta_model = open_for_backend(config, model_info, resolved) or open_model(config, model_info)
                group = PatientGroup(number, stages, str(store))
                links = StageLinks(plan.stages[number], group, resolved.most_steps_in_flight)
                runner, built = build_stage_runner(
                    config, plan.rank_info(number, model_info), resolved, meta_model, None, links
                )
                return runner, StartReport({}, built.kernels, built.warnings)

            return InProcessExecutor(config, model_info, self.resolved, start=start_stage)

        with ThreadPoolExecutor(stages) as threads:
            self.executors = list(threads.map(start, range(stages)))
        self.kernels = self.executors[-1].kernels

    def submit(self, step: bytes) -> "Future[None]":
        return _last([one.submit(step) for one in self.executors])

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":
        return _last([one.sample(step, masks) for one in self.executors])

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]":
        return _last([one.call(method, arguments) for one in self.executors])

    def shutdown(self) -> None:
        for one in self.executors:
            one.shutdown()


def _last(results: "Sequence[Future[Any]]") -> "Future[Any]":
    """The result of the last stage, or the error of the first one that fails."""
    found: Future[Any] = Future()
    lock = threading.Lock()

    def done(one: "Future[Any]") -> None:
        with lock:
            if found.done():
                return
            error = None if one.cancelled() else one.exception()
            if error is not None:
                found.set_exception(error)
            elif one is results[-1] and not one.cancelled():
                found.set_result(one.result())

    for one in results:
        one.add_done_callback(done)
    return found


def staged_mm_driver(folder: Path, store: Path, stages: int, *, block_size: int = BLOCK, **options: Any) -> MMDriver:
    """The same of a model that takes multimodal inputs."""
    options = {"dtype": "float32", "max_num_seqs": ROWS, "kernels": "torch", **options}
    executor = StageThreads(folder, store, stages, num_blocks=BLOCKS, block_size=block_size, **options)
    return MMDriver(executor, executor.resolved)


def staged_driver(
    folder: Path, store: Path, stages: int, *, block_size: int = 4, num_blocks: int = 2000, **options: Any
) -> Driver:
    """A driver of such an executor; the caller shuts it down."""
    options = {"dtype": "float32", "max_num_seqs": 6, **options}
    executor = StageThreads(folder, store, stages, num_blocks=num_blocks, block_size=block_size, **options)
    resolved = executor.resolved
    return Driver(
        executor,  # type: ignore[arg-type]
        rows=resolved.max_num_seqs,
        block_size=block_size,
        num_blocks=num_blocks,
        windows=resolved.kv_windows,
    )
