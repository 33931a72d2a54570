"""Hashes of KV blocks: a chain of cryptographic hashes over token ids.

    root  = H(salt, adapter)
    hash₀ = H(root  + tokens of block 0)
    hash₁ = H(hash₀ + tokens of block 1) …

Two requests share a block only if everything before it is equal too. Salt and adapter enter the root and reach every
block through the chain. All multimodal inputs have the same placeholder tokens, so `mm_block_keys` are hashed after the
tokens of a block. The hash is BLAKE2b with 128 bits, so that no collision can be constructed to read another tenant's
cache.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b

from engine.messages import MMInputRef

HASH_BYTES = 16
TOKEN_BYTES = 4


def root_hash(cache_salt: str = "", adapter: str = "") -> bytes:
    """The parent of a request's first block. Each part is preceded by its length, so that no two pairs are confused."""
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in (cache_salt.encode(), adapter.encode()))
    return blake2b(framed, digest_size=HASH_BYTES).digest()


def joint_range(mm_inputs: Sequence[MMInputRef]) -> tuple[int, int] | None:
    """The first token of several inputs that attend to each other, and the end of the last one; None without them."""
    if len(mm_inputs) < 2 or not mm_inputs[0].joint:
        return None
    return mm_inputs[0].offset, mm_inputs[-1].offset + mm_inputs[-1].length


def mm_block_keys(
    mm_inputs: Sequence[MMInputRef], block_size: int, tokens: bytes | memoryview = b""
) -> dict[int, bytes]:
    """What multimodal inputs add to the hash of each block: the hash, offset from the block's start and length of each.

    The length is included because a front end may use one hash for inputs of two lengths. The first block of joint
    inputs depends on all of them and on the text between them, which the later ones see.

    Args:
        mm_inputs: by offset.
        block_size: tokens of a block.
        tokens: int32, of the prompt; used for joint inputs.
    """
    keys: dict[int, bytes] = {}
    if (joint := joint_range(mm_inputs)) is not None:
        begin, end = joint
        state = blake2b(memoryview(tokens)[begin * TOKEN_BYTES : end * TOKEN_BYTES], digest_size=HASH_BYTES)
        for mm_input in mm_inputs:
            place = mm_input.offset - begin, mm_input.length, len(mm_input.hash)
            state.update(b"".join(number.to_bytes(8, "little") for number in place) + mm_input.hash)
        keys[begin // block_size] = state.digest()
    for mm_input in mm_inputs:
        framed = len(mm_input.hash).to_bytes(4, "little") + mm_input.hash
        length = mm_input.length.to_bytes(8, "little")
        for block in range(mm_input.offset // block_size, (mm_input.offset + mm_input.length - 1) // block_size + 1):
            offset = (mm_input.offset - block * block_size).to_bytes(8, "little", signed=True)
            keys[block] = keys.get(block, b"") + framed + offset + length
    return keys


NO_KEYS: Mapping[int, bytes] = {}


def extend_hashes(
    hashes: list[bytes], root: bytes, tokens: bytes | memoryview, block_size: int, keys: Mapping[int, bytes] = NO_KEYS
) -> None:
    """Append the hashes of the full blocks of `tokens` (int32) that `hashes` lacks; `keys` are from `mm_block_keys`."""
    size = block_size * TOKEN_BYTES
    parent = hashes[-1] if hashes else root
    view = memoryview(tokens)
    for start in range(len(hashes) * size, len(view) - size + 1, size):
        state = blake2b(parent, digest_size=HASH_BYTES)
        state.update(view[start : start + size])
        if keys:
            state.update(keys.get(start // size, b""))
        parent = state.digest()
        hashes.append(parent)
