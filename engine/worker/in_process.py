"""The executor of a single rank: a thread of the EngineCore's process that runs steps in order."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

from engine.config import EngineConfig
from engine.model.model_info import ModelInfo
from engine.resolved_config import ResolvedConfig
from engine.worker.graph_capture import GraphCapture
from engine.worker.worker_start import StartReport, start_worker

if TYPE_CHECKING:
    from engine.worker.device_runner import DeviceRunner
    from engine.worker.runner import Runner

StartWorker = Callable[
    [EngineConfig, ModelInfo, ResolvedConfig, Callable[[int, int], None] | None], tuple[Any, StartReport]
]


class InProcessExecutor:
    """Implements `engine.worker.executor.StartedExecutor`. The constructor loads the model; it raises RedlineError.

    `progress` is called from a thread with the bytes of weights read so far and in total. `start` is called in the
    thread that runs the steps.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_info: ModelInfo,
        resolved: ResolvedConfig,
        *,
        progress: Callable[[int, int], None] | None = None,
        start: StartWorker = start_worker,
    ):
        self.ranks = ()
        self.ended: Future[None] = Future()  # never done: the rank ends with this process
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="worker")
        try:
            worker, report = self._thread.submit(start, config, model_info, resolved, progress).result()
        except BaseException:
            self.shutdown()
            raise
        self._runner = cast("Runner", worker)
        self.seconds, self.kernels, self.warnings = report.seconds, report.kernels, report.warnings
        self.num_blocks, self.memory = report.num_blocks, report.memory

    def submit(self, step: bytes) -> "Future[None]":
        """Queue an encoded StepMessage; its forward pass starts once the steps before it are done."""
        return self._thread.submit(self._runner.forward, step)

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":
        """Sample a submitted step, before the next one is submitted; resolves to an encoded StepResult."""
        return self._thread.submit(self._runner.sample, step, masks)

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]":
        """Execute a call between two steps."""
        return self._thread.submit(self._runner.call, method, arguments)

    def shutdown(self) -> None:
        """End the thread once the step in progress is done; queued steps are dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)


class InProcessDeviceExecutor(InProcessExecutor):
    """The executor of an asynchronous device: a second thread waits for the results, in the order of the steps.

    `start` starts an `engine.worker.device_runner.DeviceRunner`.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_info: ModelInfo,
        resolved: ResolvedConfig,
        *,
        start: StartWorker,
        progress: Callable[[int, int], None] | None = None,
    ):
        self._results = ThreadPoolExecutor(1, thread_name_prefix="results")
        self._num_steps = 0
        self._capture: GraphCapture | None = None
        super().__init__(config, model_info, resolved, progress=progress, start=start)
        self._device_runner = cast("DeviceRunner", self._runner)
        if self._device_runner.captures:
            self._capture = GraphCapture(self.call, lambda: self._num_steps)

    def submit(self, step: bytes) -> "Future[None]":
        self._num_steps += 1
        return super().submit(step)

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":
        """Enqueue the sampling of a submitted step; resolves to an encoded StepResult."""
        enqueued = self._thread.submit(self._device_runner.sample, step, masks)
        return self._results.submit(lambda: enqueued.result().finish())

    def shutdown(self) -> None:
        """End both threads once the step in progress and its result are done; others are dropped."""
        if self._capture is not None:
            self._capture.close()
        super().shutdown()
        self._results.shutdown(wait=True, cancel_futures=True)
