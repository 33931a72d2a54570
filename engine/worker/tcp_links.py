"""Links between an executor and ranks on other machines: ZeroMQ over TCP, encrypted with the keys of the run.

    executor, PUSH (one for each rank) ──kind, body───────────► rank, PULL
    executor, PULL (one for all)       ◄──rank, kind, body────── rank, PUSH

The executor binds, ranks connect. ZeroMQ sends heartbeats, so that a rank on a machine that is gone is noticed within
seconds; a connection that is lost is not made again, since frames may be lost with it. A rank that loses the executor
ends at once, whatever it waits for.
"""

import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import zmq

from engine.curve import Change, Connections, Gate, bind, connect, new_secret, secure_client
from engine.worker.rank_links import Gone, LinkedRank
from engine.worker.rank_protocol import Frame, FrameKind, RankOptions, TcpLink

log = logging.getLogger("redline.worker")

START_S = 90.0  # for a rank's process to start and to connect
CONNECT_S = 20.0  # for its connections
CHECK_S = 1.0  # between looks at the processes of ranks that are not connected yet
LAST_FRAMES_S = 0.3  # for results under way when the other connection of their rank is lost
LINGER_MS = 2000  # for the last frames of a rank to leave

SILENT = "can't be reached any more: its machine does not answer, or its process was stopped"

_SENT = struct.Struct("<HB")  # the rank, the kind of the frame
_INTERRUPT = "inproc://interrupt"


class RankHosts(Protocol):
    """The machines of the ranks."""

    @property
    def address(self) -> str:
        """The address of the executor's machine, as the ranks' machines reach it."""
        ...

    def address_of(self, rank: int) -> str:
        """The address of a rank's machine, as the other ranks' machines reach it."""
        ...

    def start(self, options: RankOptions) -> LinkedRank:
        """Start a rank."""
        ...

    def close(self) -> None:
        """Release the machines, once the ranks have ended."""
        ...


@dataclass(slots=True)
class _Peer:
    """The executor's connection to a rank.

    connect_by, gone_at: on the monotonic clock; when the rank is gone if it has not connected, and when one whose
    connection is lost is reported as gone.
    """

    commands: "zmq.Socket[bytes]"
    address: str
    connections: Connections
    receives: bool
    connect_by: float
    connected: bool = False
    gone_at: float | None = None
    reported: bool = False


class TcpLinks:
    """Implements `engine.worker.rank_links.RankLinks`."""

    def __init__(self, hosts: RankHosts):
        from engine.worker.rank_store import StoreServer  # needs torch, which ranks import only once it is set up

        self.ranks: list[LinkedRank] = []
        self._hosts = hosts
        self._secret = new_secret()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate = Gate(self._context, self._secret)
        self._store = StoreServer(hosts.address)
        self._results = self._context.socket(zmq.PULL)
        self._results_at = self._bind(self._results)
        self._peers: list[_Peer] = []
        self._next_check = 0.0
        self._stopped, self._stop = os.pipe()
        self._poller = zmq.Poller()
        self._poller.register(self._results, zmq.POLLIN)
        self._poller.register(self._stopped, zmq.POLLIN)

    def start(self, options: Sequence[RankOptions]) -> None:
        for one in options:
            commands = self._context.socket(zmq.PUSH)
            commands.setsockopt(zmq.LINGER, 0)
            connections = Connections(commands)
            self._poller.register(connections.socket, zmq.POLLIN)
            address = self._bind(commands)
            one.link = TcpLink(address, self._results_at, self._secret, CONNECT_S)
            one.store = self._store.place(self._hosts.address_of(one.rank))
            self._peers.append(_Peer(commands, address, connections, one.receives, time.monotonic() + START_S))
        for one in options:
            self.ranks.append(self._hosts.start(one))

    def send(self, kind: FrameKind, body: bytes) -> bool:
        message = bytes((kind,)) + body
        return all(_push(peer.commands, message) for peer in self._peers if peer.receives)

    def end(self) -> None:
        for peer in self._peers:
            if peer.receives:
                _push(peer.commands, bytes((FrameKind.END,)))

    def next_frame(self, timeout_s: float | None = None) -> tuple[int, Frame | Gone] | None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if (gone := self._next_gone()) is not None:
                return gone
            ready = dict(self._poller.poll(self._poll_ms(deadline)))
            if self._stopped in ready:
                return None
            for peer in self._peers:
                if peer.connections.socket in ready:
                    _note(peer)
            if self._results in ready and (data := self._next_result()) is not None:
                number, kind = _SENT.unpack_from(data)
                return number, (FrameKind(kind), data[_SENT.size :])
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError

    def _next_result(self) -> bytes | None:
        """None: a connection that was refused has made the socket readable."""
        try:
            return self._results.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def stop(self) -> None:
        os.write(self._stop, b"\0")

    def close(self) -> None:
        for peer in self._peers:
            peer.connections.close()
            peer.commands.close()
        self._results.close()
        self._gate.close()
        self._context.term()
        self._store.close()
        os.close(self._stop)
        os.close(self._stopped)
        self._hosts.close()

    def _bind(self, socket: "zmq.Socket[bytes]") -> str:
        """Bind a server of the run to any port; its address."""
        socket.set_hwm(0)
        self._gate.secure(socket)
        return bind(socket, self._hosts.address)

    def _next_gone(self) -> tuple[int, Gone] | None:
        """A rank that is gone and was not reported yet; one that never connects is, too."""
        now = time.monotonic()
        checks = now >= self._next_check
        if checks:
            self._next_check = now + CHECK_S
        for number, peer in enumerate(self._peers):
            if peer.reported:
                continue
            why = None
            if peer.gone_at is not None:
                why = SILENT if now >= peer.gone_at else None
            elif not peer.connected:
                if checks and self.ranks[number].wait(0.0):
                    why = ""
                elif now >= peer.connect_by:
                    why = f"has not connected to {peer.address} within {START_S:g} s: is a firewall between them?"
            if why is not None:
                peer.reported = True
                return number, Gone(why)
        return None

    def _poll_ms(self, deadline: float | None) -> int | None:
        """Milliseconds until something must be looked at; None: until something comes."""
        times = [] if deadline is None else [deadline]
        for peer in self._peers:
            if peer.gone_at is not None and not peer.reported:
                times.append(peer.gone_at)
            elif not peer.connected:
                times.append(self._next_check)
        return max(0, round((min(times) - time.monotonic()) * 1000) + 1) if times else None


