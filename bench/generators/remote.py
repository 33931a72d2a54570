"""The run's side of a connection to one generator: every call names the generator in its error."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.errors import BenchError
from bench.generators.channel import Channel, ChannelError
from bench.generators.clocks import RoundTrip, compare
from bench.generators.handshake import RefusedError, join
from bench.generators.messages import (
    Begin,
    Collect,
    Cut,
    Ended,
    Enough,
    Failed,
    Ping,
    Pong,
    Prepare,
    Progress,
    Ready,
    Requests,
    Streams,
    Welcome,
)
from bench.generators.session import BATCH_BYTES
from bench.loadgen.job import Counts
from bench.loadgen.recording import GeneratorUse
from bench.loadgen.stream import Stream

CONNECT_LIMIT_S = 5.0
WAIT_LIMIT_S = 30.0  # for a generator that cannot be reached, or was lost: it may be starting
_BUSY_LIMIT_S = 2.0  # to connect to a generator that has another run
_AGAIN_EVERY_S = 0.5
_READY_LIMIT_S = 120.0  # for names, files of certificates, and processes
_PONG_LIMIT_S = 10.0
_SILENT_LIMIT_S = 10.0  # while a load runs
_RECORDING_LIMIT_S = 60.0  # between two messages with recordings


class LostGeneratorError(BenchError):
    """A generator cannot be reached, or refuses this run."""


class _UnreachableError(Exception):
    """Nothing accepts connections at the address, or the name is not known; `advice` is what to check."""

    def __init__(self, error: OSError, port: int):
        super().__init__(f"cannot be reached: {str(error.strerror or error).lower()}")
        if isinstance(error, socket.gaierror):
            self.advice = "check its name in --generators"
        elif isinstance(error, ConnectionRefusedError):
            self.advice = f"check that `redline generate --listen 0.0.0.0:{port}` runs there"
        else:
            self.advice = "check its address in --generators, and firewalls between the hosts"


@dataclass(frozen=True, slots=True)
class Waiting:
    """How a run waits for generators that it cannot reach.

    Args:
        limit_s: for each connection.
        show: called with lines about it, from several threads.
        ended: set when the run ends: it waits no longer.
    """

    limit_s: float = WAIT_LIMIT_S
    show: Callable[[str], None] = lambda _: None
    ended: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class Part:
    """A generator's part of a load, and what it reported of it."""

    indices: list[int]  # of its requests, in the whole load
    counts: Counts = field(default_factory=Counts)
    awaited: int = 1
    before: RoundTrip | None = None
    after: RoundTrip | None = None
    ended: Ended | None = None
    streams: list[Stream] | None = None
    lost: str = ""  # why nothing more comes from the generator
    heard_at: float = 0.0  # the last message, on the monotonic clock

    @property
    def runs(self) -> bool:
        return self.ended is None and not self.lost


