"""Memory that one process writes and several read: a step message is copied once, however many ranks there are.

    | read by rank 0 | read by rank 1 | … | bytes, over and over from the start |

A cursor counts all bytes that its rank has read so far. When a message has come a rank learns through its socket, by
which it also waits: nobody looks at the memory to see whether it changed.
"""

import mmap
import os
import tempfile
import time

import numpy as np

CURSOR_BYTES = 64  # a cache line each, so that ranks don't take them from each other
SIZE = 4 << 20
ROOM_S = 0.0005  # between two looks for room, which is there unless a rank lags by megabytes


class Ring:
    """The writer's end. A message longer than `size` goes in parts, see `engine.worker.wire.parts`."""

    def __init__(self, readers: int, size: int = SIZE):
        self.size = size
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
        with tempfile.TemporaryFile(prefix="redline-ring-", dir=folder) as file:
            file.truncate(readers * CURSOR_BYTES + size)
            self.descriptor = os.dup(file.fileno())
        self._memory = mmap.mmap(self.descriptor, 0)
        self._cursors = _cursors(self._memory, readers)
        self._data = memoryview(self._memory)[readers * CURSOR_BYTES :]
        self._written = 0

    def write(self, message: bytes) -> bool:
        """Wait until all have read what is in the way, then write; False if the ring was closed meanwhile."""
        assert len(message) <= self.size, f"{len(message)} bytes for a ring of {self.size}"
        while self._written + len(message) - int(self._cursors.min()) > self.size:
            if self.descriptor < 0:
                return False
            time.sleep(ROOM_S)
        at = self._written % self.size
        first = min(len(message), self.size - at)
        self._data[at : at + first] = message[:first]
        self._data[: len(message) - first] = message[first:]
        self._written += len(message)
        return True

    def close(self) -> None:
        """Free the descriptor; the memory goes with the last process that has it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class RingReader:
    """A rank's end: takes messages in the order in which they were written, each once it knows that it is there."""

    def __init__(self, descriptor: int, reader: int, readers: int):
        self._memory = mmap.mmap(descriptor, 0)
        os.close(descriptor)
        self._cursors = _cursors(self._memory, readers)
        self._data = memoryview(self._memory)[readers * CURSOR_BYTES :]
        self._reader = reader

    def read(self, length: int) -> bytes:
        """The next `length` bytes."""
        done = int(self._cursors[self._reader])
        at = done % len(self._data)
        first = min(length, len(self._data) - at)
        message = bytes(self._data[at : at + first]) + bytes(self._data[: length - first])
        self._cursors[self._reader] = done + length
        return message


def _cursors(memory: mmap.mmap, readers: int) -> np.ndarray:
    every = CURSOR_BYTES // 8
    return np.frombuffer(memory, dtype=np.int64, count=readers * every)[::every]