def _push(socket: "zmq.Socket[bytes]", message: bytes) -> bool:
    """Send a message; False if nobody is connected any more."""
    try:
        socket.send(message, zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True


def _note(peer: _Peer) -> None:
    """Note a change of the connection to a rank."""
    change = peer.connections.next_change(0.0)
    if change is Change.ACCEPTED:
        peer.connected = True
    elif change is Change.REFUSED:
        log.warning("a connection to %s was refused: the other end has another secret", peer.address)
    elif change is Change.LOST and peer.connected and peer.gone_at is None:
        peer.gone_at = time.monotonic() + LAST_FRAMES_S


class TcpEnd:
    """Implements `engine.worker.rank_links.RankEnd`.

    Args:
        rank: its number.
        on_loss: called from a thread when the executor can't be reached any more.

    Raises UnreachableError or RefusedError if the executor can't be reached from here.
    """

    def __init__(self, link: TcpLink, rank: int, on_loss: Callable[[], Any]):
        self._rank = rank
        self._on_loss = on_loss
        self._sending = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._commands = self._socket(zmq.PULL, link)
        self._results = self._socket(zmq.PUSH, link)
        self._commands.bind(_INTERRUPT)
        self._connections = Connections(self._commands)
        self._watch = threading.Thread(target=self._wait_for_loss, name="executor-watch", daemon=True)
        try:
            results = Connections(self._results)
            try:
                connect(self._results, link.results)
                results.wait_accepted(link.results, link.timeout_s)
            finally:
                results.close()
            connect(self._commands, link.commands)
            self._connections.wait_accepted(link.commands, link.timeout_s)
            self._watch.start()
        except BaseException:
            self.close()
            raise

    def receive(self) -> Frame | None:
        data = self._commands.recv()
        kind = FrameKind(data[0])
        return None if kind is FrameKind.END else (kind, data[1:])

    def send(self, kind: FrameKind, body: bytes = b"") -> None:
        with self._sending:
            self._results.send(_SENT.pack(self._rank, kind) + body)

    def interrupt(self) -> None:
        with self._context.socket(zmq.PUSH) as socket:
            socket.connect(_INTERRUPT)
            socket.send(bytes((FrameKind.END,)))

    def close(self) -> None:
        self._connections.stop()
        if self._watch.ident is not None:
            self._watch.join()
        self._connections.close()
        self._commands.close()
        self._results.close()
        self._context.term()

    def _socket(self, kind: int, link: TcpLink) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        secure_client(socket, link.secret)
        return socket

    def _wait_for_loss(self) -> None:
        while (change := self._connections.next_change()) is not Change.UNWATCHED:
            if change is Change.LOST:
                self._on_loss()
