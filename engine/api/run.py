"""One run of a server: the API processes in front of one core, signals, deaths, and the log."""

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import uvloop

from engine import children
from engine.api.options import HttpOptions
from engine.api.process import ApiProcessOptions
from engine.api.processes import ApiProcesses, threadsafe
from engine.api.server import FORCED_GRACE_S, LAST_WORDS_S, HttpSide
from engine.api.state import ApiState
from engine.config import SHUTDOWN_TIMEOUT_S
from engine.errors import EngineDeadError
from engine.frontend.client import STOPPED
from engine.frontend.connect import EngineClient
from engine.frontend.logs import PERIOD_S, StatsLog, log_request
from engine.frontend.stats import Board
from engine.start import Engine

log = logging.getLogger("redline.stats")

FORCED_EXIT = 130


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What concerns the HTTP side alone."""

    http: HttpOptions = field(default_factory=HttpOptions)
    log_stats: bool = True
    log_requests: bool = True
    shutdown_timeout_s: float = SHUTDOWN_TIMEOUT_S  # for running requests, after the first signal


class ServerRun:
    """Serves an engine on its listening sockets, one API process each: this process is the first of them.

    `say` shows one line to the user.
    """

    def __init__(
        self,
        engine: Engine,
        listeners: Sequence[socket.socket],
        options: ServeOptions,
        say: Callable[[str], None],
    ):
        self._engine = engine
        self._listener, *self._others = listeners
        self._options = options
        self._say = say
        self._created = int(time.time())
        self._boards = [Board(len(listeners)) for _ in engine.cores]
        self._lost: set[int] = set()  # replicas
        self._processes = ApiProcesses((), (), ())
        self._cause_of_death: str | None = None
        self._signals = 0
        self._stopping = False  # at once, whatever runs

    def run(self) -> int:
        """Serve to the end; returns the exit code. EngineDeadError if a process ended that nobody told to."""
        try:
            self._start_processes()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        finally:
            self._processes.kill()
            self._engine.stop()
        if self._cause_of_death is not None:
            raise EngineDeadError(self._cause_of_death)
        return FORCED_EXIT if self._signals > 1 else 0

    def _start_processes(self) -> None:
        engine = self._engine
        options = [
            ApiProcessOptions(
                front_end=front_end,
                front_ends=1 + len(self._others),
                names=engine.config.names,
                tokenizer=engine.config.tokenizer or engine.config.model,
                tokenizer_mode=engine.config.tokenizer_mode,
                chat_template=engine.config.chat_template,
                seed=engine.config.seed,
                cores=engine.addresses(front_end),
                routing=engine.config.routing,
                sampling_defaults=engine.generation.sampling,
                eos_ids=engine.generation.eos_ids,
                created=self._created,
                http=self._options.http,
                log_requests=self._options.log_requests,
            )
            for front_end in range(1, 1 + len(self._others))
        ]
        self._processes = ApiProcesses(options, self._others, self._boards)
        self._processes.wait_up()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        client = self._engine.connect(self._boards)
        client.open()
        if self._options.log_requests:
            client.on_ended = log_request
        config, defaults = self._engine.config, self._engine.generation.sampling
        state = ApiState(client, config.names, self._options.http, self._created, sampling_defaults=defaults)
        side = HttpSide(state, self._listener)

        def stop(cause: str, grace_s: float) -> None:
            self._stopping = True
            client.die(cause)
            side.end(grace_s)
            self._processes.end(cause, grace_s)

        def on_signal() -> None:
            self._signals += 1
            if self._signals > 1:
                stop(STOPPED, FORCED_GRACE_S)
                return
            seconds = self._options.shutdown_timeout_s
            count = client.total_stats.live
            if count:
                self._say(f"finishing {count} running request(s), for {seconds:g} s at most; Ctrl-C again ends at once")
            side.finish()
            self._processes.finish()
            loop.call_later(seconds, on_timeout, seconds)

        def on_timeout(seconds: float) -> None:
            if self._stopping or self._cause_of_death is not None:
                return
            count = client.total_stats.live
            self._say(f"{count} request(s) not done after {seconds:g} s (--shutdown-timeout): aborted")
            stop(f"{STOPPED}: it had {seconds:g} s (--shutdown-timeout)", LAST_WORDS_S)

        def on_death(cause: str) -> None:
            if self._cause_of_death is not None or self._stopping:
                return
            self._cause_of_death = cause
            side.end(LAST_WORDS_S)
            self._processes.end(cause, LAST_WORDS_S)

        def die(cause: str) -> None:
            client.die(cause)
            on_death(cause)  # also where the client is closed already, and others still finish

        client.on_death = on_death
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        lose = threadsafe(lambda lost: self._lose(client, lost[0], lost[1], die))
        self._engine.watch(lambda *lost: lose(lost))
        self._processes.watch(client, die)
        logging_stats = asyncio.ensure_future(self._log_stats(client))
        try:
            await side.serve(self._on_listening)
            await self._processes.ended()
        finally:
            logging_stats.cancel()

    def _lose(self, client: EngineClient, replica: int, cause: str, die: Callable[[str], None]) -> None:
        """A core is gone; with the last one all ends."""
        self._lost.add(replica)
        count = len(self._engine.cores)
        if len(self._lost) == count:
            die(cause if count == 1 else f"no replica is left; replica {replica}: {cause}")
            return
        client.lose(replica, cause)
        self._processes.lose(replica, cause)

    def _on_listening(self, url: str) -> None:
        children.freeze_heap()
        self._say(f"listening on {url}")

    async def _log_stats(self, client: EngineClient) -> None:
        if not self._options.log_stats:
            return
        lines = StatsLog(client.clock.now(), client.total_stats.core)
        while True:
            await asyncio.sleep(PERIOD_S)
            line = lines.line(client.clock.now(), client.total_stats.core)
            if line is not None:
                log.info(line)
