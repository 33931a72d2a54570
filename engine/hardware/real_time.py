"""Simulated hardware in real time: the results of steps arrive when they are due."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from engine.children import RankHandle
from engine.clock import Clock
from engine.errors import RequestError
from engine.hardware.executor import SimulatedExecutor
from engine.messages import MemoryLine


class RealTimeExecutor:
    """Implements `engine.worker.executor.StartedExecutor` with a thread that sleeps until the next result is due.

    Args:
        simulated: on `clock`; nothing else may use it.
        clock: of real time.
    """

    ranks: Sequence[RankHandle] = ()
    num_blocks: int | None = None
    memory: tuple[MemoryLine, ...] = ()
    warnings: tuple[str, ...] = ()

    def __init__(self, simulated: SimulatedExecutor, clock: Clock):
        self.seconds: dict[str, float] = {}
        self.kernels = simulated.kernels
        self.ended: Future[None] = Future()
        self._simulated, self._clock = simulated, clock
        simulated.real_time = True
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._deliver_all, name="simulated-device", daemon=True).start()

    def submit(self, step: bytes) -> "Future[None]":
        with self._changed:
            return self._simulated.submit(step)

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":
        with self._changed:
            result = self._simulated.sample(step, masks)
            self._changed.notify()
        return result

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]":  # noqa: ARG002
        refused: Future[Any] = Future()
        refused.set_exception(RequestError(f"simulated hardware has no {method}"))
        return refused

    def shutdown(self) -> None:
        with self._changed:
            self._closed = True
            self._simulated.shutdown()
            self._changed.notify()

    def _deliver_all(self) -> None:
        try:
            with self._changed:
                while not self._closed:
                    self._simulated.pump()
                    due = self._simulated.next_due
                    self._changed.wait(None if due is None else max(due - self._clock.now(), 0))
        except BaseException as error:  # the engine ends with this cause
            self.ended.set_exception(error)
