"""What a core orders of ranks that keep host blocks and files of KV blocks on their own machines (`--kv-spill`).

    core ──OpenBlocks, WriteBlock, ReadBlock, RemoveBlock──► every rank, after the steps that were submitted before
    core ◄──BlocksDone────────────────────────────────────── every rank, for each order with a number, when it is done

A rank has its part of each block. A block was read only once all ranks have read and verified their parts.
"""

from collections.abc import Callable

import msgspec


class OpenBlocks(msgspec.Struct, array_like=True, frozen=True, tag=0):
    """Allocate host blocks; with a path also make a folder for files below it.

    Args:
        fingerprint: of the `engine.kv_format.KVLayout`.
    """

    number: int
    num_blocks: int
    fingerprint: bytes
    disk_path: str = ""


class WriteBlock(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """Write a host block to the file of a key."""

    number: int
    key: bytes
    block: int


class ReadBlock(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """Read the file of a key into a host block, and verify it."""

    number: int
    key: bytes
    block: int


class RemoveBlock(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """Remove the file of a key; in order with the writes."""

    key: bytes


BlockOrder = OpenBlocks | WriteBlock | ReadBlock | RemoveBlock


class BlocksDone(msgspec.Struct, array_like=True, frozen=True):
    """An order was executed, or failed with a cause."""

    number: int
    cause: str = ""


_encoder = msgspec.msgpack.Encoder()


def encode_blocks(message: BlockOrder | BlocksDone) -> bytes:
    return _encoder.encode(message)


decode_order: Callable[[bytes], BlockOrder] = msgspec.msgpack.Decoder(BlockOrder).decode
decode_done: Callable[[bytes], BlocksDone] = msgspec.msgpack.Decoder(BlocksDone).decode
