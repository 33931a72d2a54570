"""`redline generate --listen`: accepts runs that have the token, and generates the loads of one at a time."""

import contextlib
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable

from bench.errors import BenchError
from bench.generators.channel import Channel, ChannelError, broken
from bench.generators.handshake import LIMIT_S, admit
from bench.generators.messages import Refused
from bench.generators.session import Session

_AFTER_ERROR_S = 0.1  # of accepting a connection
_MOST_STRANGERS = 16  # connections at once that have not proved that they have the token


class Listener:
    """Generates loads for runs.

    Handshakes have threads of their own, so that a stranger cannot keep a run out; loads run in the thread of `serve`.

    Args:
        host: to listen on.
        port: the same; 0: a free one.
        token: that runs must have.
        tls: context of the server's side; None: connections are not encrypted.
        show: called with lines about runs and loads, from several threads.

    Raises BenchError if the port cannot be used.
    """

    def __init__(self, host: str, port: int, token: bytes, tls: ssl.SSLContext | None, show: Callable[[str], None]):
        self._token = token
        self._tls = tls
        self._show = show
        self._admitted: queue.Queue[Channel | None] = queue.Queue()
        self._lock = threading.Lock()
        self._run = ""  # the run that is served, from its admission to its end; guarded by the lock
        self._strangers = threading.Semaphore(_MOST_STRANGERS)
        self._closed = False
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=64)
        except OSError as error:
            # `create_server` adds the address to the text of the system.
            reason = (error.strerror or str(error)).partition(" (while attempting")[0]
            raise BenchError(f"cannot listen on {address_of(host, port)}: {reason} (--listen)") from None
        self.port: int = self._socket.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def serve(self) -> None:
        """Generate loads until `close`, or an exception such as that of a signal."""
        while (channel := self._admitted.get()) is not None:
            try:
                Session(channel, self._show).serve()
            except ChannelError as error:
                self._show(f"run {channel.peer}: {error}")
            finally:
                channel.close()
                self._end_run()

    def close(self) -> None:
        """Accept no more runs; `serve` returns when the run that it serves has ended."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends `accept`, which closing alone does not
        self._socket.close()
        self._admitted.put(None)

    def _accept(self) -> None:
        while True:
            try:
                sock, address = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(_AFTER_ERROR_S)  # too many open files, for example
                continue
            peer = address_of(address[0], address[1])
            if not self._strangers.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._greet, args=(sock, peer), daemon=True).start()

    def _greet(self, sock: socket.socket, peer: str) -> None:
        """Complete one handshake, and queue the run if no other one is served."""
        try:
            channel = self._admit(sock, peer)
        finally:
            self._strangers.release()
        if channel is not None:
            self._admitted.put(channel)

    def _admit(self, sock: socket.socket, peer: str) -> Channel | None:
        """The channel of a run that is served from now on; None if the handshake failed, or another run is served."""
        try:
            if self._tls is not None:
                sock.settimeout(LIMIT_S)
                sock = self._tls.wrap_socket(sock, server_side=True)
            channel = Channel(sock, peer)
            welcome = admit(channel, self._token)
            if other := self._begin_run(peer):
                reason = f"it generates the load of another run ({other})"
                channel.send(Refused(reason, busy=True))
                raise ChannelError(f"refused, {reason}")
            try:
                channel.send(welcome)
            except ChannelError:
                self._end_run()
                raise
        except (ChannelError, OSError) as error:  # ssl.SSLError is an OSError
            self._show(f"connection of {peer}: {error if isinstance(error, ChannelError) else broken(error)}")
            sock.close()
            return None
        self._show(f"run {peer}: connected")
        return channel

    def _begin_run(self, peer: str) -> str:
        """Make a run the one that is served, unless another one is: returns that one, or ""."""
        with self._lock:
            other = self._run
            self._run = other or peer
        return other

    def _end_run(self) -> None:
        with self._lock:
            self._run = ""


def address_of(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
