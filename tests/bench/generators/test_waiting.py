"""Runs that cannot reach a generator yet, or not at all: they wait, and name what to check."""

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.generators import Generators, LostGeneratorError, Waiting
from bench.generators.listener import Listener
from bench.target import Target
from tests.bench.generators.process import TOKEN
from tests.bench.generators.test_generators import EVER, Counting, specs

pytestmark = pytest.mark.usefixtures("patient_generator", "patient_clocks")

LONG_S = 600.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port: int = closed.getsockname()[1]
    return port


def start(port: int) -> Listener:
    listener = Listener("127.0.0.1", port, TOKEN.encode(), None, lambda _: None)
    threading.Thread(target=listener.serve, daemon=True).start()
    return listener


def test_a_generator_that_starts_after_the_run_is_waited_for(known_server: Any) -> None:
    port, said, started = free_port(), [], []

    def show(line: str) -> None:
        said.append(line)
        if not started:
            started.append(start(port))

    with Generators([("127.0.0.1", port)], TOKEN.encode(), waiting=Waiting(LONG_S, show)) as mine:
        mine.connect()
        target = Target(known_server.url, json.dumps({}))
        recording = mine.run_load(target, specs(2), np.zeros(2), observer=Counting(), time_limit_s=60)
        assert [row.status for row in recording.records(EVER)] == ["ok", "ok"]
    started[0].close()
    name = f"generator 127.0.0.1:{port}"
    waiting, connected = said
    assert waiting == f"waiting at most 600 s for {name}: it cannot be reached: connection refused"
    assert connected.startswith(f"{name}: connected after ")


def test_a_connection_that_is_lost_between_two_loads_is_made_again(known_server: Any) -> None:
    """Its generator is gone when the next load is prepared, and is back a little later."""
    port, said = free_port(), []
    listeners = [start(port)]
    target = Target(known_server.url, json.dumps({}))

    def show(line: str) -> None:
        said.append(line)
        if len(listeners) == 1:
            listeners.append(start(port))

    with Generators([("127.0.0.1", port)], TOKEN.encode(), waiting=Waiting(LONG_S, show)) as mine:
        mine.connect()
        channel = mine._all[0].channel
        listeners[0].close()
        channel.close()
        recording = mine.run_load(target, specs(2), np.zeros(2), observer=Counting(), time_limit_s=60)
        assert [row.status for row in recording.records(EVER)] == ["ok", "ok"]
    assert [line.startswith("waiting") for line in said] == [True, False]
    listeners[1].close()


def test_all_that_cannot_be_used_are_named(listeners: Callable[..., list[Listener]]) -> None:
    good, (other,) = listeners(1)[0], listeners(1)
    port = free_port()
    with (
        Generators([("127.0.0.1", one) for one in (good.port, port)], TOKEN.encode(), waiting=Waiting(0)) as mine,
        pytest.raises(LostGeneratorError) as failure,
    ):
        mine.connect()
    assert str(failure.value) == (
        f"generator 127.0.0.1:{port} cannot be reached: connection refused; check that "
        f"`redline generate --listen 0.0.0.0:{port}` runs there"
    )
    addresses = [("127.0.0.1", other.port), ("no-such-host.invalid", 1)]
    with (
        Generators(addresses, b"this is another token", waiting=Waiting(0.1)) as mine,
        pytest.raises(LostGeneratorError) as failure,
    ):
        mine.connect()
    assert f"generator 127.0.0.1:{other.port} refused this run: it has another token" in str(failure.value)
    assert "generator no-such-host.invalid:1 cannot be reached: " in str(failure.value)
    assert " for 0.1 s (--generator-timeout); check its name in --generators" in str(failure.value)


def test_a_run_that_ends_waits_no_longer() -> None:
    begun = threading.Event()
    mine = Generators([("127.0.0.1", free_port())], TOKEN.encode(), waiting=Waiting(LONG_S, lambda _: begun.set()))
    ender = threading.Thread(target=lambda: begun.wait() and mine.close())
    ender.start()
    began = time.monotonic()
    with pytest.raises(LostGeneratorError, match="connection refused"):
        mine.connect()
    ender.join()
    assert time.monotonic() - began < LONG_S / 2
