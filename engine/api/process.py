"""One more API process of a server: `python -m engine.api.process`, started and ended by the first (see `run`).

It has a front-end number and a listening socket of its own and shares the counters. It gets its orders on stdin, then
lines: `lose REPLICA CAUSE`, `finish`, or `end CAUSE`; it never ends by itself but when it fails.
"""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from engine import children
from engine.api.options import HttpOptions
from engine.children import Failure
from engine.errors import EngineDeadError, RedlineError
from engine.frontend.connect import CoreAddress

if TYPE_CHECKING:
    from engine.frontend.connect import EngineClient


class Orders(msgspec.Struct):
    """All that a further API process must know; descriptors are those it inherits."""

    front_end: int
    front_ends: int
    names: tuple[str, ...]  # of the model
    tokenizer: str  # its folder
    tokenizer_mode: str
    chat_template: str | None
    seed: int
    cores: tuple[CoreAddress, ...]  # of all replicas
    routing: str
    sampling_defaults: dict[str, int | float]
    eos_ids: tuple[int, ...]  # beside the tokenizer's own
    created: int
    http: HttpOptions
    log_requests: bool
    first_sequence: int = 1  # of its requests' numbers; a process that follows one that died goes on far behind
    listener: int = -1
    boards: tuple[int, ...] = ()
    report: int = -1


class _Up(msgspec.Struct, tag="up"):
    pass


_reports: "msgspec.msgpack.Decoder[_Up | Failure]" = msgspec.msgpack.Decoder(_Up | Failure)


# ----------------------------------------------------------------------------------------------------- in the parent


class ApiProcess:
    """A further API process, as the first one sees it."""

    def __init__(self, orders: Orders, listener: socket.socket, boards: Sequence[int]):
        report_read, report_write = os.pipe()
        self._reports = os.fdopen(report_read, "rb")
        self._told = False
        orders.listener, orders.boards, orders.report = listener.fileno(), tuple(boards), report_write
        try:
            passed = (listener.fileno(), *boards, report_write)
            self._child = children.spawn("engine.api.process", orders, passed)
        finally:
            os.close(report_write)
        self.name = f"API process {orders.front_end} (process {self._child.pid})"

    @property
    def process_id(self) -> int:
        return self._child.pid

    def wait_up(self) -> None:
        """Block until it could serve; raises the RedlineError that says why it can't."""
        report = children.read_framed(self._reports, _reports)
        if not isinstance(report, _Up):
            self._child.wait()
            raise self._error(report)

    def watch(self, on_end: Callable[[str | None], None]) -> None:
        """Call back from a thread when it has ended; with the cause if it wasn't told to."""

        def wait() -> None:
            report = children.read_framed(self._reports, _reports)
            self._child.wait()
            on_end(None if self._told else str(self._error(report)))

        threading.Thread(target=wait, name="api-watch", daemon=True).start()

    def finish(self) -> None:
        """Let it end when its requests are done."""
        self._told = True
        self._say("finish")

    def lose(self, replica: int, cause: str) -> None:
        """Tell it that a replica is gone, and that others serve on."""
        self._say(f"lose {replica} {' '.join(cause.split())}")

    def end(self, cause: str) -> None:
        """Have it tell its clients the cause, and end."""
        self._told = True
        self._say(f"end {' '.join(cause.split())}")

    def kill(self) -> None:
        """End it by force, if it still runs; safe to call twice."""
        self._told = True
        self._child.kill()
        self._child.wait()
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):  # what it was told and didn't read
            self._child.stdin.close()
        self._reports.close()

    def _say(self, line: str) -> None:
        stdin = self._child.stdin
        assert stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it ended just now
            stdin.write(line.encode() + b"\n")
            stdin.flush()

    def _error(self, report: Any) -> RedlineError:
        if isinstance(report, Failure):
            error = report.error()
            return type(error)(f"{self.name}: {error}")
        return EngineDeadError(f"{self.name} {_how_it_ended(self._child)}")


def _how_it_ended(child: "subprocess.Popen[bytes]") -> str:
    return children.how_it_ended(child, "lower --api-servers or --kv-cache-memory-bytes")


# ------------------------------------------------------------------------------------------------------ in the child


def main() -> int:
    """The process, from orders on stdin to its end."""
    children.leave_signals_to_parent()
    orders = children.read_framed(sys.stdin.buffer, msgspec.msgpack.Decoder(Orders))
    if orders is None:
        return 1
    import uvloop

    from engine.frontend.logs import log_to_stderr

    log_to_stderr()
    with os.fdopen(orders.report, "wb") as report:

        def tell(message: _Up | Failure) -> None:
            with contextlib.suppress(BrokenPipeError):
                report.write(children.framed(message))
                report.flush()

        def run() -> None:
            client = connect(orders)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve(orders, client, lambda: tell(_Up())))

        return children.run_reporting(run, tell, "the API process")


def connect(orders: Orders) -> "EngineClient":
    from engine.frontend.connect import connect
    from engine.frontend.generation import GenerationDefaults
    from engine.frontend.stats import Board
    from engine.frontend.tokenizer import load_tokenizer

    vocab_size = orders.cores[0].ready.vocab_size
    folder = Path(orders.tokenizer)
    tokenizer, _ = load_tokenizer(folder, vocab_size, orders.tokenizer_mode, orders.chat_template)
    GenerationDefaults(eos_ids=orders.eos_ids).add_eos_ids(tokenizer, vocab_size)
    return connect(
        orders.cores,
        tokenizer,
        front_end=orders.front_end,
        first_sequence=orders.first_sequence,
        seed=orders.seed,
        routing=orders.routing,
        boards=[Board(orders.front_ends, board) for board in orders.boards],
    )


async def serve(orders: Orders, client: "EngineClient", up: Callable[[], None]) -> None:
    """Serve HTTP until the parent says otherwise."""
    from engine.api.server import LAST_WORDS_S, HttpSide
    from engine.api.state import ApiState
    from engine.frontend.logs import log_request

    loop = asyncio.get_running_loop()
    client.open()
    if orders.log_requests:
        client.on_ended = log_request
    state = ApiState(client, orders.names, orders.http, orders.created, sampling_defaults=orders.sampling_defaults)
    side = HttpSide(state, socket.socket(fileno=orders.listener))

    def obey(line: str) -> None:
        word, _, cause = line.partition(" ")
        if word == "lose":
            replica, _, cause = cause.partition(" ")
            client.lose(int(replica), cause)
        elif word == "end":
            client.die(cause)
            side.end(LAST_WORDS_S)
        else:
            side.finish()

    def on_line(line: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: it is ending anyway
            loop.call_soon_threadsafe(obey, line)

    def on_listening(_url: str) -> None:
        children.settle()
        up()

    children.end_with_parent(on_line)
    await side.serve(on_listening)


if __name__ == "__main__":
    sys.exit(main())
