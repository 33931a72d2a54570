"""The executor of several ranks: processes that get the same step messages and keep the same state.

How they are reached is up to the links (see rank_links.py); this module has the order of commands and results, and what
happens when a rank is gone. With `--ablate driver-broadcast` only rank 0 gets commands, and broadcasts inputs to the
others (see driver_broadcast.py).
"""

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import msgspec

from engine.children import Failure, Loading, Up, decode_report
from engine.config import DRIVER_BROADCAST, EngineConfig
from engine.errors import EngineDeadError, RedlineError, cause_of
from engine.model.model_info import ModelInfo
from engine.resolved_config import ResolvedConfig
from engine.worker.graph_capture import GraphCapture
from engine.worker.local_links import LocalLinks
from engine.worker.rank_links import Gone, LinkedRank, RankLinks
from engine.worker.rank_protocol import (
    Call,
    CallResult,
    DeviceKind,
    Frame,
    FrameKind,
    PeerLostError,
    RankOptions,
    sample_body,
)
from engine.worker.worker_start import StartReport

log = logging.getLogger("redline.core")

SHUTDOWN_S = 3.0  # for the step in progress, before ranks are killed
CAUSE_S = 2.0  # after a rank has lost another one, for that one's own report
KILL_S = 2.0  # for the end of a rank that was killed, which can't be noticed if its machine is gone


class MultiprocessExecutor:
    """Implements `engine.worker.executor.StartedExecutor`. The constructor waits until all ranks are up.

    Once a rank is gone, `ended` and all futures, pending and later ones, fail with an EngineDeadError that names it.
    One thread sends commands, so that a busy rank never blocks the caller. One receives the results, which come in
    order from one rank (`EngineConfig.answering_rank`).

    Args:
        folder: for files of the ranks on this machine; None: the system's folder for temporary files.
        progress: called from a thread with the bytes of weights that rank 0 has read so far and reads in total.
        device: what the ranks run on; None: the CPU.
        links: to the ranks; None: to processes of this machine.

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
        links: RankLinks | None = None,
    ) -> None:
        began = time.monotonic()
        self.ended: Future[None] = Future()
        self._lock = threading.Lock()
        self._error: RedlineError | None = None
        self._closing = False
        self._progress = progress
        self._num_steps = 0
        self._capture: GraphCapture | None = None
        self._pending: deque[Future[Any]] = deque()
        self._on_blocks: Callable[[int, bytes], None] | None = None
        self._outbox: SimpleQueue[tuple[FrameKind, bytes] | None] = SimpleQueue()
        self._links = LocalLinks(folder) if links is None else links
        self._started: Future[list[StartReport]] = Future()
        self._threads = [
            threading.Thread(target=self._guard, args=(run,), name=name, daemon=True)
            for run, name in ((self._send_all, "ranks-output"), (self._receive_all, "ranks-input"))
        ]
        self._options = rank_options(config, model_info, resolved, device)
        try:
            self._links.start(self._options)
            for thread in self._threads:
                thread.start()
            reports = self._started.result()
        except BaseException:
            self.shutdown()
            raise
        report = reports[0]
        self.seconds = {"start ranks": time.monotonic() - began - sum(report.seconds.values()), **report.seconds}
        self.kernels, self.warnings = report.kernels, (*report.warnings, *_differences(reports))
        self.num_blocks, self.memory = report.num_blocks, report.memory
        if report.captures:
            self._capture = GraphCapture(self.call, lambda: self._num_steps)

    @property
    def ranks(self) -> Sequence[LinkedRank]:
        """In order of their numbers."""
        return self._links.ranks

    def submit(self, step: bytes) -> "Future[None]":
        """Queue an encoded StepMessage; its forward pass starts once the steps before it are done."""
        self._num_steps += 1
        return self._command(FrameKind.FORWARD, step)

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":
        """Sample a submitted step, before the next one is submitted; resolves to an encoded StepResult."""
        return self._command(FrameKind.SAMPLE, sample_body(step, masks))

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]":
        """Execute a call on all ranks between two steps; resolves to one rank's result, or its RedlineError."""
        result: Future[Any] = Future()
        command = self._command(FrameKind.CALL, msgspec.msgpack.encode(Call(method, arguments)))
        command.add_done_callback(lambda done: _unpack_result(done, result))
        return result

    def order_blocks(self, order: bytes) -> None:
        """See `engine.core.rank_files.BlockRanks`. Nothing happens once the ranks have ended."""
        self._outbox.put((FrameKind.BLOCKS, order))

    def listen_for_blocks(self, listener: Callable[[int, bytes], None]) -> None:
        """See `engine.core.rank_files.BlockRanks`."""
        self._on_blocks = listener

    def shutdown(self) -> None:
        """End the ranks once the step in progress is done, or by force, and drop queued steps; may be called twice."""
        if self._capture is not None:
            self._capture.close()
        with self._lock:
            if self._closing:
                return
            self._closing = True
            dropped, self._pending = list(self._pending), deque()
        for future in dropped:
            future.cancel()
        self._outbox.put(None)
        self._links.stop()
        if self._threads[0].ident is None:
            self._links.end()
        self._reap(SHUTDOWN_S)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._links.close()

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
        while (command := self._outbox.get()) is not None and not self._closing:
            if not self._links.send(*command):
                break
        self._links.end()

    def _receive_all(self) -> None:
        up: dict[int, StartReport] = {}
        while (received := self._links.next_frame()) is not None:
            number, frame = received
            if isinstance(frame, Gone):
                self._lose(number, frame)
                break
            kind, body = frame
            if kind is FrameKind.BLOCKS_DONE:
                assert self._on_blocks is not None, "nothing was ordered"
                self._on_blocks(number, body)
                continue
            if kind is not FrameKind.REPORT:
                self._resolve(None if kind is FrameKind.FORWARD_DONE else body)
                continue
            report = decode_report(body)
            if isinstance(report, Failure):
                self._lose(number, report)
                break
            if isinstance(report, Up):
                up[number] = report.read(StartReport)
                if len(up) == len(self._options):
                    self._started.set_result([report for _, report in sorted(up.items())])
            elif isinstance(report, Loading) and self._progress is not None:
                self._progress(report.done, report.total)

    def _lose(self, number: int, ended: Failure | Gone) -> None:
        if not self._closing:
            self._fail(self._cause(number, ended))

    def _resolve(self, value: bytes | None) -> None:
        """Resolve the oldest pending future."""
        with self._lock:
            future = self._pending.popleft() if self._pending else None
        if future is not None and future.set_running_or_notify_cancel():
            future.set_result(value)

    def _cause(self, number: int, ended: Failure | Gone) -> RedlineError:
        """The cause, from the first rank that failed or ended. If it only lost another rank, from that one."""
        deadline, known = time.monotonic() + CAUSE_S, {number}
        while isinstance(ended, Failure) and ended.kind == PeerLostError.__name__:
            try:
                received = self._links.next_frame(deadline - time.monotonic())
            except TimeoutError:
                break
            if received is None:
                break
            other, frame = received
            found = frame if isinstance(frame, Gone) else _failure_in(frame)
            if found is not None and other not in known:
                number, ended = other, found
                known.add(other)
        rank = self.ranks[number]
        if isinstance(ended, Failure):
            return rank.error(ended)
        if not rank.wait(CAUSE_S):
            rank.kill()
            if ended.why:
                return EngineDeadError(f"{rank.name} {ended.why}")
            rank.wait()
        return rank.error(None)

    def _fail(self, error: RedlineError) -> None:
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            pending, self._pending = list(self._pending), deque()
        self._outbox.put(None)
        self._links.stop()
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
        for rank in self.ranks:
            rank.wait(KILL_S)
            rank.close()


