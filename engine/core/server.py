"""Threads and sockets around an EngineCore: one thread receives, one sends, the caller's thread runs the loop."""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import zmq

from engine.children import RankHandle
from engine.clock import Clock
from engine.core.disaggregated_core import DisaggregatedCore
from engine.core.engine import EngineCore
from engine.core.feature_mirror import FeatureMirror
from engine.core.grammar_compiler import Vocabulary
from engine.core.grammars import GrammarManager, no_vocabulary
from engine.core.protocols import Executor, InlineFrontEnd
from engine.core.watchdog import Watchdog, WatchedExecutor
from engine.errors import RedlineError, cause_of
from engine.messages import Dead, Hung, encode
from engine.multimodal.feature_files import unlink_features
from engine.resolved_config import ResolvedConfig

log = logging.getLogger("redline.core")

MAX_WATCHDOG_PERIOD_S = 1.0
LINGER_MS = 200  # for the last messages; a running front end receives them at once


class CoreServer:
    """Serves one EngineCore to its front ends over ZeroMQ.

    The core binds `to_core`, where it receives messages of all front ends; front end i binds `from_core[i]`. With
    `inline` the core tokenizes and detokenizes. `feature_folder` is where front ends put the features of multimodal
    inputs, if the model takes any. `load_vocabulary` is called when the first request has a grammar.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        executor: Executor,
        clock: Clock,
        to_core: str,
        from_core: tuple[str, ...],
        inline: InlineFrontEnd | None = None,
        *,
        feature_folder: str | None = None,
        load_vocabulary: Callable[[], Vocabulary] = no_vocabulary,
    ) -> None:
        self._clock = clock
        self._from_core = from_core
        self._wake = threading.Event()
        self._failure: BaseException | None = None
        self._ended = threading.Event()
        self._outbox: SimpleQueue[tuple[int, bytes] | None] = SimpleQueue()
        self._context = zmq.Context()
        self._inbound = self._context.socket(zmq.PULL)
        self._inbound.set_hwm(0)
        self._inbound.bind(to_core)
        self._executor = WatchedExecutor(executor, clock, self._wake.set)
        self._unlinker = ThreadPoolExecutor(1, thread_name_prefix="core-files")
        features = None if feature_folder is None else FeatureMirror(feature_folder, self._unlink)
        self._grammars = grammars = GrammarManager(load_vocabulary, self._wake.set)
        core_type = DisaggregatedCore if config.role else EngineCore
        self.core = core_type(config, self._executor, clock, self._post, len(from_core), inline, features, grammars)
        self._watchdog: Watchdog | None = None
        self._sender = self._thread(self._send_all, "core-output")
        self._receiver = self._thread(self._receive_all, "core-input")

    def _thread(self, run: Callable[[], None], name: str) -> threading.Thread:
        """Make a thread whose error ends the server."""

        def guarded() -> None:
            try:
                run()
            except BaseException as error:
                log.exception("the thread %s failed", name)
                self.fail(error)

        return threading.Thread(target=guarded, name=name, daemon=True)

    def _post(self, front_end: int, data: bytes) -> None:
        self._outbox.put((front_end, data))

    def _unlink(self, path: str) -> None:
        """Unlink a feature file on a thread: freeing its memory takes long enough to delay a step."""
        self._unlinker.submit(unlink_features, path)

    def wake(self) -> None:
        """Make the loop turn. May be called from any thread."""
        self._wake.set()

    def fail(self, error: BaseException | None) -> None:
        """End `run` with this error, even while no step is in flight. May be called from any thread."""
        self._failure = error
        self._wake.set()

    def watch(self, timeout_s: float, give_up: Callable[[str], None], ranks: Sequence[RankHandle] = ()) -> None:
        """Start a watchdog for the steps; called before `run`, with the arguments of `Watchdog`.

        `give_up` is called from the watchdog's thread and must end the process, since the loop itself may hang.
        """

        def send_status(cause: str) -> None:
            self._post_all(encode(Hung(cause)))

        self._watchdog = Watchdog(self._executor, timeout_s, ranks, send_status=send_status, give_up=give_up)
        period = min(timeout_s / 4, MAX_WATCHDOG_PERIOD_S)
        arguments = (self._watchdog, period)
        threading.Thread(target=self._run_watchdog, args=arguments, name="core-watchdog", daemon=True).start()

    def _run_watchdog(self, watchdog: Watchdog, period: float) -> None:
        while not self._ended.wait(period):
            watchdog.check(self._clock.now())

    def run(self) -> None:
        """Serve until a Shutdown is done; an error of the loop is sent to all front ends as Dead, then raised."""
        self._sender.start()
        self._receiver.start()
        try:
            while not self.core.finished:
                self._wake.clear()
                if self._failure is not None:
                    raise self._failure
                now = self._clock.now()
                if not self._step(now):
                    self._wake.wait(self.core.next_deadline(now))
        except BaseException as error:
            # The same text as in the process's last report (see engine.children.run_reporting).
            prefix = "" if isinstance(error, RedlineError) else "the EngineCore failed: "
            self._post_all(encode(Dead(prefix + cause_of(error))))
            raise
        finally:
            self._ended.set()
            self._outbox.put(None)
            self._sender.join(timeout=2.0)
            self._executor.shutdown()
            self._unlinker.shutdown()
            self._grammars.close()
            self._context.term()

    def _step(self, now: float) -> bool:
        watchdog = self._watchdog
        if watchdog is None:
            return self.core.step(now)
        watchdog.loop_busy_since = now
        moved = self.core.step(now)
        watchdog.loop_busy_since = None
        return moved

    def _post_all(self, data: bytes) -> None:
        for front_end in range(len(self._from_core)):
            self._outbox.put((front_end, data))

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
                log.exception("a message of %d bytes could not be processed", len(data))
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
            if 0 <= front_end < len(sockets):
                sockets[front_end].send(data)
            else:
                log.error("a message for front end %d was dropped: there are %d", front_end, len(sockets))
        for socket in sockets:
            socket.close()
