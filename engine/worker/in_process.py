"""The executor of a single rank: a thread of the EngineCore's process that runs steps in order."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

from engine.config import EngineConfig, ResolvedConfig
from engine.model.model_info import ModelInfo
from engine.worker.worker_start import start_worker

if TYPE_CHECKING:
    from engine.worker.runner import Runner


class InProcessExecutor:
    """Implements `engine.worker.executor.StartedExecutor`. The constructor loads the model; it raises RedlineError.

    `progress` is called from a thread with the bytes of weights read so far and in total.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_info: ModelInfo,
        resolved: ResolvedConfig,
        *,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.ranks = ()
        self.ended: Future[None] = Future()  # never done: the rank ends with this process
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="worker")
        try:
            worker, report = self._thread.submit(start_worker, config, model_info, resolved, progress).result()
        except BaseException:
            self.shutdown()
            raise
        self._runner = cast("Runner", worker)
        self.seconds, self.kernels, self.warnings = report.seconds, report.kernels, report.warnings

    def submit(self, step: bytes) -> "Future[None]":
        """Queue an encoded StepMessage; its forward pass starts once the steps before it are done."""
        return self._thread.submit(self._runner.forward, step)

    def sample(self, step: int) -> "Future[bytes]":
        """Sample a submitted step, before the next one is submitted; resolves to an encoded StepResult."""
        return self._thread.submit(self._runner.sample, step)

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]":
        """Execute a call between two steps."""
        return self._thread.submit(self._runner.call, method, arguments)

    def shutdown(self) -> None:
        """End the thread once the step in progress is done; queued steps are dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)
