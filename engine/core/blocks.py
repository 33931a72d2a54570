"""KV blocks: who holds them, which content they carry, and which is reused next.

All blocks are made once. A block is *held* (references > 0) or *free*; a free block may still be *cached*: its content
is known under a hash and can be taken back until the block is handed out for something else. Free blocks form one
doubly linked list in the order of reuse:

    head ── blocks without content (newest first) ── cached blocks, least recently freed first ── tail

Every operation is O(1) a block, and nothing is allocated. Block 0 is the null block: padding writes go there, and it is
never handed out.
"""

from collections.abc import Iterable, Sequence

NULL_BLOCK = 0


class BlockPool:
    """The blocks of one KV group."""

    def __init__(self, num_blocks: int):
        if num_blocks < 2:
            raise ValueError(f"a pool needs the null block and at least one more, not {num_blocks} in all")
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self.hash_of: list[bytes | None] = [None] * num_blocks
        self.block_of: dict[bytes, int] = {}
        self._end = num_blocks  # one sentinel closes the list to a ring
        self._next = [*range(1, num_blocks + 1), 1]
        self._previous = [num_blocks, num_blocks, *range(1, num_blocks)]
        self.free_count = num_blocks - 1

    @property
    def use(self) -> float:
        """Share of the blocks that requests hold, 0..1."""
        return 1 - self.free_count / (self.num_blocks - 1)

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks that carry the longest known prefix of a chain of hashes."""
        found = []
        for block_hash in hashes:
            block = self.block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def free_among(self, blocks: Sequence[int]) -> int:
        """How many of these blocks nobody holds: holding them takes that many from the free ones."""
        references = self.references
        return sum(1 for block in blocks if references[block] == 0)

    def hold(self, blocks: Sequence[int]) -> None:
        """Add a reference to cached blocks; free ones leave the list."""
        references, following, previous = self.references, self._next, self._previous
        for block in blocks:
            if references[block] == 0:
                before, after = previous[block], following[block]
                following[before], previous[after] = after, before
                self.free_count -= 1
            references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Hand out the `count` blocks next in the order of reuse; cached content is forgotten only now."""
        assert count <= self.free_count, f"asked for {count} blocks, {self.free_count} are free"
        following, references, hash_of = self._next, self.references, self.hash_of
        taken = []
        block = following[self._end]
        for _ in range(count):
            taken.append(block)
            references[block] = 1
            known = hash_of[block]
            if known is not None:
                del self.block_of[known]
                hash_of[block] = None
            block = following[block]
        following[self._end] = block
        self._previous[block] = self._end
        self.free_count -= count
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference of each, last block first, so that a shared prefix outlives what follows it."""
        references, following, previous, end = self.references, self._next, self._previous, self._end
        for block in reversed(blocks):
            references[block] -= 1
            if references[block]:
                continue
            self.free_count += 1
            if self.hash_of[block] is None:
                before, after = end, following[end]
            else:
                before, after = previous[end], end
            following[before] = previous[after] = block
            previous[block], following[block] = before, after

    def publish(self, block: int, block_hash: bytes) -> None:
        """Make a held block's content findable; a second block with the same content stays anonymous."""
        if block_hash not in self.block_of and self.hash_of[block] is None:
            self.block_of[block_hash] = block
            self.hash_of[block] = block_hash

    def forget_all(self) -> None:
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
        """Assert what must always hold."""
        free = self.free_list()
        assert len(free) == self.free_count == len(set(free)), f"{len(free)} blocks listed, {self.free_count} counted"
        assert NULL_BLOCK not in free, "the null block is in the free list"
        for block in range(1, self.num_blocks):
            held = self.references[block]
            assert held >= 0, f"block {block} has {held} references"
            assert (held == 0) == (block in set(free)), f"block {block}: {held} references, in free list: {held != 0}"
        for block_hash, block in self.block_of.items():
            assert self.hash_of[block] == block_hash, f"block {block} is found under a hash it does not carry"
        known = sum(1 for block_hash in self.hash_of if block_hash is not None)
        assert known == len(self.block_of), f"{known} blocks carry a hash, {len(self.block_of)} can be found"
