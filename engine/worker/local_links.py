"""Links between an executor and ranks on the same machine: commands through shared memory, results over sockets.

Each rank's socket carries only the header of a command; the rank waits for it. The body is in the ring (see ring.py),
once for all ranks. Results have header and body on the socket.
"""

import contextlib
import selectors
import socket
import struct
import tempfile
from collections.abc import Iterator, Sequence

from engine.children import ChildProcess
from engine.worker.rank_links import Gone
from engine.worker.rank_protocol import Frame, FrameKind, LocalLink, RankOptions
from engine.worker.ring import Ring, RingReader

_HEADER = struct.Struct("<BI")  # kind, bytes of the body


class RankProcess(ChildProcess):
    """A rank; `socket` is the executor's end."""

    def __init__(self, options: RankOptions, socket: socket.socket, inherit: Sequence[int]):
        super().__init__(
            "engine.worker.rank",
            options,
            name=f"rank {options.rank}",
            inherit=inherit,
            memory_advice="lower --kv-cache-memory-bytes",
        )
        self.socket = socket


class LocalLinks:
    """Implements `engine.worker.rank_links.RankLinks`.

    Args:
        folder: for the file by which the ranks find each other; None: the system's folder for temporary files.
    """

    def __init__(self, folder: str | None = None):
        self.ranks: list[RankProcess] = []
        self._store = tempfile.TemporaryDirectory(prefix="redline-ranks-", dir=folder)
        self._selector = selectors.DefaultSelector()
        self._ring: Ring | None = None
        self._readers: list[RankProcess] = []

    def start(self, options: Sequence[RankOptions]) -> None:
        readers = sum(one.receives for one in options)
        self._ring = ring = Ring(readers)
        for number, one in enumerate(options):
            ours, theirs = socket.socketpair()
            with theirs:
                ring_fd = ring.descriptor if one.receives else None
                one.link = LocalLink(theirs.fileno(), ring_fd, len(self._readers), readers)
                one.store = f"{self._store.name}/store"
                inherit = (theirs.fileno(), ring.descriptor) if one.receives else (theirs.fileno(),)
                rank = RankProcess(one, ours, inherit)
            self.ranks.append(rank)
            self._selector.register(ours, selectors.EVENT_READ, number)
            if one.receives:
                self._readers.append(rank)

    def send(self, kind: FrameKind, body: bytes) -> bool:
        assert self._ring is not None
        for header, part in split_command(kind, body, self._ring.size // 2):
            if not self._ring.write(part):
                return False
            for rank in self._readers:
                try:
                    rank.socket.sendall(header)
                except OSError:  # it is gone: the other thread finds the cause
                    return False
        return True

    def end(self) -> None:
        for rank in self.ranks:
            with contextlib.suppress(OSError):  # the other end is gone already
                rank.socket.shutdown(socket.SHUT_WR)

    def next_frame(self, timeout_s: float | None = None) -> tuple[int, Frame | Gone] | None:
        ready = self._selector.select(timeout_s)
        if not ready:
            raise TimeoutError
        key = ready[0][0]
        number: int = key.data
        frame = receive_frame(self.ranks[number].socket)
        if frame is None:
            self._selector.unregister(key.fileobj)
            return number, Gone()
        return number, frame

    def stop(self) -> None:
        """The thread that receives ends with the ranks, whose sockets close then."""
        if self._ring is not None:
            self._ring.close()

    def close(self) -> None:
        self._selector.close()
        for rank in self.ranks:
            rank.socket.close()
        self._store.cleanup()


class LocalEnd:
    """Implements `engine.worker.rank_links.RankEnd`.

    Args:
        end: the rank's end of the socket.
        ring: None for a rank that receives no commands.
    """

    def __init__(self, end: socket.socket, ring: RingReader | None):
        self._socket = end
        self._ring = ring

    @classmethod
    def of(cls, link: LocalLink) -> "LocalEnd":
        ring = None if link.ring_fd is None else RingReader(link.ring_fd, link.reader, link.ring_readers)
        return cls(socket.socket(fileno=link.socket_fd), ring)

    def receive(self) -> Frame | None:
        assert self._ring is not None
        before = b""
        while (header := _receive_exactly(self._socket, _HEADER.size)) is not None:
            kind, length = _HEADER.unpack(header)
            body = before + self._ring.read(length)
            if kind != FrameKind.MORE:
                return FrameKind(kind), body
            before = body
        return None

    def send(self, kind: FrameKind, body: bytes = b"") -> None:
        self._socket.sendall(_HEADER.pack(kind, len(body)) + body)

    def interrupt(self) -> None:
        self._socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        self._socket.close()


def split_command(kind: FrameKind, body: bytes, most: int) -> Iterator[tuple[bytes, bytes]]:
    """Headers of a command, each with its part of the body, at most `most` bytes."""
    for begin in range(0, len(body) - most, most):
        yield _HEADER.pack(FrameKind.MORE, most), body[begin : begin + most]
    rest = body[(len(body) - 1) // most * most :] if body else b""
    yield _HEADER.pack(kind, len(rest)), rest


def receive_frame(source: socket.socket) -> Frame | None:
    """Block until the next frame, without using the CPU; None once the other end has closed."""
    header = _receive_exactly(source, _HEADER.size)
    if header is None:
        return None
    kind, length = _HEADER.unpack(header)
    body = _receive_exactly(source, length)
    return None if body is None else (FrameKind(kind), body)


def _receive_exactly(source: socket.socket, length: int) -> bytes | None:
    parts = b""
    while len(parts) < length:
        try:
            part = source.recv(length - len(parts), socket.MSG_WAITALL)
        except ConnectionResetError:  # it ended with commands unread
            return None
        if not part:
            return None
        parts += part
    return parts
