"""The executor of several ranks on one machine: processes that get the same step messages and keep the same state.

With `--ablate driver-broadcast` only rank 0 gets them, and broadcasts inputs to the others (see driver_broadcast.py).
"""

import contextlib
import dataclasses
import logging
import selectors
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import msgspec

from engine.children import ChildProcess, Failure, Loading, Up, decode_report
from engine.config import DRIVER_BROADCAST, EngineConfig
from engine.errors import EngineDeadError, RedlineError, cause_of
from engine.model.model_info import ModelInfo
from engine.resolved_config import ResolvedConfig
from engine.worker.graph_capture import GraphCapture
from engine.worker.rank_protocol import (
    Call,
    CallResult,
    DeviceKind,
    FrameKind,
    PeerLostError,
    RankOptions,
    receive,
    sample_body,
    split_command,
)
from engine.worker.ring import Ring
from engine.worker.worker_start import StartReport

log = logging.getLogger("redline.core")

SHUTDOWN_S = 3.0  # for the step in progress, before ranks are killed
CAUSE_S = 2.0  # after a rank has lost another one, for that one's own report


class RankProcess(ChildProcess):
    """A rank; `socket` is the executor's end."""

    def __init__(self, options: RankOptions, socket: socket.socket, inherit: Sequence[int]):
        super().__init__(
            "engine.worker.rank",
            options,
            name=f"rank {options.rank}",
            inherit=inherit,
            memory_advice="lower --kv-cache-memory-bytes",
        )
        self.number = options.rank
        self.socket = socket


