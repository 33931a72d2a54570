"""Runs the HTTP server in this process until a signal or the core's death ends it."""

import asyncio
import contextlib
import errno
import signal
import socket
import time
from collections.abc import Callable, Iterator

import uvicorn
import uvloop

from engine.api.app import create_app
from engine.api.state import ApiState
from engine.errors import EngineDeadError, RedlineError
from engine.frontend.start import Engine

KEEP_ALIVE_S = 75
# Streams that learn of the core's death, or of a second Ctrl-C, get so long to tell their clients.
LAST_WORDS_S = 2.0
FORCED_GRACE_S = 0.5
FORCED_EXIT = 130


def bind(host: str, port: int) -> socket.socket:
    """Take the port before a model is loaded for nothing; RedlineError if it can't be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise RedlineError(f"--host {host} can't be used: {error.strerror or error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise cannot_listen(host, port, error) from error
    return bound


def cannot_listen(host: str, port: int, error: OSError) -> RedlineError:
    if error.errno == errno.EADDRINUSE:
        return RedlineError(f"port {port} on {host} is in use: stop what listens there, or give another --port")
    return RedlineError(f"can't listen on {host}:{port}: {error.strerror or error} (--host, --port)")


class Server(uvicorn.Server):
    """uvicorn with our own handling of signals: the first lets requests finish, the second doesn't."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def end(self) -> None:
        self.should_exit = True

    def end_now(self) -> None:
        self.should_exit = self.force_exit = True


class ServerRun:
    """One run of a server."""

    def __init__(
        self,
        engine: Engine,
        listener: socket.socket,
        api_key: str | None,
        say: Callable[[str], None],
    ):
        """`say` shows one line to the user."""
        self._engine = engine
        self._listener = listener
        self._api_key = api_key
        self._say = say
        self._cause_of_death: str | None = None
        self._signals = 0

    def run(self) -> int:
        """Serve to the end; returns the exit code. EngineDeadError if the core ended first."""
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        finally:
            self._engine.core.stop()
        if self._cause_of_death is not None:
            raise EngineDeadError(self._cause_of_death)
        return FORCED_EXIT if self._signals > 1 else 0

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        client = self._engine.connect()
        client.open()
        state = ApiState(client, (self._engine.config.name,), self._api_key, created=int(time.time()))
        settings = uvicorn.Config(
            create_app(state),
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        server = Server(settings)

        def on_signal() -> None:
            self._signals += 1
            if self._signals > 1:
                client.close()
                loop.call_later(FORCED_GRACE_S, server.end_now)
                return
            count = client.live_count()
            if count:
                self._say(f"finishing {count} running request(s); Ctrl-C again ends at once")
            server.end()

        def on_death(cause: str) -> None:
            self._cause_of_death = cause
            server.end()
            loop.call_later(LAST_WORDS_S, server.end_now)

        client.on_death = on_death
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        self._engine.core.watch(client.die_threadsafe)
        host, port = self._listener.getsockname()[:2]
        serving = asyncio.ensure_future(server.serve(sockets=[self._listener]))
        try:
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            if server.started:
                self._say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")
            await serving
        except OSError as error:
            raise cannot_listen(host, port, error) from error
        finally:
            client.close()
