"""The executor of one rank in the caller's own process: a thread that runs steps in order."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig, ResolvedConfig
from engine.memory import threads_per_rank
from engine.model.facts import ModelFacts
from engine.worker.threads import limit_libraries, stay

if TYPE_CHECKING:
    from engine.worker.runner import Runner


class InProcessExecutor:
    """Loads the model and allocates the KV cache when made; raises the RedlineError that says why it can't.

    `progress` hears, from a thread, how many bytes of the weights were read, and how many there are.
    """

    def __init__(
        self,
        config: EngineConfig,
        facts: ModelFacts,
        resolved: ResolvedConfig,
        *,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.seconds: dict[str, float] = {}
        self.kernels = ""  # see engine.worker.network.Built
        self.warnings: tuple[str, ...] = ()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="worker")
        try:
            self._runner = self._thread.submit(self._start, config, facts, resolved, progress).result()
        except BaseException:
            self.shutdown()
            raise

    def submit(self, step: bytes) -> "Future[None]":
        """Hand over an encoded StepMessage; the forward pass starts as soon as the steps before it are done."""
        return self._thread.submit(self._runner.forward, step)

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":
        """Sample a submitted step, before the next one is submitted; resolves to an encoded StepResult."""
        if masks:
            raise NotImplementedError("masks come with structured output")
        return self._thread.submit(self._runner.sample, step)

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]":
        """Do what isn't a step, between steps."""
        return self._thread.submit(self._runner.call, method, arguments)

    def shutdown(self) -> None:
        """End the thread once the step in progress is done; steps that wait are dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(
        self,
        config: EngineConfig,
        facts: ModelFacts,
        resolved: ResolvedConfig,
        progress: Callable[[int, int], None] | None,
    ) -> "Runner":
        began = time.perf_counter()
        limit_libraries()
        import torch

        from engine.model.load import open_model
        from engine.worker.runner import build_runner

        torch.set_num_threads(threads_per_rank(config.total_ranks))
        imported = time.perf_counter()
        blank = open_model(config, facts, progress)
        opened = time.perf_counter()
        runner, built = build_runner(config, facts, resolved, blank)
        self.kernels, self.warnings = built.kernels, built.warnings
        stay(built.cores)
        self.seconds = {
            "import torch": imported - began,
            "open model": opened - imported,
            "load weights": blank.seconds,
            "prepare kernels": time.perf_counter() - opened - blank.seconds,
        }
        return runner
