"""KV blocks: their references, the content that they cache, and the order in which they are reused.

All blocks are created once. A block is *held* (references > 0) or *free*. A free block may still be *cached*: its
content is found by its hash until the block is allocated again. Free blocks form one doubly linked list in the order of
reuse:

    head ── blocks without content (newest first) ── cached blocks, least recently freed first ── tail

Every operation is O(1) per block and allocates no memory. Block 0 is the null block: padding is written to it, and it
is never allocated.
"""

from collections.abc import Iterable, Sequence

NULL_BLOCK = 0


class BlockPool:
    """All KV blocks of an engine."""

    def __init__(self, num_blocks: int):
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least the null block, not {num_blocks} in all")
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self.hash_of: list[bytes | None] = [None] * num_blocks
        self.block_of: dict[bytes, int] = {}
        self._end = num_blocks  # one sentinel makes the list circular
        self._next = [*range(1, num_blocks + 1), 1]
        self._previous = [num_blocks, num_blocks, *range(1, num_blocks)]
        self.num_free = num_blocks - 1

    @property
    def usage(self) -> float:
        """Fraction of the blocks that requests hold, 0..1."""
        held = self.num_blocks - 1 - self.num_free
        return held / max(self.num_blocks - 1, 1)  # an engine without KV cache has the null block only

    def get_cached(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of a chain of hashes."""
        found = []
        for block_hash in hashes:
            block = self.block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def count_free(self, blocks: Sequence[int]) -> int:
        """How many of these blocks are free: `touch` takes that many from the free list."""
        references = self.references
        return sum(1 for block in blocks if references[block] == 0)

    def touch(self, blocks: Sequence[int]) -> None:
        """Add a reference to cached blocks; free ones leave the free list."""
        references, following, previous = self.references, self._next, self._previous
        for block in blocks:
            if references[block] == 0:
                before, after = previous[block], following[block]
                following[before], previous[after] = after, before
                self.num_free -= 1
            references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks from the head of the free list, which evicts their cached content."""
        assert count <= self.num_free, f"{count} blocks were requested, {self.num_free} are free"
        following, references, hash_of = self._next, self.references, self.hash_of
        allocated = []
        block = following[self._end]
        for _ in range(count):
            allocated.append(block)
            references[block] = 1
            block_hash = hash_of[block]
            if block_hash is not None:
                del self.block_of[block_hash]
                hash_of[block] = None
            block = following[block]
        following[self._end] = block
        self._previous[block] = self._end
        self.num_free -= count
        return allocated

    def free(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block, last block first, so that a shared prefix is reused after what follows it."""
        references, following, previous, end = self.references, self._next, self._previous, self._end
        for block in reversed(blocks):
            references[block] -= 1
            if references[block]:
                continue
            self.num_free += 1
            if self.hash_of[block] is None:
                before, after = end, following[end]
            else:
                before, after = previous[end], end
            following[before] = previous[after] = block
            previous[block], following[block] = before, after

    def cache(self, blocks: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Enter held blocks into the prefix cache; null blocks and duplicates of cached content are skipped."""
        block_of, hash_of = self.block_of, self.hash_of
        for block, block_hash in zip(blocks, hashes, strict=True):
            if block_hash not in block_of and hash_of[block] is None and block != NULL_BLOCK:
                block_of[block_hash] = block
                hash_of[block] = block_hash

    def forget(self, hashes: Iterable[bytes]) -> None:
        """Take blocks out of the prefix cache; held blocks stay held."""
        for block_hash in hashes:
            block = self.block_of.pop(block_hash, None)
            if block is not None:
                self.hash_of[block] = None

    def reset_cache(self) -> None:
        """Empty the prefix cache; held blocks stay held."""
        for block in self.block_of.values():
            self.hash_of[block] = None
        self.block_of.clear()

    def free_list(self) -> list[int]:
        """Free blocks in the order of reuse."""
        blocks = []
        block = self._next[self._end]
        while block != self._end:
            blocks.append(block)
            block = self._next[block]
        return blocks

    def check(self) -> None:
        """Assert the invariants."""
        free = self.free_list()
        listed = set(free)
        assert len(free) == self.num_free == len(listed), f"{len(free)} blocks listed, {self.num_free} counted"
        assert NULL_BLOCK not in listed, "the null block is in the free list"
        for block in range(1, self.num_blocks):
            held = self.references[block]
            assert held >= 0, f"block {block} has {held} references"
            assert (held == 0) == (block in listed), f"block {block}: {held} references, in free list: {held != 0}"
        for block_hash, block in self.block_of.items():
            assert self.hash_of[block] == block_hash, f"block {block} is found under a hash it does not carry"
        known = sum(1 for block_hash in self.hash_of if block_hash is not None)
        assert known == len(self.block_of), f"{known} blocks carry a hash, {len(self.block_of)} can be found"