def rank_options(
    config: EngineConfig, model_info: ModelInfo, resolved: ResolvedConfig, device: DeviceKind | None
) -> list[RankOptions]:
    """The options of all ranks, without their links."""
    driven = DRIVER_BROADCAST in config.ablations
    return [
        RankOptions(
            rank=number,
            config=config.describe(),
            model_info={**dataclasses.asdict(model_info), "path": str(model_info.path)},
            resolved=dataclasses.asdict(resolved),
            answers=number == config.answering_rank,
            receives=number == 0 or not driven,
            device=device,
        )
        for number in range(config.num_ranks)
    ]


def _differences(reports: Sequence[StartReport]) -> list[str]:
    """The warning that machines of different kinds compute with different kernels."""
    ranks: dict[str, list[str]] = {}
    for number, report in enumerate(reports):
        ranks.setdefault(report.kernels, []).append(str(number))
    if len(ranks) == 1:
        return []
    found = "; ".join(f"ranks {', '.join(numbers)}: {kernels}" for kernels, numbers in ranks.items())
    return [f"ranks compute with different kernels ({found}): the slowest decides; --kernels chooses the same for all"]


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


def _failure_in(frame: Frame) -> Failure | None:
    report = decode_report(frame[1]) if frame[0] is FrameKind.REPORT else None
    return report if isinstance(report, Failure) else None
