"""What front ends and cores exchange so that one replica continues a prompt that another one has computed.

    front end ──AddRequest(remote_prefill)──► decode replica: which blocks of the prompt are missing?
    front end ◄──────PrefillWanted─────────── decode replica
    front end ──AddRequest(push)────────────► prefill replica
                prefill replica ══════blocks, as they are computed══════► decode replica
    front end ◄──────Finished──────────────── prefill replica
    front end ──PrefillEnded────────────────► decode replica: admits the request with the blocks as a cached prefix

Blocks go from core to core, never through the front end. What does not arrive is computed by the decode replica, so a
lost transfer costs time and never changes an output.

A message with blocks has a frame with a BlocksHeader, then two frames for each block: its header (`engine.kv_format`),
and its bytes on all ranks.
"""

from collections.abc import Sequence
from typing import TypeAlias

import msgspec

WAIT_FOR_RANKS = "wait_for_ranks"  # a call of all ranks, which ends once each has done all that came before it
QUEUED_MESSAGES = 8  # with blocks, at each end of a connection
Place: TypeAlias = tuple[int, int]  # of a block of a prompt: its KV group, and its number in the prompt


class KVTcp(msgspec.Struct, frozen=True):
    """Of a replica whose blocks go to or come from other machines: over TCP, with the keys of the run."""

    host: str  # the address of its machine, as the others reach it
    secret: str  # see `engine.curve`


class KVPush(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Where the blocks of a prompt are sent as they are computed."""

    address: str  # of the core that continues the prompt
    handle: int  # of the request that waits for them there
    first: int  # the blocks before this one are not missing there


class PrefillWanted(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A request waits for blocks of its prompt, which another replica is to compute."""

    handle: int
    cached_blocks: int  # leading blocks of the prompt that are not missing


class PrefillEnded(msgspec.Struct, array_like=True, frozen=True, tag=5, gc=False):
    """No more blocks will be sent for a request; those on their way still arrive."""

    handle: int
    cause: str = ""  # why some were not sent; empty: all were


class BlocksHeader(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The first frame of a message with blocks."""

    handle: int  # of the request that waits for them
    places: tuple[Place, ...]  # of the blocks, in their order
    cached_tokens: int  # of the prompt, found in the prefix cache of the sender


encode_header = msgspec.msgpack.Encoder().encode
decode_header = msgspec.msgpack.Decoder(BlocksHeader).decode


def num_shared_blocks(prompt_tokens: int, block_size: int) -> int:
    """The blocks of a prompt that are of use to another replica, which computes at least the last token itself."""
    return (prompt_tokens - 1) // block_size


def missing_places(windows: Sequence[int], block_size: int, first: int, end: int) -> list[Place]:
    """The places of the blocks that continue a cached prefix of `first` blocks to one of `end` blocks.

    Args:
        windows: of each KV group; 0: full attention. A group with a window needs only the blocks that the token after
            the prefix attends to.
        block_size: tokens of a block.
    """
    places = []
    for group, window in enumerate(windows):
        begin = max(first, (end * block_size - window + 1) // block_size) if window else first
        places += [(group, number) for number in range(begin, end)]
    return places
