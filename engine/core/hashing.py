"""Names of KV blocks: a chain of cryptographic hashes over token ids.

    root  = H(salt, adapter)
    hash₀ = H(root  + tokens of block 0)
    hash₁ = H(hash₀ + tokens of block 1) …

Two requests share a block only if everything before it is the same too. Salt and adapter sit in the root and reach
every block through the chain. Where items (images) stand in a block, what `item_keys` says of them follows its tokens:
placeholder tokens are the same for all items. 128 bits of BLAKE2b: nobody can construct a collision to read another
tenant's cache.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b

from engine.messages import ItemRef

HASH_BYTES = 16
TOKEN_BYTES = 4


def root_hash(cache_salt: str = "", adapter: str = "") -> bytes:
    """The parent of a request's first block; each part is framed by its length, so that parts can't run together."""
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in (cache_salt.encode(), adapter.encode()))
    return blake2b(framed, digest_size=HASH_BYTES).digest()


def item_keys(items: Sequence[ItemRef], block_size: int) -> dict[int, bytes]:
    """What items add to the hash of a block, by block: each item in it, and where it begins from the block's start.

    The length is part of it: a front end that gives two lengths to one hash must not mix up their embeddings.
    """
    keys: dict[int, bytes] = {}
    for item in items:
        framed = len(item.hash).to_bytes(4, "little") + item.hash
        for block in range(item.offset // block_size, (item.offset + item.length - 1) // block_size + 1):
            where = (item.offset - block * block_size).to_bytes(8, "little", signed=True)
            keys[block] = keys.get(block, b"") + framed + where + item.length.to_bytes(8, "little")
    return keys


NO_KEYS: Mapping[int, bytes] = {}


def extend_hashes(
    hashes: list[bytes],
    root: bytes,
    tokens: bytes | memoryview,
    block_size: int,
    keys: Mapping[int, bytes] = NO_KEYS,
) -> None:
    """Append the hashes of all full blocks of `tokens` (int32) that `hashes` doesn't hold yet; `keys`: of items."""
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
