"""Threads and sockets around an EngineCore: one thread receives, one sends, the caller's runs the loop."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

import zmq

from engine.clock import Clock
from engine.config import ResolvedConfig
from engine.core.engine import EngineCore
from engine.core.protocols import Executor
from engine.errors import RedlineError
from engine.messages import Dead, encode

log = logging.getLogger("redline.core")

LINGER_MS = 200  # how long a last message may take to leave; a front end that lives takes it at once


class _WakingExecutor:
    """An executor whose results wake the loop."""

    def __init__(self, inner: Executor, wake: Callable[[], None]):
        self._inner = inner
        self._wake = wake
        self.submit = inner.submit
        self.shutdown = inner.shutdown

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":
        result = self._inner.sample(step, masks)
        result.add_done_callback(lambda _: self._wake())
        return result


class CoreServer:
    """Serves one EngineCore to its front ends over ZeroMQ.

    The core binds `to_core` and takes messages from all front ends there; front end i binds `from_core[i]`.
    """

    def __init__(
        self, config: ResolvedConfig, executor: Executor, clock: Clock, to_core: str, from_core: tuple[str, ...]
    ) -> None:
        self._clock = clock
        self._from_core = from_core
        self._wake = threading.Event()
        self._failure: BaseException | None = None
        self._outbox: SimpleQueue[tuple[int, bytes] | None] = SimpleQueue()
        self._context = zmq.Context()
        self._inbound = self._context.socket(zmq.PULL)
        self._inbound.set_hwm(0)
        self._inbound.bind(to_core)
        self._executor = _WakingExecutor(executor, self._wake.set)
        self.core = EngineCore(config, self._executor, clock, self._post, len(from_core))
        self._sender = threading.Thread(target=self._send_all, name="core-output", daemon=True)
        self._receiver = threading.Thread(target=self._receive_all, name="core-input", daemon=True)

    def _post(self, front_end: int, data: bytes) -> None:
        self._outbox.put((front_end, data))

    def fail(self, error: BaseException | None) -> None:
        """End `run` with this error, also while nothing is in flight that could meet it; from any thread."""
        self._failure = error
        self._wake.set()

    def run(self) -> None:
        """Serve until told to shut down; an error of the loop reaches all front ends as Dead, then the caller."""
        self._sender.start()
        self._receiver.start()
        try:
            while not self.core.finished:
                self._wake.clear()
                if self._failure is not None:
                    raise self._failure
                if not self.core.step(self._clock.now()):
                    self._wake.wait(self.core.next_deadline(self._clock.now()))
        except BaseException as error:
            cause = str(error) if isinstance(error, RedlineError) else f"{type(error).__name__}: {error}"
            for front_end in range(len(self._from_core)):
                self._outbox.put((front_end, encode(Dead(cause))))
            raise
        finally:
            self._outbox.put(None)
            self._sender.join(timeout=2.0)
            self._executor.shutdown()
            self._context.term()

    def _receive_all(self) -> None:
        while True:
            try:
                data = self._inbound.recv()
            except zmq.ContextTerminated:
                self._inbound.close(linger=0)
                return
            try:
                self.core.receive(data)
            except Exception:
                log.exception("a message of %d bytes could not be taken", len(data))
            self._wake.set()

    def _send_all(self) -> None:
        sockets = []
        for address in self._from_core:
            socket = self._context.socket(zmq.PUSH)
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, LINGER_MS)
            socket.connect(address)
            sockets.append(socket)
        while (item := self._outbox.get()) is not None:
            front_end, data = item
            sockets[front_end].send(data)
        for socket in sockets:
            socket.close()
