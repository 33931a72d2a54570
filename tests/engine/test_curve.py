"""Sockets over TCP that only processes with the secret of the run can use."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from engine import curve
from engine.curve import Change, Connections, Gate, RefusedError, UnreachableError, new_secret, secure_client
from engine.errors import ConfigError

HOST = "127.0.0.1"
PATIENCE_S = 60.0
PATIENCE_MS = 60_000
SECRET = new_secret()


class Ends:
    """A server of the run with SECRET, and clients."""

    def __init__(self) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.gate = Gate(self.context, SECRET)
        self.server = self.context.socket(zmq.PULL)
        self.gate.secure(self.server)
        self.connections = Connections(self.server)
        self.address = curve.bind(self.server, HOST)
        self._open: list[Any] = [self.connections, self.server]

    def client(self) -> "zmq.Socket[Any]":
        socket = self.context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        self._open.append(socket)
        return socket

    def watched(self, socket: "zmq.Socket[Any]") -> Connections:
        self._open.insert(0, connections := Connections(socket))
        return connections

    def close(self) -> None:
        for one in self._open:
            one.close()
        self.gate.close()
        self.context.term()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def test_who_has_the_secret_is_accepted_by_both_ends(ends: Ends) -> None:
    client = ends.client()
    secure_client(client, SECRET)
    connections = ends.watched(client)
    curve.connect(client, ends.address)
    connections.wait_accepted(ends.address, PATIENCE_S)
    assert ends.connections.next_change(PATIENCE_S) is Change.ACCEPTED
    client.send(b"a step")
    assert ends.server.recv() == b"a step"


def test_another_secret_is_refused_and_both_ends_notice(ends: Ends) -> None:
    client = ends.client()
    secure_client(client, new_secret())
    connections = ends.watched(client)
    curve.connect(client, ends.address)
    client.send(b"a step", zmq.NOBLOCK)
    with pytest.raises(RefusedError, match=rf"^{ends.address} refuses the connection: it has another secret$"):
        connections.wait_accepted(ends.address, PATIENCE_S)
    assert ends.connections.next_change(PATIENCE_S) is Change.REFUSED
    assert not ends.server.poll(100)


def test_the_key_of_the_server_is_not_enough(ends: Ends) -> None:
    client = ends.client()
    secure_client(client, SECRET)
    client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
    connections = ends.watched(client)
    curve.connect(client, ends.address)
    with pytest.raises(RefusedError, match="another secret"):
        connections.wait_accepted(ends.address, PATIENCE_S)
    assert not ends.server.poll(100)


def test_a_client_without_keys_is_not_heard(ends: Ends) -> None:
    plain, secured = ends.client(), ends.client()
    plain.connect(ends.address)
    plain.send(b"from anybody")
    secure_client(secured, SECRET)
    secured.connect(ends.address)
    secured.send(b"from the run")
    assert ends.server.poll(PATIENCE_MS)
    assert ends.server.recv() == b"from the run"
    assert not ends.server.poll(100)


def test_an_address_where_nothing_answers_is_named(ends: Ends) -> None:
    client = ends.client()
    secure_client(client, SECRET)
    connections = ends.watched(client)
    ends.server.unbind(ends.address)
    curve.connect(client, ends.address)
    with pytest.raises(UnreachableError, match=rf"^{ends.address} can't be reached: nothing has answered for 0.3 s$"):
        connections.wait_accepted(ends.address, 0.3)


CHILD = """
import sys, time, zmq
from engine.curve import secure_client
socket = zmq.Context().socket(zmq.PUSH)
secure_client(socket, sys.argv[1])
socket.connect(sys.argv[2])
time.sleep(600)
"""


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGSTOP])
def test_the_loss_of_the_other_end_is_noticed(
    ended_by: signal.Signals, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process answers no heartbeat, as one on a machine that is gone."""
    monkeypatch.setattr(curve, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(curve, "SILENCE_S", 0.5)
    quick = ends.context.socket(zmq.PULL)
    ends.gate.secure(quick)
    connections = Connections(quick)
    address = curve.bind(quick, HOST)
    child = subprocess.Popen([sys.executable, "-c", CHILD, SECRET, address])
    try:
        assert connections.next_change(PATIENCE_S) is Change.ACCEPTED
        os.kill(child.pid, ended_by)
        assert connections.next_change(PATIENCE_S) is Change.LOST
    finally:
        child.kill()
        child.wait()
        connections.close()
        quick.close()


def test_a_secret_that_can_be_guessed_is_refused() -> None:
    with zmq.Context() as context, pytest.raises(ConfigError, match="at least 32 characters, not 6"):
        Gate(context, "secret")


def test_a_library_that_can_not_encrypt_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda feature: feature != "curve")
    with zmq.Context() as context, pytest.raises(ConfigError, match=r"this build of ZeroMQ can't encrypt \(CURVE\)"):
        Gate(context, "s" * 32)


def test_version_6_works_as_version_4(ends: Ends) -> None:
    server, client = ends.context.socket(zmq.PULL), ends.client()
    ends.gate.secure(server)
    try:
        address = curve.bind(server, "::1")
    except zmq.ZMQError as error:
        server.close()
        pytest.skip(f"this machine has no loopback address of version 6: {error}")
    secure_client(client, SECRET)
    curve.connect(client, address)
    client.send(b"a step")
    assert server.poll(PATIENCE_MS)
    assert (server.recv(), address.startswith("tcp://[::1]:")) == (b"a step", True)
    server.close()


def test_addresses_of_version_6_are_in_brackets() -> None:
    assert curve.tcp_address("fe80::1", 70) == "tcp://[fe80::1]:70"
    assert curve.tcp_address("node-1", 70) == "tcp://node-1:70"
