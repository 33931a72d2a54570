"""The keys of a run, made from one secret, and the ZeroMQ sockets over TCP that only its processes can use.

CURVE encrypts, and authenticates both ends: servers (the sockets that bind) accept the run's client key only, clients
connect to the run's server key only. Whoever has the secret has all keys.

    gate = Gate(context, secret)               secure_client(socket, secret)
    gate.secure(socket)                        connections = Connections(socket)
    connections = Connections(socket)          connect(socket, address)
    address = bind(socket, "10.0.0.1")         connections.wait_accepted(address, 10.0)
"""

import hashlib
import secrets
import time
from enum import Enum
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from engine.errors import ConfigError, RedlineError

MIN_SECRET = 32  # characters
HEARTBEAT_S = 1.0
SILENCE_S = 4.0  # without an answer to a heartbeat, until a connection is given up

_DOMAIN = "redline"


class RefusedError(RedlineError):
    """The other end of a connection has other keys."""


class UnreachableError(RedlineError):
    """Nothing answers at an address."""


class Change(Enum):
    """What has happened to a connection of a socket."""

    ACCEPTED = "accepted"  # both ends have the keys of the run
    REFUSED = "refused"
    LOST = "lost"
    UNWATCHED = "unwatched"  # `Connections.stop` was called: no change follows


_CHANGES = {
    zmq.Event.HANDSHAKE_SUCCEEDED: Change.ACCEPTED,
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: Change.REFUSED,  # the other end has closed the connection
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: Change.REFUSED,
    zmq.Event.HANDSHAKE_FAILED_AUTH: Change.REFUSED,
    zmq.Event.DISCONNECTED: Change.LOST,
    zmq.Event.MONITOR_STOPPED: Change.UNWATCHED,
}


def new_secret() -> str:
    """A random secret for a run."""
    return secrets.token_hex(32)


class Gate:
    """Decides which clients may use the server sockets of a context: those with the run's client key.

    A context can have one gate, which is a thread. Close it before the context is terminated.

    Args:
        secret: of the run; at least MIN_SECRET characters.
    """

    def __init__(self, context: "zmq.Context[Any]", secret: str):
        self._public, self._secret = _key_pair(secret, "server")
        self._client = _key_pair(secret, "client")[0]
        self._thread = ThreadAuthenticator(context)
        self._thread.configure_curve_callback(_DOMAIN, self)
        self._thread.start()

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether a client with this public key is let in; called by the thread."""
        return secrets.compare_digest(key, self._client)

    def secure(self, socket: "zmq.Socket[Any]") -> None:
        """Make a socket a server of the run, before it is bound."""
        socket.curve_publickey, socket.curve_secretkey = self._public, self._secret
        socket.curve_server = True
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN.encode())
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without the thread nobody is let in
        send_heartbeats(socket)

    def close(self) -> None:
        self._thread.stop()


def secure_client(socket: "zmq.Socket[Any]", secret: str) -> None:
    """Make a socket a client of the run, before it connects."""
    socket.curve_publickey, socket.curve_secretkey = _key_pair(secret, "client")
    socket.curve_serverkey = _key_pair(secret, "server")[0]
    send_heartbeats(socket)


class Connections:
    """What happens to the connections of a socket. Made before the socket is bound or connected, closed before it is.

    A connection that is refused is not reported as lost besides.

    Attributes:
        socket: readable when there is a change, for a poller.
    """

    def __init__(self, socket: "zmq.Socket[Any]"):
        self._watched = socket
        self._refused = 0  # connections whose end was not seen yet
        self.socket: zmq.Socket[bytes] = socket.get_monitor_socket(sum(_CHANGES))

    def next_change(self, timeout_s: float | None = None) -> Change | None:
        """Wait for the next change; None: there is none in time."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.socket.poll(None if deadline is None else max(0, round((deadline - time.monotonic()) * 1000))):
            change = _CHANGES[zmq.Event(recv_monitor_message(self.socket)["event"])]
            if change is Change.REFUSED:
                self._refused += 1
            elif change is Change.LOST and self._refused:
                self._refused -= 1
                continue
            return change
        return None

    def wait_accepted(self, address: str, timeout_s: float) -> None:
        """Wait until a client's connection is accepted.

        Raises RefusedError if the other end has another secret, UnreachableError if nothing answers in time.
        """
        deadline = time.monotonic() + timeout_s
        while (change := self.next_change(deadline - time.monotonic())) is not Change.ACCEPTED:
            if change is Change.REFUSED:
                raise RefusedError(f"{address} refuses the connection: it has another secret")
            if change is None:
                raise UnreachableError(f"{address} can't be reached: nothing has answered for {timeout_s:g} s")

    def stop(self) -> None:
        """Watch no longer. Called by the thread that uses the watched socket; another may wait for changes."""
        self._watched.disable_monitor()

    def close(self) -> None:
        self.stop()
        self.socket.close()


def bind(socket: "zmq.Socket[Any]", host: str) -> str:
    """Bind a socket to a free port of an interface, given by its address; the ZeroMQ address of the port."""
    address = tcp_address(host, 0)
    socket.setsockopt(zmq.IPV6, "[" in address)
    socket.bind(address)
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect(socket: "zmq.Socket[Any]", address: str) -> None:
    """Connect a socket to a ZeroMQ address, which may be of version 6."""
    socket.setsockopt(zmq.IPV6, "[" in address)
    socket.connect(address)


def tcp_address(host: str, port: int) -> str:
    """The ZeroMQ address of a port; `host` is a name or an address of version 4 or 6."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def send_heartbeats(socket: "zmq.Socket[Any]") -> None:
    """Have the loss of the other end noticed, even if its machine is gone: heartbeats are sent by ZeroMQ's thread."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, round(HEARTBEAT_S * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(SILENCE_S * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TTL, round((HEARTBEAT_S + SILENCE_S) * 1000))


def _key_pair(secret: str, role: str) -> tuple[bytes, bytes]:
    """The public and the secret key of a role, as ZeroMQ writes keys."""
    if len(secret) < MIN_SECRET:
        raise ConfigError(f"the secret of a run must have at least {MIN_SECRET} characters, not {len(secret)}")
    if not zmq.has("curve"):
        raise ConfigError("this build of ZeroMQ can't encrypt (CURVE), which connections between machines need")
    key = z85.encode(hashlib.blake2b(secret.encode(), digest_size=32, person=role.encode()).digest())
    return zmq.curve_public(key), key
