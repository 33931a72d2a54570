"""A KV block outside of the KV cache: in a file, or on its way to another replica.

    header │ part of rank 0 │ part of rank 1 │ …

The parts are the bytes of the block as the kernels of each rank store it, so they are valid only for an engine with the
same layout, whose fingerprint is in the header. The header, 72 bytes, little-endian:

    magic, 4 │ version, u16 │ bytes of the key, u16 │ CRC-32 of the parts, u32 │ bytes of all parts, u64
    fingerprint, 16 │ key, 32 padded with zeros │ CRC-32 of all before it, u32

The key is the hash of the block (see `engine.core.hashing`), with the suffix of its KV group.
"""

import dataclasses
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from engine.config import EngineConfig
from engine.errors import RedlineError
from engine.resolved_config import ResolvedConfig

MAGIC = b"RLKV"
VERSION = 1
MAX_KEY_BYTES = 32
_BODY = struct.Struct("<4sHHIQ16s32s")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _BODY.size + _CHECKSUM.size

Buffer = bytes | bytearray | memoryview


class KVBlockError(RedlineError):
    """A KV block from outside can't be used."""


class TruncatedBlockError(KVBlockError):
    """Bytes of the block are missing, or there are more than it has."""


class CorruptBlockError(KVBlockError):
    """Bytes of the block have changed."""


class ForeignBlockError(KVBlockError):
    """The block is another one, or from an engine with another layout."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """All that decides what the bytes of a block mean, besides the tokens in its key."""

    model: str  # the fingerprint of its files
    dtype: str
    cache_dtype: str
    kernels: str  # in words, see `StartReport.kernels`: each has a layout of its own
    windows: tuple[int, ...]  # of the KV groups
    block_size: int  # in tokens
    part_bytes: tuple[int, ...]  # of a block on each rank

    @classmethod
    def of(cls, config: EngineConfig, resolved: ResolvedConfig, model: str, dtype: str, kernels: str) -> "KVLayout":
        """The layout of an engine's blocks; arguments as the fields."""
        return cls(
            model=model,
            dtype=dtype,
            cache_dtype=config.kv_cache_dtype or dtype,
            kernels=kernels,
            windows=resolved.kv_windows,
            block_size=resolved.block_size,
            part_bytes=resolved.kv_part_bytes,
        )

    @property
    def fingerprint(self) -> bytes:
        described = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return blake2b(described.encode(), digest_size=16).digest()

    @property
    def payload_bytes(self) -> int:
        """Bytes of a block on all ranks."""
        return sum(self.part_bytes)


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What a header says about the parts that follow it."""

    key: bytes
    payload_bytes: int
    checksum: int

    def check(self, parts: Sequence[Buffer]) -> None:
        """Raise TruncatedBlockError or CorruptBlockError unless these are the parts that the header was made for."""
        found = sum(memoryview(part).nbytes for part in parts)
        if found != self.payload_bytes:
            raise TruncatedBlockError(f"the KV block has {found} bytes instead of {self.payload_bytes}")
        if _checksum(parts) != self.checksum:
            raise CorruptBlockError("the bytes of the KV block don't match their checksum")


def pack_header(fingerprint: bytes, key: bytes, parts: Sequence[Buffer]) -> bytes:
    """The header of a block.

    Args:
        fingerprint: of its `KVLayout`.
        key: at most MAX_KEY_BYTES.
        parts: the bytes of each rank, contiguous; they follow the header.
    """
    assert len(key) <= MAX_KEY_BYTES, f"a key of {len(key)} bytes"
    size = sum(memoryview(part).nbytes for part in parts)
    body = _BODY.pack(MAGIC, VERSION, len(key), _checksum(parts), size, fingerprint, key)
    return body + _CHECKSUM.pack(zlib.crc32(body))


def read_header(data: Buffer, fingerprint: bytes, key: bytes | None = None) -> BlockHeader:
    """Read a header and check that its block can be used here; the parts are checked by `BlockHeader.check`.

    Args:
        data: HEADER_BYTES bytes.
        fingerprint: of the `KVLayout` of this engine.
        key: that the block must have; None: any.

    Raises the KVBlockError that applies.
    """
    if len(data) != HEADER_BYTES:
        raise TruncatedBlockError(f"the header of the KV block has {len(data)} bytes instead of {HEADER_BYTES}")
    body, (checksum,) = data[: _BODY.size], _CHECKSUM.unpack_from(data, _BODY.size)
    magic, version, key_bytes, payload_checksum, size, found, padded = _BODY.unpack(body)
    if magic != MAGIC:
        raise ForeignBlockError("this is no KV block of Redline")
    if zlib.crc32(body) != checksum:
        raise CorruptBlockError("the header of the KV block does not match its checksum")
    if version != VERSION:
        raise ForeignBlockError(f"the KV block has version {version} of the format, this engine reads {VERSION}")
    if found != fingerprint:
        raise ForeignBlockError("the KV block is from an engine with another model, format, kernels or ranks")
    own = padded[:key_bytes]
    if key is not None and own != key:
        raise ForeignBlockError(f"the KV block is {own.hex()} instead of {key.hex()}")
    return BlockHeader(own, size, payload_checksum)


def _checksum(parts: Sequence[Buffer]) -> int:
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value
