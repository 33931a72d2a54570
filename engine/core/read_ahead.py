"""A waiting queue whose requests first wait for the KV blocks that must be read from files.

    arrival ──► backlog ──► reading ──► the scheduler's queue ──► slot
                   └ while requests before it have claimed half of the host blocks

What is read for a request, and what it needs besides of host memory, stays there until the request gets a slot. The
scheduler does not see requests while they wait, so others overtake them. The blocks of a request that returns after a
preemption were in use a moment ago: it does not wait again.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from engine.core.disk_tier import DiskTier
from engine.core.request import Request
from engine.core.tiered_kv_cache import TieredKVCacheManager
from engine.core.waiting_queue import WaitingQueue


@dataclass(slots=True)
class _Reading:
    """The blocks of a request: keys on their way, and host blocks that are there, each with a pin."""

    request: Request
    missing: set[bytes]
    arrived: list[int] = field(default_factory=list)

    @property
    def num_claimed(self) -> int:
        return len(self.missing) + len(self.arrived)


class ReadAheadQueue:
    """Implements `engine.core.waiting_queue.WaitingQueue`; it is false while all requests wait for their blocks.

    Args:
        ready: the scheduler's queue.
        kv, disk: the tiers.
        prefix_hashes: those of a request's blocks that it may find in the prefix cache.
    """

    def __init__(
        self,
        ready: WaitingQueue,
        kv: TieredKVCacheManager,
        disk: DiskTier,
        prefix_hashes: Callable[[Request], Sequence[bytes]],
    ):
        self._ready, self._kv, self._disk, self._prefix_hashes = ready, kv, disk, prefix_hashes
        self._backlog: deque[Request] = deque()
        self._reading: dict[int, _Reading] = {}  # by handle, those that wait and those that are ready
        self._num_claimed = 0
        self._most_claimed = max(1, kv.host.num_blocks // 2)

    def __bool__(self) -> bool:
        return bool(len(self._ready))

    def __len__(self) -> int:
        return len(self._ready) + len(self._backlog) + len(self._waiting())

    def __iter__(self) -> Iterator[Request]:
        return chain(self._ready, self._waiting(), self._backlog)

    def __getitem__(self, index: int, /) -> Request:
        return self._ready[index]

    def _waiting(self) -> list[Request]:
        return [one.request for one in self._reading.values() if one.missing]

    def append(self, request: Request, /) -> None:
        if not self._begin(request, must_wait=bool(self._backlog)):
            self._backlog.append(request)

    def appendleft(self, request: Request, /) -> None:
        self._ready.appendleft(request)

    def popleft(self) -> Request:
        request = self._ready.popleft()
        self._end(request)
        return request

    def remove(self, request: Request, /) -> None:
        if request in self._backlog:
            self._backlog.remove(request)
            return
        reading = self._reading.get(request.handle)
        if reading is None or not reading.missing:
            self._ready.remove(request)
        self._end(request)

    def turn(self) -> None:
        """Account for what was read since the last time."""
        self._disk.turn(self._arrive)
        self._work_off()

    def _work_off(self) -> None:
        while self._backlog and self._begin(self._backlog[0]):
            self._backlog.popleft()

    def _begin(self, request: Request, *, must_wait: bool = False) -> bool:
        """Begin to read a request's blocks, or queue it if there are none; False if it belongs in the backlog."""
        keys = self._kv.find_outside(self._prefix_hashes(request))
        host = self._kv.host
        if all(key in host.block_of for key in keys):
            self._ready.append(request)
            return True
        fits = not self._num_claimed or self._num_claimed + len(keys) <= self._most_claimed
        if must_wait or not fits:
            return False
        keys = keys[: self._most_claimed]
        self._reading[request.handle] = reading = _Reading(request, set())
        for key in keys:  # first: reading the others reuses host blocks
            if (block := host.find(key)) is not None:
                host.pin(block)
                reading.arrived.append(block)
        begun = []
        for key in keys:
            if key not in host.block_of:
                if not self._disk.read(key):
                    break
                begun.append(key)
        self._disk.touch(begun)
        reading.missing.update(begun)
        self._num_claimed += reading.num_claimed
        if not reading.missing:
            self._ready.append(request)
        return True

    def _arrive(self, key: bytes, host_block: int | None) -> None:
        if host_block is not None:
            self._kv.note_read(host_block)
        for reading in [one for one in self._reading.values() if key in one.missing]:
            reading.missing.remove(key)
            if host_block is None:
                self._num_claimed -= 1
            else:
                self._kv.host.pin(host_block)
                reading.arrived.append(host_block)
            if not reading.missing:
                self._ready.append(reading.request)

    def _end(self, request: Request) -> None:
        """A request leaves the queue."""
        reading = self._reading.pop(request.handle, None)
        if reading is not None:
            self._num_claimed -= reading.num_claimed
            for host_block in reading.arrived:
                self._kv.host.unpin(host_block)

    def check(self) -> None:
        """Assert the invariants."""
        claimed = sum(one.num_claimed for one in self._reading.values())
        assert claimed == self._num_claimed <= self._most_claimed, f"{claimed} host blocks, {self._num_claimed} counted"
        ready = {request.handle for request in self._ready}
        for handle, reading in self._reading.items():
            assert (handle in ready) == (not reading.missing), (
                f"request {handle} waits for {len(reading.missing)} blocks"
            )
