"""Carries the messages of front ends on other machines to a core and back: TCP on one side, Unix sockets on the other.

    front end, DEALER ──message──────────────► gateway, ROUTER ──► core (the sockets of `engine.core.server`)
                      ──path, place, piece─────►       └───────► files in the core's folder of features

It runs beside the core's process on its machine. A front end has one connection for both directions, under its name, so
an answer always has a way back. All connections have the keys of the run (`engine.curve`).
"""

import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import zmq

from engine.curve import Gate, tcp_address
from engine.multimodal.feature_files import PREFIX, find_parent, unlink_features

log = logging.getLogger("redline.core")

LINGER_MS = 1000  # for the last messages of a core
STOP = "inproc://stop"


def front_end_name(front_end: int) -> str:
    """The name of a front end's connection."""
    return f"front-{front_end}"


class Gateway:
    """The gateway of one core; runs in a thread until `close`.

    Args:
        host: the address of this machine that front ends connect to.
        secret: of the run.
        to_core: where the core receives.
        from_core: where front end i of the core receives, which this object binds.
    """

    def __init__(self, host: str, secret: str, to_core: str, from_core: Sequence[str]):
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate = Gate(self._context, secret)
        self._outside = self._socket(zmq.ROUTER)
        self._outside.setsockopt(zmq.ROUTER_HANDOVER, 1)  # the successor of a process that ended has its name
        self._gate.secure(self._outside)
        self.address = tcp_address(host, self._outside.bind_to_random_port(tcp_address(host, 0).rpartition(":")[0]))
        self._to_core = self._socket(zmq.PUSH)
        self._to_core.connect(to_core)
        self._from_core: dict[zmq.Socket[bytes], bytes] = {}  # with the name of the front end
        for number, address in enumerate(from_core):
            socket = self._socket(zmq.PULL)
            socket.bind(address)
            self._from_core[socket] = front_end_name(number).encode()
        self._stopped, self._stop = self._socket(zmq.PAIR), self._socket(zmq.PAIR)
        self._stopped.bind(STOP)
        self._stop.connect(STOP)
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send what the core has said, and close all connections."""
        self._stop.send(b"")
        self._thread.join()
        self._gate.close()
        self._context.term()

    def _socket(self, kind: int) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        return socket

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in (self._stopped, self._outside, *self._from_core):
            poller.register(socket, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                for socket, name in self._from_core.items():
                    if socket in ready:
                        self._drain(socket, name)
                if self._outside in ready:
                    self._receive()
                if self._stopped in ready:
                    return
        except Exception:
            log.exception("the gateway failed")
        finally:
            for socket in (self._stopped, self._stop, self._outside, self._to_core, *self._from_core):
                socket.close()

    def _drain(self, socket: "zmq.Socket[bytes]", name: bytes) -> None:
        with contextlib.suppress(zmq.Again):
            while True:  # a front end that is gone is sent nothing
                self._outside.send_multipart((name, socket.recv(zmq.NOBLOCK)))

    def _receive(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                parts: list[Any] = self._outside.recv_multipart(zmq.NOBLOCK)
                if len(parts) == 2:
                    self._to_core.send(parts[1])
                elif len(parts) == 4:
                    _store(parts[1].decode(), int(parts[2]), parts[3])


def _store(path: str, begin: int, piece: bytes) -> None:
    """Write a piece of a feature file at its place, after those before it, or remove the file if the piece is empty.

    Nothing is done outside of folders of features.
    """
    folder = os.path.dirname(path)
    if os.path.dirname(folder) != find_parent() or not os.path.basename(folder).startswith(PREFIX):
        log.error("a front end has sent a file for %s, which is no folder of features", folder)
        return
    if not piece:
        unlink_features(path)
        return
    if begin and not os.path.exists(path):  # an earlier piece could not be stored
        return
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.seek(begin)
            file.write(piece)
    except OSError as error:  # the core reports that the request lacks it
        log.error("the features of an input can't be stored: %s", error)
        unlink_features(path)
