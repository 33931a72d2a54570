"""Prompt blocks that a prefill replica has to send to decode replicas.

A block is found by its key in the prefix cache, into which the scheduler enters the blocks that a step fills. If other
requests take a block before it is copied out, the decode replica computes it.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine.core.request import Request
from engine.kv_transfer import BlocksHeader, Place


@dataclass(slots=True)
class Push:
    """The blocks of a prompt that are still to be sent, first to last."""

    address: str
    handle: int  # of the request that waits for them
    blocks: "deque[tuple[Place, bytes]]"  # and their keys
    is_held: bool  # nothing is sent before the prompt is known to be computed without a fault
    cached_tokens: int = -1  # of the prompt, found in the prefix cache; -1: the request was not admitted yet


@dataclass(frozen=True, slots=True)
class Shipment:
    """Blocks that are copied into host blocks, and sent from there."""

    address: str
    header: BlocksHeader
    keys: list[bytes]
    blocks: list[int]
    host_blocks: list[int]


class OutgoingBlocks:
    """What a core has to send.

    Args:
        host_blocks: the numbers of the host blocks for blocks that are sent.
    """

    def __init__(self, host_blocks: Iterable[int]):
        self._free = deque(host_blocks)  # another thread may append
        self._pushes: dict[int, Push] = {}  # by the handle of the request that computes the prompt
        self.num_sent = 0  # blocks

    def add(self, request: Request, blocks: Iterable[tuple[Place, bytes]]) -> None:
        """A request computes a prompt for another replica; `blocks` are those to send, with their keys."""
        push = request.message.push
        assert push is not None, "the request has no push"
        # What a failed input or a missing adapter leaves in a block is known only when the step is booked.
        is_held = bool(request.message.mm_inputs or request.adapter)
        self._pushes[request.handle] = Push(push.address, push.handle, deque(blocks), is_held)

    def admit(self, handle: int, cached_tokens: int) -> None:
        """A request was admitted, with so many tokens of its prompt in the prefix cache."""
        if (push := self._pushes.get(handle)) is not None and push.cached_tokens < 0:
            push.cached_tokens = cached_tokens

    def complete(self, handle: int) -> None:
        """A prompt was computed without a fault."""
        if (push := self._pushes.get(handle)) is not None:
            push.is_held = False

    def cancel(self, handle: int) -> None:
        """A request ended before its prompt was computed."""
        self._pushes.pop(handle, None)

    def take_due(self, block_of: Mapping[bytes, int], requests: Mapping[int, Request]) -> list[Shipment]:
        """What can be copied out once the submitted steps are computed, as far as host blocks are free.

        Args:
            block_of: the prefix cache.
            requests: those that have not ended, by handle. Of others, blocks that are gone will not come back.
        """
        due = []
        for handle, push in list(self._pushes.items()):
            if push.is_held or push.cached_tokens < 0:
                continue
            if shipment := self._next_shipment(push, block_of):
                due.append(shipment)
            if not push.blocks or (handle not in requests and self._free):
                del self._pushes[handle]
        return due

    def _next_shipment(self, push: Push, block_of: Mapping[bytes, int]) -> Shipment | None:
        places, keys, blocks, host_blocks = list[Place](), list[bytes](), list[int](), list[int]()
        while push.blocks and self._free and (block := block_of.get(push.blocks[0][1])) is not None:
            place, key = push.blocks.popleft()
            places.append(place)
            keys.append(key)
            blocks.append(block)
            host_blocks.append(self._free.popleft())
        if not places:
            return None
        self.num_sent += len(places)
        header = BlocksHeader(push.handle, tuple(places), push.cached_tokens)
        return Shipment(push.address, header, keys, blocks, host_blocks)

    def give_back(self, host_blocks: Iterable[int]) -> None:
        """Host blocks may be written again. May be called from any thread."""
        self._free.extend(host_blocks)
