"""One run of a server: its API processes in front of the engine, signals, deaths of processes, and the log."""

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import uvloop

from engine import children
from engine.api.http_options import HttpOptions
from engine.api.http_server import ERROR_GRACE_S, FORCED_GRACE_S, HttpServer
from engine.api.key_limit import KeyLoads
from engine.api.process import ApiProcessOptions
from engine.api.processes import ApiProcesses
from engine.api.replica_set import ReplicaSet
from engine.api.state import ApiState
from engine.api.tracing import make_traces
from engine.config import SHUTDOWN_TIMEOUT_S
from engine.errors import EngineDeadError
from engine.frontend.core_client import STOPPED
from engine.frontend.front_end_stats import Boards
from engine.frontend.listener import ClientListener, OutputRecord
from engine.frontend.logs import PERIOD_S, RequestLog, StatsLog
from engine.frontend.router import Router
from engine.phases import Phases, ledger_line
from engine.signals import EndRequests, exit_code_of
from engine.socket_folder import SocketFolder
from engine.start import Engine

log = logging.getLogger("redline.stats")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Settings of the HTTP server, without those of the engine."""

    http: HttpOptions = field(default_factory=HttpOptions)
    log_stats: bool = True
    log_requests: bool = True
    traces_endpoint: str | None = None  # of an OpenTelemetry collector
    shutdown_timeout_s: float = SHUTDOWN_TIMEOUT_S  # for running requests, after the first signal
    restart_on_failure: int | None = None  # restarts of each core, see ReplicaSet


class ServerRun(ClientListener):
    """Serves an engine on its listening sockets, one API process each. This process is the first of them."""

    _client: Router  # this and the next, once the event loop runs
    _http: HttpServer

    def __init__(
        self,
        engine: Engine,
        listeners: Sequence[socket.socket],
        options: ServeOptions,
        show_line: Callable[[str], None],
        phases: Phases,
    ):
        """`show_line` shows one line to the user; `phases` are those of the start so far."""
        self._engine = engine
        self._listener, *self._others = listeners
        self._options = options
        self._show_line = show_line
        self._phases = phases
        self._created = int(time.time())
        self._boards = Boards(len(listeners))
        endpoint = options.traces_endpoint
        self._traces = None if endpoint is None else make_traces(endpoint)
        self._records = RequestLog(logged=options.log_requests, traced=self._traces.add if self._traces else None)
        self._replicas = ReplicaSet(engine, self._boards, options.restart_on_failure)
        keys = len(options.http.api_keys)
        limited = options.http.limits.max_requests_per_key is not None and keys
        self._key_loads = KeyLoads(len(listeners), keys) if limited else None
        self._folder = SocketFolder() if self._others else None  # by which API processes share responses
        self._processes = ApiProcesses((), (), self._boards, self._replicas)
        self._cause_of_death: str | None = None
        self._signals = EndRequests()
        self._stopping = False  # at once, without waiting for requests

    def run(self) -> int:
        """Serve to the end; returns the exit code. Raises EngineDeadError if a process ended unexpectedly."""
        try:
            self._start_processes()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        finally:
            self._processes.kill()
            self._engine.stop()
            if self._folder is not None:
                self._folder.remove()
        if self._cause_of_death is not None:
            raise EngineDeadError(self._cause_of_death)
        return exit_code_of(self._signals.number) if self._signals.count > 1 else 0

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
                routing=engine.config.routing,
                sampling_defaults=engine.generation.sampling,
                eos_ids=engine.generation.eos_ids,
                created=self._created,
                http=self._options.http,
                log_requests=self._options.log_requests,
                traces_endpoint=self._options.traces_endpoint,
                mm=engine.mm,
                response_folder=self._folder.path if self._folder else "",
                key_loads=-1 if self._key_loads is None else self._key_loads.descriptor,
            )
            for front_end in range(1, 1 + len(self._others))
        ]
        self._processes = ApiProcesses(options, self._others, self._boards, self._replicas, self._key_loads)
        self._processes.wait_up()
        self._phases.end("start API processes")

    # ----------------------------------------------------------------------------------------- within the event loop

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        supervised = self._engine.supervise(self._boards)
        self._client = supervised.router
        config, defaults = self._engine.config, self._engine.generation.sampling
        folder = self._folder.path if self._folder else ""
        state = ApiState(
            self._client, config.names, self._options.http, self._created, defaults, response_folder=folder
        )
        state.key_loads, state.scaling = self._key_loads, self._replicas
        self._http = HttpServer(state, self._listener)
        self._client.open(self)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        self._replicas.open(supervised, self._processes, self._die)
        self._processes.watch(self._client, self._die)
        logging_stats = asyncio.ensure_future(self._log_stats())
        try:
            await self._http.serve(self._on_listening)
            await self._processes.ended()
        finally:
            logging_stats.cancel()
            if self._traces is not None:
                await asyncio.to_thread(self._traces.close)

    def _on_listening(self, url: str) -> None:
        children.freeze_heap()
        self._show_line(f"listening on {url}")
        self._phases.end("start the HTTP server")
        self._show_line(ledger_line(self._phases))

    async def _log_stats(self) -> None:
        if not self._options.log_stats:
            return
        client = self._client
        lines = StatsLog(client.clock.now(), client.total_stats.core)
        while True:
            await asyncio.sleep(PERIOD_S)
            stats = client.total_stats
            line = lines.line(client.clock.now(), stats.core, stats.held)
            if line is not None:
                log.info(line)

    # ------------------------------------------------------------------------------------------------------- signals

    def _on_signal(self, number: int) -> None:
        if not self._signals.add(number):
            return
        if self._signals.count > 1:
            self._stop(STOPPED, FORCED_GRACE_S)
            return
        seconds = self._options.shutdown_timeout_s
        if count := self._client.total_stats.num_open:
            what = f"{count} running request{'s' if count > 1 else ''}"
            self._show_line(f"finishing {what}, within {seconds:g} s; Ctrl-C again ends at once")
        self._http.finish()
        self._processes.finish()
        asyncio.get_running_loop().call_later(seconds, self._on_timeout, seconds)

    def _on_timeout(self, seconds: float) -> None:
        if self._stopping or self._cause_of_death is not None:
            return
        count = self._client.total_stats.num_open
        what = f"{count} request{'' if count == 1 else 's'}"
        self._show_line(f"aborted {what} not finished after {seconds:g} s (--shutdown-timeout)")
        self._stop(f"{STOPPED}: it had {seconds:g} s (--shutdown-timeout)", ERROR_GRACE_S)

    def _stop(self, cause: str, grace_s: float) -> None:
        self._stopping = True
        self._replicas.end()
        self._client.fail_all(cause)
        self._http.end(grace_s)
        self._processes.end(cause, grace_s)

    # -------------------------------------------------------------------------------------------------------- deaths

    def _die(self, cause: str) -> None:
        self._client.fail_all(cause)
        self._end_with(cause)  # also if the client is closed already, and others still finish

    # ----------------------------------------------------------------------------------------------- from the client

    @property
    def wants_records(self) -> bool:
        return self._records.wants_records

    def output_recorded(self, record: OutputRecord) -> None:
        self._records.output_recorded(record)

    def core_died(self, cause: str) -> None:
        self._end_with(cause)

    def _end_with(self, cause: str) -> None:
        if self._cause_of_death is not None or self._stopping:
            return
        self._cause_of_death = cause
        self._replicas.end()
        self._http.end(ERROR_GRACE_S)
        self._processes.end(cause, ERROR_GRACE_S)
