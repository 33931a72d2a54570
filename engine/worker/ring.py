"""A ring buffer in shared memory with one writer and several readers: a step message is copied once for all ranks.

    | cursor of rank 0 | cursor of rank 1 | … | ring buffer |

A cursor counts the bytes that its rank has read so far. Ranks wait at their sockets, which announce each message;
they never poll the memory.
"""

import mmap
import os
import tempfile
import time

import numpy as np

CURSOR_BYTES = 64  # a cache line each, to avoid false sharing
SIZE = 4 << 20
FULL_POLL_S = 0.0005  # the ring is full only if a rank lags by megabytes


class Ring:
    """The writer's end. A message longer than `size` is split, see `engine.worker.local_links.split_command`."""

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
        """Wait until there is space, then write. Returns False if the ring was closed meanwhile."""
        assert len(message) <= self.size, f"{len(message)} bytes for a ring of {self.size}"
        while self._written + len(message) - int(self._cursors.min()) > self.size:
            if self.descriptor < 0:
                return False
            time.sleep(FULL_POLL_S)
        at = self._written % self.size
        first = min(len(message), self.size - at)
        self._data[at : at + first] = message[:first]
        self._data[: len(message) - first] = message[first:]
        self._written += len(message)
        return True

    def close(self) -> None:
        """Close the descriptor. The memory is freed with the last process that maps it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class RingReader:
    """A rank's end. It may only be read after its socket has announced the bytes."""

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
