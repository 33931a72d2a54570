"""A further API process of a server: `python -m engine.api.process`, started and ended by the first (see `run`).

It has its own front-end number and listening socket, and shares the counters. After its options it gets lines on stdin:
`replica EVENT`, `scale STATE` (both encoded), `finish`, or `end CAUSE`. It sends notes: Drained, ScaleAsked. It ends by
itself only if it fails.
"""

import asyncio
import base64
import contextlib
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from engine import children
from engine.api.http_options import HttpOptions
from engine.api.scale_state import RemoteScaling, ScaleState
from engine.children import Failure, Note, Report, ReportingChild, Up
from engine.frontend.mm_pipeline import MMOptions
from engine.frontend.replica_events import ReplicaEvent
from engine.frontend.transport import CoreAddress

if TYPE_CHECKING:
    from engine.frontend.connect import SupervisedClient


class ApiProcessOptions(children.PipeOptions):
    """Everything that a further API process must know. It inherits the descriptors."""

    front_end: int
    front_ends: int
    names: tuple[str, ...]  # of the model
    tokenizer: str  # its folder
    tokenizer_mode: str
    chat_template: str | None
    seed: int
    routing: str
    sampling_defaults: dict[str, int | float]
    eos_ids: tuple[int, ...]  # in addition to the tokenizer's
    created: int
    http: HttpOptions
    log_requests: bool
    traces_endpoint: str | None = None  # of an OpenTelemetry collector
    mm: MMOptions | None = None
    first_sequence: int = 1  # of its requests; the successor of a dead process continues far above
    listener: int = -1
    boards: int = -1
    cores: dict[int, CoreAddress] = msgspec.field(default_factory=dict)  # by replica, those that do not serve included
    events: tuple[ReplicaEvent, ...] = ()  # what must be known of replicas besides
    scale_state: ScaleState = ScaleState(0, 1)
    response_folder: str = ""  # of the sockets by which API processes share responses
    key_loads: int = -1  # the requests of each API key, if they are limited


class Drained(msgspec.Struct, tag="drained"):
    """A draining replica gets no requests from this process, and has none of it."""

    replica: int
    drain: int  # its number


class ScaleAsked(msgspec.Struct, tag="scale"):
    """A client has asked for a number of replicas; `number` is that of its request."""

    number: int
    target: int
    drain_timeout: float | None  # seconds


ApiNote: TypeAlias = Drained | ScaleAsked

# ----------------------------------------------------------------------------------------------------- in the parent


def _ignore(_note: ApiNote) -> None:
    """A note that comes while the server starts: it has none to drain."""


class ApiProcess(ReportingChild):
    """A further API process, as the first one sees it."""

    def __init__(self, options: ApiProcessOptions, listener: socket.socket, boards: int):
        self._stopping = False
        self.on_note: Callable[[ApiNote], None] = _ignore  # called from a thread
        options.listener, options.boards = listener.fileno(), boards
        super().__init__(
            "engine.api.process",
            options,
            name=f"API process {options.front_end}",
            inherit=(listener.fileno(), boards, *([options.key_loads] if options.key_loads >= 0 else [])),
            memory_advice="lower --api-servers or --kv-cache-memory-bytes",
        )

    def wait_up(self) -> None:
        """Block until it is ready to serve; raises its RedlineError if it is not."""
        report = self._next_report()
        if not isinstance(report, Up):
            self.wait()
            raise self.error(report if isinstance(report, Failure) else None)

    def watch(self, on_end: Callable[[str | None], None]) -> None:
        """Call back from a thread when it has ended: with the cause, or None after `finish` or `end`."""

        def wait() -> None:
            report = self._next_report()
            self.wait()
            error = self.error(report if isinstance(report, Failure) else None)
            on_end(None if self._stopping else str(error))

        threading.Thread(target=wait, name="api-watch", daemon=True).start()

    def _next_report(self) -> Report | None:
        """The next report that is no note."""
        while isinstance(report := self.next_report(), Note):
            self.on_note(report.read(ApiNote))
        return report

    def finish(self) -> None:
        """Let it end when its requests are done."""
        self._stopping = True
        self.send_line("finish")

    def announce(self, event: ReplicaEvent) -> None:
        """Notify it of a change of a replica."""
        self.send_line(f"replica {_encoded(event)}")

    def announce_state(self, state: ScaleState) -> None:
        """Notify it how many replicas there are to be."""
        self.send_line(f"scale {_encoded(state)}")

    def end(self, cause: str) -> None:
        """Have it report the cause to its clients, and end."""
        self._stopping = True
        self.send_line(f"end {' '.join(cause.split())}")

    def end_by_force(self) -> None:
        """End it at once, if it still runs; safe to call twice."""
        self._stopping = True
        self.kill()
        self.wait()
        self.close()


