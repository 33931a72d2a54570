"""The executor of several ranks: symmetric worker processes that get the same step messages and keep their state.

Or, with `--ablate driver-broadcast`, rank 0 with others that do what it tells them (see broadcast.py).
"""

import contextlib
import dataclasses
import logging
import selectors
import socket
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import msgspec

from engine import children
from engine.config import DRIVER_BROADCAST, EngineConfig, ResolvedConfig
from engine.errors import EngineDeadError, RedlineError, cause_of
from engine.model.facts import ModelFacts
from engine.worker.ring import Ring
from engine.worker.wire import Answer, Call, Failed, Kind, Orders, Up, parts, read_loaded, receive, sample_body

log = logging.getLogger("redline.core")

SHUTDOWN_S = 3.0  # for the step in progress, before ranks are ended by force
CAUSE_S = 2.0  # how long a rank that lost another waits for that one's own cause

_up = msgspec.msgpack.Decoder(Up)
_failed = msgspec.msgpack.Decoder(Failed)


@dataclass(frozen=True, slots=True)
class _Rank:
    number: int
    process: "subprocess.Popen[bytes]"
    socket: socket.socket

    @property
    def name(self) -> str:
        return f"rank {self.number} (process {self.process.pid})"


class MultiprocessExecutor:
    """Starts the ranks and waits until all are up; raises the RedlineError that says why one can't.

    Once a rank is gone, `ended` and all futures, pending and later, fail with an EngineDeadError that names it. One
    thread sends, so that a busy rank never holds up the caller; one takes the answers, which come in order. `folder`
    is where the ranks find each other; None: the system's for temporary files. `progress` hears, from a thread, how
    many bytes of the weights rank 0 has read, and how many there are.
    """

    def __init__(
        self,
        config: EngineConfig,
        facts: ModelFacts,
        resolved: ResolvedConfig,
        *,
        folder: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        began = time.monotonic()
        self.ended: Future[None] = Future()
        self._lock = threading.Lock()
        self._error: RedlineError | None = None
        self._closing = False
        self._progress = progress
        self._pending: deque[Future[Any]] = deque()
        self._outbox: SimpleQueue[tuple[Kind, bytes] | None] = SimpleQueue()
        # Rank 0 alone where it drives the others, as V0's did; else all.
        self._listeners = 1 if DRIVER_BROADCAST in config.ablations else config.tensor_parallel_size
        self._ring = Ring(self._listeners)
        self._started: Future[Up] = Future()
        self._ranks: list[_Rank] = []
        self._threads = [
            threading.Thread(target=self._guard, args=(run,), name=name, daemon=True)
            for run, name in ((self._send_all, "ranks-output"), (self._receive_all, "ranks-input"))
        ]
        with tempfile.TemporaryDirectory(prefix="redline-ranks-", dir=folder) as meeting:
            try:
                for number in range(config.tensor_parallel_size):
                    self._ranks.append(self._start_rank(number, config, facts, resolved, f"{meeting}/store"))
                for thread in self._threads:
                    thread.start()
                up = self._started.result()
            except BaseException:
                self.shutdown()
                raise
        self.seconds = {"start ranks": time.monotonic() - began - sum(up.seconds.values()), **up.seconds}
        self.kernels, self.warnings = up.kernels, up.warnings

    @property
    def process_ids(self) -> list[int]:
        """Of the ranks, in order."""
        return [rank.process.pid for rank in self._ranks]

    def submit(self, step: bytes) -> "Future[None]":
        """Hand over an encoded StepMessage; the forward pass starts as soon as the steps before it are done."""
        return self._order(Kind.FORWARD, step)

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":
        """Sample a submitted step, before the next one is submitted; resolves to an encoded StepResult."""
        return self._order(Kind.SAMPLE, sample_body(step, masks))

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]":
        """Have all ranks do what isn't a step, between steps; resolves to rank 0's answer, or its RedlineError."""
        answer: Future[Any] = Future()
        order = self._order(Kind.CALL, msgspec.msgpack.encode(Call(method, arguments)))
        order.add_done_callback(lambda done: _unpack_answer(done, answer))
        return answer

    def shutdown(self) -> None:
        """End the ranks once the step in progress is done, or by force; steps that wait are dropped."""
        with self._lock:
            self._closing = True
            dropped, self._pending = list(self._pending), deque()
        for future in dropped:
            future.cancel()
        self._outbox.put(None)
        self._ring.close()
        for rank in self._ranks:
            if rank.socket.fileno() >= 0:
                _close_output(rank.socket)
        self._reap(SHUTDOWN_S)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        for rank in self._ranks:
            rank.socket.close()

    def _order(self, kind: Kind, body: bytes) -> "Future[Any]":
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
        self, number: int, config: EngineConfig, facts: ModelFacts, resolved: ResolvedConfig, store: str
    ) -> _Rank:
        ours, theirs = socket.socketpair()
        with theirs:
            shared = (theirs.fileno(), self._ring.descriptor)[: 2 if number < self._listeners else 1]
            orders = Orders(
                rank=number,
                config=config.describe(),
                facts={**dataclasses.asdict(facts), "path": str(facts.path)},
                resolved=dataclasses.asdict(resolved),
                store=store,
                socket_fd=theirs.fileno(),
                ring_fd=self._ring.descriptor if number < self._listeners else None,
                listeners=self._listeners,
            )
            process = children.spawn("engine.worker.rank", orders, shared)
        return _Rank(number, process, ours)

    # ------------------------------------------------------------------------------------------------------- threads

    def _guard(self, run: Callable[[], None]) -> None:
        """Run a thread without which the ranks can't be used: if it fails, so do they."""
        try:
            run()
        except BaseException as error:
            if self._closing:
                return
            log.exception("a thread that talks to the ranks failed")
            self._fail(EngineDeadError(f"the ranks can't be reached any more: {cause_of(error)}"))

    def _send_all(self) -> None:
        while (order := self._outbox.get()) is not None:
            for head, body in parts(*order, self._ring.size // 2):
                if not self._ring.write(body):
                    return
                for rank in self._ranks[: self._listeners]:
                    try:
                        rank.socket.sendall(head)
                    except OSError:  # it is gone: the other thread learns why
                        return

    def _receive_all(self) -> None:
        reports: dict[int, Up] = {}
        with selectors.DefaultSelector() as selector:
            for rank in self._ranks:
                selector.register(rank.socket, selectors.EVENT_READ, rank)
            while True:
                rank, answer = _next_answer(selector)
                if answer is None or answer[0] is Kind.FAILED:
                    break
                kind, body = answer
                if kind is Kind.LOADED:
                    if self._progress is not None:
                        self._progress(*read_loaded(body))
                elif kind is Kind.UP:
                    reports[rank.number] = _up.decode(body)
                    if len(reports) == len(self._ranks):
                        self._started.set_result(reports[0])
                else:
                    self._answer(body if kind in (Kind.RESULT, Kind.ANSWER) else None)
            if not self._closing:
                self._fail(self._cause(selector, rank, answer))

    def _answer(self, value: bytes | None) -> None:
        with self._lock:
            future = self._pending.popleft() if self._pending else None
        if future is not None and future.set_running_or_notify_cancel():
            future.set_result(value)

    def _cause(self, selector: selectors.BaseSelector, rank: _Rank, answer: tuple[Kind, bytes] | None) -> RedlineError:
        """Why the ranks can't go on, from the first bad news; if that one only lost another, from the other's."""
        failed = None if answer is None else _failed.decode(answer[1])
        deadline = time.monotonic() + CAUSE_S
        while failed is not None and failed.peer_lost:
            selector.unregister(rank.socket)
            try:
                next_rank, answer = _next_answer(selector, deadline - time.monotonic())
            except TimeoutError:
                break
            if answer is None or answer[0] is Kind.FAILED:
                rank, failed = next_rank, None if answer is None else _failed.decode(answer[1])
        if failed is None:
            try:
                rank.process.wait(CAUSE_S)
            except subprocess.TimeoutExpired:
                rank.process.kill()
            rank.process.wait()
            return EngineDeadError(
                f"{rank.name} {children.how_it_ended(rank.process, 'lower --kv-cache-memory-bytes')}"
            )
        error = failed.failure.error()
        return type(error)(f"{rank.name}: {error}")

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

    def _reap(self, patience_s: float) -> None:
        """Wait for the ranks to end, and kill those that don't."""
        deadline = time.monotonic() + patience_s
        for rank in self._ranks:
            try:
                rank.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()
            if rank.process.stdin is not None:
                rank.process.stdin.close()


def _unpack_answer(done: "Future[bytes]", answer: "Future[Any]") -> None:
    if done.cancelled():
        answer.cancel()
        return
    error = done.exception()
    if error is None:
        try:
            found = msgspec.msgpack.decode(done.result(), type=Answer)
        except msgspec.MsgspecError as unreadable:
            answer.set_exception(EngineDeadError(f"a rank's answer can't be read: {unreadable}"))
            return
        if found.failure is None:
            answer.set_result(found.result)
            return
        error = found.failure.error()
    answer.set_exception(error)


def _next_answer(
    selector: selectors.BaseSelector, timeout: float | None = None
) -> tuple[_Rank, tuple[Kind, bytes] | None]:
    """A rank that has something to say, and what; None: it has ended. Raises TimeoutError if there is none."""
    ready = selector.select(timeout)
    if not ready:
        raise TimeoutError
    rank: _Rank = ready[0][0].data
    return rank, receive(rank.socket)


def _close_output(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other end is gone already
        end.shutdown(socket.SHUT_WR)
