"""Generators in threads of this process."""

import math
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from bench.generators import Generators, clocks
from bench.generators.listener import Listener
from tests.bench.generators.process import TOKEN


@pytest.fixture
def patient_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a round trip may take long, which says nothing about the clocks: all are that of this host."""
    monkeypatch.setattr(clocks, "LIMIT_S", math.inf)


@pytest.fixture
def listeners() -> Iterator[Callable[..., list[Listener]]]:
    """Starts generators in threads of this process."""
    found: list[Listener] = []

    def start(count: int, tls: ssl.SSLContext | None = None) -> list[Listener]:
        mine = [Listener("127.0.0.1", 0, TOKEN.encode(), tls, lambda _: None) for _ in range(count)]
        for one in mine:
            threading.Thread(target=one.serve, daemon=True).start()
        found.extend(mine)
        return mine

    yield start
    for one in found:
        one.close()


@pytest.fixture
def generators(listeners: Callable[..., list[Listener]]) -> Iterator[Callable[..., Generators]]:
    """Connects to generators that are started for it."""
    with ExitStack() as stack:

        def connect(count: int, seed: int = 0) -> Generators:
            addresses = [("127.0.0.1", one.port) for one in listeners(count)]
            made = stack.enter_context(Generators(addresses, TOKEN.encode(), seed=seed))
            made.connect()
            return made

        yield connect
