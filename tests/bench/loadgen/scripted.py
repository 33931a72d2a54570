"""The loop of the load generator on a connection whose reads are given, so that tests choose where bytes are cut."""

import errno
import socket
from collections.abc import Sequence

import pytest

from bench.loadgen import loop
from bench.loadgen.connection import ReceiveBuffer
from bench.loadgen.recording import GeneratorUse, Recording
from bench.loadgen.request import Address
from bench.results import RequestRecord
from bench.workloads import RequestSpec

ADDRESS = Address("h", 1, "", None, socket.AF_INET, ("127.0.0.1", 1))
EVER = (-1.0, float("inf"))
GAP_NS = 1_000_000  # between the stamps of reads


class Quiet:
    """An observer that lets a load point run to its end."""

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
        return True


class ScriptedConnection:
    """A connection that is always ready, gives one read after the other, then the end of the connection."""

    def __init__(self, reads: Sequence[bytes], buffer: ReceiveBuffer, takes: int | None):
        self._mine, self._peer = socket.socketpair()
        self._peer.send(b"x")  # so that the poll always finds something to read
        self._reads = list(reads)
        self._buffer = buffer
        self._stamp = 0
        self._takes = takes
        self.left = len(self._reads)

    def fileno(self) -> int:
        return self._mine.fileno()

    def advance(self) -> int:
        return 0

    def send(self, data: memoryview) -> int:
        if self._takes is None:
            return len(data)
        if not self._takes:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        taken, self._takes = self._takes, 0
        return taken

    def receive(self) -> tuple[int, int]:
        if not self.left:
            return 0, 0
        data = self._reads[-self.left]
        self.left -= 1
        self._stamp += GAP_NS
        self._buffer.view[: len(data)] = data
        return len(data), self._stamp

    def close(self) -> None:
        self._mine.close()
        self._peer.close()


def answered(
    reads: Sequence[bytes], tokens: int = 3, takes: int | None = None
) -> tuple[RequestRecord, ScriptedConnection, loop.Loop]:
    """One request of `tokens` tokens, answered with these reads; the connection breaks after `takes` bytes of it."""
    made: list[ScriptedConnection] = []

    def connect(_: Address, buffer: ReceiveBuffer) -> ScriptedConnection:
        made.append(ScriptedConnection(reads, buffer, takes))
        return made[-1]

    job = loop.Job(ADDRESS, [b"request"], [0], 60.0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "connect", connect)
        running = loop.Loop(job, Quiet(), loop.Start.soon(0))
        running.run()
        running.close()
    spec = RequestSpec(1, tokens, prompt_ids=[1])
    recording = Recording(running.streams, [spec], running.start_ns, GeneratorUse(0.0, 0.0, 0.0), cut_short=False)
    (row,) = recording.records(EVER)
    return row, made[0], running
