import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.target.server import ServerProcess
from tests.bench.loadgen.process import KnownServer

STUB = Path(__file__).with_name("queue_server.py")


@pytest.fixture
def queue_server(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts a queue_server.py with the flags given and hands back the running process."""
    with ExitStack() as stack:

        def start(*flags: str) -> ServerProcess:
            command = [sys.executable, str(STUB), "--port", "{port}", *flags]
            return stack.enter_context(ServerProcess(command, tmp_path / "server.log", start_limit_s=60))

        yield start


@pytest.fixture
def known_server(tmp_path: Path) -> Iterator[KnownServer]:
    """A server that logs what it truly sent, and the load generator pointed at it."""
    server = KnownServer(tmp_path)
    yield server
    server.stop()