class Generator:
    """One generator.

    Args:
        host: of the generator.
        port: the same.
        token: of this run.
        tls: None: the connection is not encrypted.
        waiting: shared by the generators of the run.
    """

    def __init__(self, host: str, port: int, token: bytes, tls: ssl.SSLContext | None, waiting: Waiting):
        self.name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.welcome: Welcome | None = None  # of the last connection
        self._host, self._port = host, port
        self._token = token
        self._tls = tls
        self._waiting = waiting
        self._channel: Channel | None = None

    @property
    def channel(self) -> Channel:
        if self._channel is None:
            raise ChannelError("is not connected")
        return self._channel

    def connect(self) -> None:
        """Connect unless there is a connection. Raises LostGeneratorError.

        It tries again for a while if nothing listens there yet, if there was a connection, or if the generator is still
        busy: with a run that just ended, for example.
        """
        began, said = time.monotonic(), ""
        while self._channel is None:
            try:
                self._channel = self._connect()
            except (ChannelError, OSError, _UnreachableError) as error:
                limit_s = self._patience_s(error)
                left_s = began + limit_s - time.monotonic()
                if left_s <= 0 or self._waiting.ended.is_set():
                    raise LostGeneratorError(f"generator {self.name} {self._cause(error)}") from None
                if str(error) != said:
                    said = str(error)
                    self._waiting.show(f"waiting at most {limit_s:g} s for generator {self.name}: it {said}")
                self._waiting.ended.wait(min(left_s, _AGAIN_EVERY_S))
        if said:
            self._waiting.show(f"generator {self.name}: connected after {time.monotonic() - began:.0f} s")

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def prepare(self, part: Part, prepare: Prepare, payloads: Sequence[bytes]) -> None:
        """Send a part of a load; returns when the generator is prepared. Raises ChannelError, or BenchError."""
        self.channel.send(prepare)
        batch: list[bytes] = []
        size = 0
        for number, index in enumerate(part.indices):
            batch.append(payloads[index])
            size += len(payloads[index])
            if size >= BATCH_BYTES or number == len(part.indices) - 1:
                self.channel.send(Requests(batch))
                batch, size = [], 0
        answer = self.channel.receive(_READY_LIMIT_S)
        if isinstance(answer, Failed):
            raise BenchError(f"generator {self.name}: {answer.cause}")
        if not isinstance(answer, Ready):
            raise ChannelError(f"did not prepare the load within {_READY_LIMIT_S:.0f} s")

    def compare_clocks(self) -> RoundTrip:
        """Raises ChannelError."""
        return compare(self._ping)

    def begin(self, part: Part, real_ns: int) -> None:
        """Let the load begin at a time on the clock of this host; `part.before` must be known. Raises ChannelError."""
        assert part.before is not None
        part.heard_at = time.monotonic()
        self.channel.send(Begin(real_ns + part.before.offset_ns))

    def send(self, message: Cut | Enough) -> None:
        """Raises ChannelError."""
        self.channel.send(message)

    def watch(self, part: Part) -> None:
        """Read what the generator reported while the load runs. Raises ChannelError."""
        while part.runs and (message := self.channel.receive(0.0)) is not None:
            part.heard_at = time.monotonic()
            if isinstance(message, Progress):
                part.counts = Counts(message.sent, message.first_token, message.finished, message.failed)
                part.awaited = message.awaited
            elif isinstance(message, Ended):
                part.ended, part.awaited = message, 0
            elif isinstance(message, Failed):
                raise ChannelError(f"failed: {message.cause}")
            else:
                raise ChannelError("does not speak the protocol of redline generate")
        if part.runs and time.monotonic() > part.heard_at + _SILENT_LIMIT_S:
            raise ChannelError(f"did not report for {_SILENT_LIMIT_S:.0f} s")

    def collect(self, part: Part) -> list[Stream]:
        """What the generator recorded, on the clock of this host. Raises ChannelError."""
        assert part.before is not None
        found: list[Stream] = []
        self.channel.send(Collect())
        while True:
            message = self.channel.receive(_RECORDING_LIMIT_S)
            if not isinstance(message, Streams):
                raise ChannelError("did not send its recording")
            for recorded in message.streams:
                stream = recorded.stream(part.before.offset_ns)
                stream.index = part.indices[recorded.index]
                found.append(stream)
            if message.last:
                return found

    def _ping(self) -> tuple[int, int]:
        self.channel.send(Ping())
        answer = self.channel.receive(_PONG_LIMIT_S)
        if not isinstance(answer, Pong):
            raise ChannelError("did not report its clock")
        return answer.received_ns, answer.sent_ns

    def _connect(self) -> Channel:
        try:
            sock = socket.create_connection((self._host, self._port), CONNECT_LIMIT_S)
        except OSError as error:
            raise _UnreachableError(error, self._port) from None
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_hostname=self._host)
            channel = Channel(sock, self.name)
            self.welcome = join(channel, self._token)
        except BaseException:
            sock.close()
            raise
        return channel

    def _patience_s(self, error: Exception) -> float:
        """How long connecting is tried again after an error."""
        if isinstance(error, RefusedError) and not error.busy:
            return 0.0
        if self.welcome is not None or isinstance(error, _UnreachableError):
            return self._waiting.limit_s
        return _BUSY_LIMIT_S if isinstance(error, RefusedError) else 0.0

    def _cause(self, error: Exception) -> str:
        """Why connecting failed, after the name of the generator."""
        if isinstance(error, _UnreachableError):
            limit_s = self._waiting.limit_s
            waited = f" for {limit_s:g} s (--generator-timeout)" if limit_s else ""
            return f"{error}{waited}; {error.advice}"
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"has a certificate that is not accepted: {error.verify_message} (--generator-ca)"
        if self._tls is not None and isinstance(error, ssl.SSLError | ConnectionResetError):
            return "does not use TLS: leave --generator-ca out, or start it with --ssl-certfile"
        if isinstance(error, RefusedError) or (isinstance(error, ChannelError) and self._tls is not None):
            return str(error)
        if isinstance(error, ChannelError):
            # A generator with TLS closes a connection that does not begin with a handshake.
            return f"{error} (--generators; if it uses TLS, give --generator-ca)"
        return f"broke the connection: {str(getattr(error, 'strerror', None) or error).lower()} (--generators)"


def use_of(ended: Ended) -> GeneratorUse:
    return GeneratorUse(ended.cpu_s, ended.cpu_share, ended.starved_share, ended.processes)


def offsets_of(offsets_ns: Sequence[int], indices: Sequence[int]) -> bytes:
    """The send times of a part, as Prepare has them."""
    return np.asarray(offsets_ns, dtype=np.int64)[np.asarray(indices, dtype=np.int64)].tobytes()