def _encoded(message: Any) -> str:
    return base64.b64encode(msgspec.msgpack.encode(message)).decode()


# ------------------------------------------------------------------------------------------------------ in the child


def main() -> int:
    """The process, from its options on stdin to its end."""
    options = children.read_options(ApiProcessOptions)
    if options is None:
        return 1
    import uvloop

    from engine.log_format import log_to_stderr

    log_to_stderr()

    def run() -> None:
        client = connect(options)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(options, client, send))

    with children.reports_to(options.report_fd) as send:
        return children.run_reporting(run, send, "the API process")


def connect(options: ApiProcessOptions) -> "SupervisedClient":
    from engine.frontend.connect import supervise
    from engine.frontend.front_end_stats import Boards
    from engine.frontend.generation_defaults import GenerationDefaults
    from engine.frontend.tokenizer import load_tokenizer

    vocab_size = next(iter(options.cores.values())).ready.vocab_size
    folder = Path(options.tokenizer)
    tokenizer, _ = load_tokenizer(folder, vocab_size, options.tokenizer_mode, options.chat_template)
    GenerationDefaults(eos_ids=options.eos_ids).add_eos_ids(tokenizer, vocab_size)
    return supervise(
        options.cores,
        tokenizer,
        Boards(options.front_ends, options.boards),
        front_end=options.front_end,
        first_sequence=options.first_sequence,
        seed=options.seed,
        routing=options.routing,
        mm=options.mm,
    )


async def serve(options: ApiProcessOptions, supervised: "SupervisedClient", send: children.Send) -> None:
    """Serve HTTP until the parent's `finish` or `end`."""
    from engine.api.http_server import ERROR_GRACE_S, HttpServer
    from engine.api.key_limit import KeyLoads
    from engine.api.state import ApiState
    from engine.api.tracing import make_traces
    from engine.frontend.logs import RequestLog

    loop = asyncio.get_running_loop()
    traces = None if options.traces_endpoint is None else make_traces(options.traces_endpoint)
    client = supervised.router
    client.on_drained = lambda replica, drain: send(Note.of(Drained(replica, drain)))
    client.open(RequestLog(logged=options.log_requests, traced=None if traces is None else traces.add))
    state = ApiState(
        client,
        options.names,
        options.http,
        options.created,
        options.sampling_defaults,
        process=options.front_end,
        response_folder=options.response_folder,
    )
    if options.key_loads >= 0:
        state.key_loads = KeyLoads(options.front_ends, len(options.http.api_keys), options.key_loads)
    scaling = state.scaling = RemoteScaling(
        options.front_end, options.scale_state, lambda number, *asked: send(Note.of(ScaleAsked(number, *asked)))
    )
    for event in options.events:
        supervised.apply(event)
    server = HttpServer(state, socket.socket(fileno=options.listener))

    def execute(line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "replica":
            supervised.apply(msgspec.msgpack.decode(base64.b64decode(rest), type=ReplicaEvent))
        elif word == "scale":
            scaling.state_changed(msgspec.msgpack.decode(base64.b64decode(rest), type=ScaleState))
        elif word == "end":
            client.fail_all(rest)
            server.end(ERROR_GRACE_S)
        else:
            server.finish()

    def on_line(line: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: it is ending anyway
            loop.call_soon_threadsafe(execute, line)

    def on_listening(_url: str) -> None:
        children.freeze_heap()
        send(Up())

    children.end_with_parent(on_line)
    try:
        await server.serve(on_listening)
    finally:
        if traces is not None:
            await asyncio.to_thread(traces.close)


if __name__ == "__main__":
    sys.exit(main())