class MultiprocessExecutor:
    """Implements `engine.worker.executor.StartedExecutor`. The constructor waits until all ranks are up.

    Once a rank is gone, `ended` and all futures, pending and later ones, fail with an EngineDeadError that names it.
    One thread sends commands, so that a busy rank never blocks the caller. One receives the results, which come in
    order.

    Args:
        folder: for the file by which the ranks find each other; None: the system's folder for temporary files.
        progress: called from a thread with the bytes of weights that rank 0 has read so far and reads in total.
        device: what the ranks run on; None: the CPU.

    Raises the RedlineError of a rank that can't start.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_info: ModelInfo,
        resolved: ResolvedConfig,
        *,
        folder: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        device: DeviceKind | None = None,
    ) -> None:
        began = time.monotonic()
        self.ended: Future[None] = Future()
        self._lock = threading.Lock()
        self._error: RedlineError | None = None
        self._closing = False
        self._progress = progress
        self._device = device
        self._num_steps = 0
        self._capture: GraphCapture | None = None
        self._pending: deque[Future[Any]] = deque()
        self._outbox: SimpleQueue[tuple[FrameKind, bytes] | None] = SimpleQueue()
        # The first ranks get commands: only rank 0 if it drives the others, otherwise all.
        self._ring_readers = 1 if DRIVER_BROADCAST in config.ablations else config.tensor_parallel_size
        self._ring = Ring(self._ring_readers)
        self._started: Future[StartReport] = Future()
        self.ranks: list[RankProcess] = []
        self._threads = [
            threading.Thread(target=self._guard, args=(run,), name=name, daemon=True)
            for run, name in ((self._send_all, "ranks-output"), (self._receive_all, "ranks-input"))
        ]
        with tempfile.TemporaryDirectory(prefix="redline-ranks-", dir=folder) as store:
            try:
                for number in range(config.tensor_parallel_size):
                    self.ranks.append(self._start_rank(number, config, model_info, resolved, f"{store}/store"))
                for thread in self._threads:
                    thread.start()
                report = self._started.result()
            except BaseException:
                self.shutdown()
                raise
        self.seconds = {"start ranks": time.monotonic() - began - sum(report.seconds.values()), **report.seconds}
        self.kernels, self.warnings = report.kernels, report.warnings
        self.num_blocks, self.memory = report.num_blocks, report.memory
        if report.captures:
            self._capture = GraphCapture(self.call, lambda: self._num_steps)

    def submit(self, step: bytes) -> "Future[None]":
        """Queue an encoded StepMessage; its forward pass starts once the steps before it are done."""
        self._num_steps += 1
        return self._command(FrameKind.FORWARD, step)

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":
        """Sample a submitted step, before the next one is submitted; resolves to an encoded StepResult."""
        return self._command(FrameKind.SAMPLE, sample_body(step, masks))

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]":
        """Execute a call on all ranks between two steps; resolves to rank 0's result, or its RedlineError."""
        result: Future[Any] = Future()
        command = self._command(FrameKind.CALL, msgspec.msgpack.encode(Call(method, arguments)))
        command.add_done_callback(lambda done: _unpack_result(done, result))
        return result

    def shutdown(self) -> None:
        """End the ranks once the step in progress is done, or by force; queued steps are dropped."""
        if self._capture is not None:
            self._capture.close()
        with self._lock:
            self._closing = True
            dropped, self._pending = list(self._pending), deque()
        for future in dropped:
            future.cancel()
        self._outbox.put(None)
        self._ring.close()
        for rank in self.ranks:
            if rank.socket.fileno() >= 0:
                _close_output(rank.socket)
        self._reap(SHUTDOWN_S)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        for rank in self.ranks:
            rank.socket.close()

    def _command(self, kind: FrameKind, body: bytes) -> "Future[Any]":
        future: Future[Any] = Future()
        with self._lock:
            error = self._error
            if self._closing and error is None:
                error = EngineDeadError("the ranks were shut down")
            if error is None:
                self._pending.append(future)
                self._outbox.put((kind, body))
        if error is not None:
            future.set_exception(error)
        return future

    def _start_rank(
        self, number: int, config: EngineConfig, model_info: ModelInfo, resolved: ResolvedConfig, store: str
    ) -> RankProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            reads_ring = number < self._ring_readers
            options = RankOptions(
                rank=number,
                config=config.describe(),
                model_info={**dataclasses.asdict(model_info), "path": str(model_info.path)},
                resolved=dataclasses.asdict(resolved),
                store=store,
                socket_fd=theirs.fileno(),
                ring_fd=self._ring.descriptor if reads_ring else None,
                ring_readers=self._ring_readers,
                device=self._device,
            )
            inherit = (theirs.fileno(), self._ring.descriptor) if reads_ring else (theirs.fileno(),)
            return RankProcess(options, ours, inherit)

    # ------------------------------------------------------------------------------------------------------- threads

    def _guard(self, run: Callable[[], None]) -> None:
        """Run a thread. If it fails, the ranks can't be used any more."""
        try:
            run()
        except BaseException as error:
            if self._closing:
                return
            log.exception("a thread that serves the ranks failed")
            self._fail(EngineDeadError(f"the ranks can't be reached any more: {cause_of(error)}"))

    def _send_all(self) -> None:
        while (command := self._outbox.get()) is not None:
            for header, body in split_command(*command, self._ring.size // 2):
                if not self._ring.write(body):
                    return
                for rank in self.ranks[: self._ring_readers]:
                    try:
                        rank.socket.sendall(header)
                    except OSError:  # it is gone: the other thread finds the cause
                        return

    def _receive_all(self) -> None:
        up: dict[int, Up] = {}
        with selectors.DefaultSelector() as selector:
            for rank in self.ranks:
                selector.register(rank.socket, selectors.EVENT_READ, rank)
            while True:
                rank, frame = _next_frame(selector)
                if frame is None:
                    failure = None
                    break
                kind, body = frame
                if kind is not FrameKind.REPORT:
                    self._resolve(None if kind is FrameKind.FORWARD_DONE else body)
                    continue
                report = decode_report(body)
                if isinstance(report, Failure):
                    failure = report
                    break
                if isinstance(report, Loading):
                    if self._progress is not None:
                        self._progress(report.done, report.total)
                    continue
                up[rank.number] = report
                if len(up) == len(self.ranks):
                    self._started.set_result(up[0].read(StartReport))
            if not self._closing:
                self._fail(self._cause(selector, rank, failure))

    def _resolve(self, value: bytes | None) -> None:
        """Resolve the oldest pending future."""
        with self._lock:
            future = self._pending.popleft() if self._pending else None
        if future is not None and future.set_running_or_notify_cancel():
            future.set_result(value)

    def _cause(self, selector: selectors.BaseSelector, rank: RankProcess, failure: Failure | None) -> RedlineError:
        """The cause, from the first rank that failed or ended. If it only lost another rank, from that one."""
        deadline = time.monotonic() + CAUSE_S
        selector.unregister(rank.socket)
        while failure is not None and failure.kind == PeerLostError.__name__:
            try:
                other, frame = _next_frame(selector, deadline - time.monotonic())
            except TimeoutError:
                break
            report = None if frame is None else _failure_in(*frame)
            if frame is None or report is not None:
                rank, failure = other, report
                selector.unregister(rank.socket)
        if failure is None and not rank.wait(CAUSE_S):
            rank.kill()
            rank.wait()
        return rank.error(failure)

    def _fail(self, error: RedlineError) -> None:
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            pending, self._pending = list(self._pending), deque()
        self._outbox.put(None)
        self._ring.close()
        self._reap(0.0)
        if not self._started.done():
            self._started.set_exception(error)
        for future in pending:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        self.ended.set_exception(error)

    def _reap(self, timeout_s: float) -> None:
        """Wait for the ranks to end, and kill those that don't."""
        deadline = time.monotonic() + timeout_s
        for rank in self.ranks:
            if not rank.wait(max(0.0, deadline - time.monotonic())):
                rank.kill()
                rank.wait()
            rank.close()


def _unpack_result(done: "Future[bytes]", result: "Future[Any]") -> None:
    if done.cancelled():
        result.cancel()
        return
    error = done.exception()
    if error is None:
        try:
            found = msgspec.msgpack.decode(done.result(), type=CallResult)
        except msgspec.MsgspecError as unreadable:
            result.set_exception(EngineDeadError(f"a rank's answer can't be read: {unreadable}"))
            return
        if found.failure is None:
            result.set_result(found.result)
            return
        error = found.failure.error()
    result.set_exception(error)


def _failure_in(kind: FrameKind, body: bytes) -> Failure | None:
    report = decode_report(body) if kind is FrameKind.REPORT else None
    return report if isinstance(report, Failure) else None


def _next_frame(
    selector: selectors.BaseSelector, timeout: float | None = None
) -> tuple[RankProcess, tuple[FrameKind, bytes] | None]:
    """The next frame of any rank; None: that rank has ended. Raises TimeoutError if there is none in time."""
    ready = selector.select(timeout)
    if not ready:
        raise TimeoutError
    rank: RankProcess = ready[0][0].data
    return rank, receive(rank.socket)


def _close_output(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other end is gone already
        end.shutdown(socket.SHUT_WR)
