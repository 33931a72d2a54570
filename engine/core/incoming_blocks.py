"""Prompt blocks that a decode replica gets from prefill replicas: what requests wait for, and where it is put.

Each expected block has a host block (see `engine.host_blocks`) from the moment the prefill is requested until the first
request that waits for it is admitted. A prefill is requested only when there are host blocks for all of its blocks, so
prompts don't pile up here while this replica has no room for them; later ones wait in order.

A thread puts blocks into host blocks as they arrive (`put`). All else is called by the core's loop.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from engine.core.request import Request
from engine.kv_transfer import Place, PrefillEnded, PrefillWanted

log = logging.getLogger("redline.core")

# After the end of a prefill, for the blocks on their way: longer than any queue between two cores takes to drain.
ARRIVAL_S = 5.0


class ArrivedBlocks(msgspec.Struct, frozen=True, gc=False):
    """A message with blocks was received."""

    handle: int  # of the request for which the prefill was requested
    places: tuple[Place, ...]  # of the blocks that were put
    cached_tokens: int  # see BlocksHeader
    rejected: int = 0  # blocks that can't be used


@dataclass(slots=True, eq=False)
class Transfer:
    """The blocks of one prompt, on their way or here, and the requests that begin with them."""

    handle: int  # of the request for which the prefill was requested
    cached_blocks: int  # leading blocks that were here before
    keys: dict[Place, bytes]  # of the expected blocks
    requests: dict[int, Request]  # that wait for them or were released since; by handle
    host_blocks: dict[Place, int] = field(default_factory=dict)  # of the blocks that have arrived or still may
    written: set[Place] = field(default_factory=set)  # by the thread; nothing is written twice
    arrived: set[Place] = field(default_factory=set)
    is_requested: bool = False
    is_released: bool = False  # its requests wait no longer
    requested_at: float = 0.0  # on the core's clock, as the next two
    deadline: float = math.inf  # the blocks that have not arrived by then are lost
    latest: float = math.inf  # that blocks which arrive move it to: computing a prompt is better then
    cached_tokens: int = 0  # of the prompt, found in the prefix cache of the prefill replica

    @property
    def is_complete(self) -> bool:
        return len(self.arrived) == len(self.keys)


@dataclass(slots=True)
class TransferCounters:
    """Since the core started."""

    transfers: int = 0  # prompts that were requested from prefill replicas, and have arrived or are lost
    lost: int = 0  # of them, those of which blocks did not arrive, or could not be used
    blocks: int = 0  # that arrived
    rejected_blocks: int = 0  # of them, those that could not be used


class IncomingBlocks:
    """The transfers of a core.

    Args:
        host_blocks: the numbers of the host blocks for blocks that arrive.
    """

    def __init__(self, host_blocks: Iterable[int]):
        self._free = list(host_blocks)
        self.capacity = len(self._free)
        self.counters = TransferCounters()
        self._of: dict[int, Transfer] = {}  # by the handle of each request
        self._by_end: dict[bytes, Transfer] = {}  # those that are not released, by the key of their last block
        self._unrequested: deque[Transfer] = deque()
        self._released: list[Request] = []
        self._lock = threading.Lock()  # of `host_blocks` of all transfers, while a thread writes to one

    @property
    def waiting(self) -> list[int]:
        """The handles of the requests that wait for blocks."""
        return [handle for handle, transfer in self._of.items() if not transfer.is_released]

    # ------------------------------------------------------------------------------------------------------- requests

    def wait(self, request: Request, cached_blocks: int, keys: dict[Place, bytes]) -> bool:
        """Have a request wait for the blocks that its prompt lacks; False if there is no room for so many.

        Args:
            request: it is in no queue.
            cached_blocks: leading blocks of its prompt that it does not lack.
            keys: of the blocks that it lacks, the last one last.
        """
        if len(keys) > self.capacity:
            return False
        end = next(reversed(keys.values()))
        transfer = self._by_end.get(end)
        if transfer is None:
            transfer = self._by_end[end] = Transfer(request.handle, cached_blocks, keys, {})
            self._unrequested.append(transfer)
        transfer.requests[request.handle] = request
        self._of[request.handle] = transfer
        return True

    def take_wanted(self, now: float) -> list[PrefillWanted]:
        """The prefills to request now; `now` is the core's clock."""
        wanted = []
        while self._unrequested and len(self._unrequested[0].keys) <= len(self._free):
            transfer = self._unrequested.popleft()
            with self._lock:
                transfer.host_blocks = {place: self._free.pop() for place in transfer.keys}
            transfer.is_requested, transfer.requested_at = True, now
            wanted.append(PrefillWanted(transfer.handle, transfer.cached_blocks))
        return wanted

    def take_released(self) -> list[Request]:
        """The requests that wait no longer, in the order in which their transfers ended."""
        released, self._released = self._released, []
        return released

    def remove(self, handle: int) -> Request | None:
        """A request ends before it was admitted; returns it if it was not returned by `take_released` yet.

        The others that wait for the same blocks wait no longer if the prefill was requested for this one, since its
        front end ends that.
        """
        transfer = self._of.pop(handle, None)
        if transfer is None:
            return None
        request = transfer.requests.pop(handle)
        is_here = not transfer.is_released or request in self._released
        if not transfer.requests or (transfer.is_requested and transfer.handle == handle):
            self._release(transfer, "the request for which they were asked has ended")
        elif transfer.handle == handle:
            transfer.handle = next(iter(transfer.requests))
        if not transfer.requests:
            self._free_host_blocks(transfer)
        self._released = [one for one in self._released if one is not request]
        return request if is_here else None

    # --------------------------------------------------------------------------------------------------------- blocks

    def put(self, handle: int, place: Place, key: bytes, write: Callable[[int], None]) -> bool:
        """Write a block into its host block with `write(host block)`, unless nothing waits for it (any longer).

        Called by the thread that receives. Returns whether it was written; the loop then calls `arrive`. What `write`
        raises is raised; the block does not arrive then.
        """
        with self._lock:
            transfer = self._of.get(handle)
            if transfer is None or transfer.keys.get(place) != key or place in transfer.written:
                return False
            if (host_block := transfer.host_blocks.get(place)) is None:
                return False
            transfer.written.add(place)
            write(host_block)
            return True

    def arrive(self, arrived: ArrivedBlocks, now: float) -> None:
        """Blocks have been put; `now` is the core's clock."""
        handle, places, rejected = arrived.handle, arrived.places, arrived.rejected
        self.counters.blocks += len(places) + rejected
        self.counters.rejected_blocks += rejected
        transfer = self._of.get(handle)
        if transfer is None or transfer.is_released or transfer.handle != handle:
            return
        transfer.cached_tokens = arrived.cached_tokens
        transfer.arrived.update(place for place in places if place in transfer.host_blocks)
        if transfer.deadline < math.inf:
            transfer.deadline = min(now + ARRIVAL_S, transfer.latest)
        if transfer.is_complete or rejected:
            self._release(transfer, "blocks that arrived can't be used")

    def end(self, ended: PrefillEnded, now: float) -> None:
        """No more blocks are sent for a request."""
        transfer = self._of.get(ended.handle)
        if transfer is None or transfer.is_released or transfer.handle != ended.handle:
            return
        transfer.deadline = now + ARRIVAL_S
        transfer.latest = transfer.deadline + now - transfer.requested_at
        if ended.cause:
            self._release(transfer, ended.cause)

    def expire(self, now: float) -> None:
        """Give up the blocks that have not arrived in time."""
        for transfer in [one for one in self._by_end.values() if one.deadline <= now]:
            slow = transfer.deadline == transfer.latest
            why = "they take longer to arrive than to compute" if slow else f"none has arrived for {ARRIVAL_S:g} s"
            self._release(transfer, why)

    @property
    def next_deadline(self) -> float:
        """When `expire` has something to do; infinite: never."""
        return min((transfer.deadline for transfer in self._by_end.values()), default=math.inf)

    def _release(self, transfer: Transfer, why: str) -> None:
        """The requests of a transfer wait no longer, whatever has arrived; `why`, if blocks are missing."""
        if transfer.is_released:
            return
        transfer.is_released = True
        del self._by_end[next(reversed(transfer.keys.values()))]
        if not transfer.is_requested:
            self._unrequested.remove(transfer)
        elif transfer.requests:
            self.counters.transfers += 1
            if not transfer.is_complete:
                self.counters.lost += 1
                missing = len(transfer.keys) - len(transfer.arrived)
                log.warning("%d KV blocks of a prompt are computed here: %s", missing, why)
        self._released += transfer.requests.values()
        lost = [place for place in transfer.host_blocks if place not in transfer.arrived]
        with self._lock:
            self._free += [transfer.host_blocks.pop(place) for place in lost]

    # ------------------------------------------------------------------------------------------------------ admission

    def of(self, handle: int) -> Transfer | None:
        """The transfer whose blocks a request began to wait for, until its admission."""
        return self._of.get(handle)

    def take_blocks(self, transfer: Transfer) -> dict[Place, int]:
        """The host blocks of what has arrived; they are the caller's, until `give_back`."""
        with self._lock:
            taken, transfer.host_blocks = transfer.host_blocks, {}
        return taken

    def give_back(self, host_blocks: Iterable[int]) -> None:
        """Host blocks have been copied into the KV cache."""
        self._free += host_blocks

    def admit(self, handle: int) -> Transfer | None:
        """A request is admitted; returns the transfer whose blocks it waited for."""
        transfer = self._of.pop(handle, None)
        if transfer is not None:
            del transfer.requests[handle]
            if not transfer.requests:
                self._free_host_blocks(transfer)
        return transfer

    def _free_host_blocks(self, transfer: Transfer) -> None:
        self.give_back(self.take_blocks(transfer).values())
