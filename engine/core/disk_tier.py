"""Which KV blocks are in files, and the reads and writes on their way.

Each block that leaves the KV cache is written once, as soon as a step has copied it to its host block, in the order in
which blocks left. What leaves the host blocks before its turn is not written. Files are removed least recently used
first. A block is read into a host block and verified before any step uses it; a file that can't be used is removed, and
its block is computed again.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Protocol

from engine.core.host_tier import HostTier

log = logging.getLogger("redline.core")

MOST_WRITES = 4  # at once: each keeps a host block from being reused


class Files(Protocol):
    """Reads and writes the files of blocks; see `engine.block_files`, `engine.core.rank_files`.

    `done` is called once for each read or write, from any thread, with the cause if it failed, else with "".
    """

    def write(self, key: bytes, block: int, done: Callable[[str], None]) -> None:
        """Write a host block to the file of a key."""
        ...

    def read(self, key: bytes, block: int, done: Callable[[str], None]) -> None:
        """Read the file of a key into a host block, and verify it."""
        ...

    def remove(self, key: bytes) -> None:
        """Remove a file; in order with the writes."""
        ...


class DiskTier:
    """The index of the files; for the core's loop.

    Args:
        num_blocks: the most files.
        host: the host blocks that are read and written.
        files: does so.
        wake: makes the loop turn; called from any thread.
    """

    def __init__(self, num_blocks: int, host: HostTier, files: Files, wake: Callable[[], None] = lambda: None):
        self.num_blocks = num_blocks
        self.keys: OrderedDict[bytes, None] = OrderedDict()  # of whole files, the least recently used first
        self._host, self._files, self._wake = host, files, wake
        self._unwritten: deque[bytes] = deque()  # in the order in which they left the KV cache
        self._writing: dict[bytes, int] = {}  # host blocks by key; both with one pin
        self._reading: dict[bytes, int] = {}
        self._dropped: set[bytes] = set()  # of those, whose content must be forgotten
        self._done: deque[tuple[bool, bytes, str]] = deque()  # whether it was a read, the key, the cause if it failed
        self.num_read = self.num_written = self.num_faults = 0
        self._write_failed = False

    def add(self, key: bytes) -> None:
        """A block has left the KV cache for a host block."""
        if key in self.keys:
            self.keys.move_to_end(key)
        elif key not in self._writing and key not in self._reading:
            self._unwritten.append(key)

    def read(self, key: bytes) -> bool:
        """Read a block into a host block, unless that is on its way; False if there is no host block for it."""
        if key in self._reading:
            return True
        block = self._host.take(settled=True)
        if block is None:
            return False
        self._reading[key] = block
        self._files.read(key, block, self._reporter(True, key))
        return True

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way, or waits to be written."""
        return not (self._unwritten or self._writing or self._reading)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Files of a prompt are used, in the order of its tokens: the first ones are removed last."""
        for key in reversed(keys):
            self.keys.move_to_end(key)

    def turn(self, arrived: Callable[[bytes, int | None], None]) -> None:
        """Account for what threads have done since the last time, and begin to write more.

        `arrived` is called for each block that was read, with its host block; None: the file could not be used, or its
        content must be forgotten.
        """
        while self._done:
            was_read, key, cause = self._done.popleft()
            if was_read:
                self._end_read(key, cause, arrived)
            else:
                self._end_write(key, cause)
        self._begin_writes()

    def drop(self, key: bytes) -> None:
        """Forget a block."""
        if key in self._writing or key in self._reading:
            self._dropped.add(key)
        if key in self.keys:
            self._remove(key)

    def reset(self) -> None:
        """Forget all blocks."""
        self._unwritten.clear()
        for key in {*self.keys, *self._writing, *self._reading}:
            self.drop(key)

    def _reporter(self, was_read: bool, key: bytes) -> Callable[[str], None]:
        def report(cause: str) -> None:
            self._done.append((was_read, key, cause))
            self._wake()

        return report

    def _end_read(self, key: bytes, cause: str, arrived: Callable[[bytes, int | None], None]) -> None:
        block = self._reading.pop(key)
        dropped = key in self._dropped
        self._dropped.discard(key)
        usable = not (cause or dropped)
        if cause and not dropped:
            self.num_faults += 1
            log.warning("--kv-spill: %s: its tokens are computed again", cause)
            if key in self.keys:
                self._remove(key)
        self.num_read += usable
        if usable and key not in self._host.block_of:
            self._host.enter(key, block)
        arrived(key, self._host.block_of.get(key) if usable else None)
        self._host.unpin(block)

    def _end_write(self, key: bytes, cause: str) -> None:
        self._host.unpin(self._writing.pop(key))
        if cause or key in self._dropped:
            self._dropped.discard(key)
            self._files.remove(key)
        else:
            self.keys[key] = None
            self.num_written += 1
        if cause:
            self.num_faults += 1
            if not self._write_failed:  # one line until it works again
                log.warning("--kv-spill: %s: blocks stay in host memory only", cause)
        self._write_failed = bool(cause)

    def _begin_writes(self) -> None:
        while self._unwritten and len(self._writing) < min(MOST_WRITES, self.num_blocks):
            key = self._unwritten[0]
            block = self._host.block_of.get(key)
            if block is not None and not self._host.is_settled(block):
                return  # the steps that copy it, and all behind it, are in flight
            self._unwritten.popleft()
            on_its_way = key in self._writing or key in self._reading
            if block is None or key in self.keys or on_its_way or not self._make_room():
                continue
            self._host.pin(block)
            self._writing[key] = block
            self._files.write(key, block, self._reporter(False, key))

    def _make_room(self) -> bool:
        """Remove the least recently used file if there is no room for another one; False if all are being read."""
        if len(self.keys) + len(self._writing) >= self.num_blocks:
            oldest = next((key for key in self.keys if key not in self._reading), None)
            if oldest is None:
                return False
            self._remove(oldest)
        return True

    def _remove(self, key: bytes) -> None:
        del self.keys[key]
        self._files.remove(key)

    def check(self) -> None:
        """Assert the invariants."""
        assert len(self.keys) + len(self._writing) <= self.num_blocks, "more files than there may be"
        assert not self._reading.keys() & self._writing.keys(), "a file is read and written"
        assert not self.keys.keys() & self._writing.keys(), "a block that is in a file is written"
        assert self._dropped <= self._writing.keys() | self._reading.keys(), "a block is forgotten twice"
