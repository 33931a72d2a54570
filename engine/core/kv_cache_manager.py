"""The KV blocks that each slot holds: one block table per KV group, all from one pool.

The layers of a KV group have the same attention window, or none (full attention). At admission a request gets the
blocks of its whole sequence in groups without a window; in groups with a window, only as far ahead as one step can
reach. Blocks that a window has left are freed while the request runs. The tables of a slot in the middle of a prompt:

    full attention   a b c d e f g h     the whole prompt
    window           0 0 i j k l . .     0: freed, the null block; .: not yet allocated
                         │   └ the next token to compute
                         └ first block that it attends to

Example: block size 4, a window of 8 tokens, 24 computed tokens. The query at position 24 attends to positions 17 to 24,
so the first block in use is 17 // 4 = 4. Blocks 0 to 3 are freed; of a cached prefix they are not needed.

A cached prefix needs all its blocks in groups with full attention, and the last ones in groups with a window.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.config import window_blocks
from engine.core.block_pool import NULL_BLOCK, BlockPool
from engine.resolved_config import ResolvedConfig


@dataclass(slots=True)
class CachedPrefix:
    """A cached prefix of `num_blocks` blocks: the table of each group, and the first block that it attends to."""

    num_blocks: int
    tables: list[list[int]]
    first_blocks: list[int]


class KVCacheManager:
    """Allocates, caches and frees the blocks of slots.

    `num_blocks`: int32[slots], the blocks that hold all tokens of a slot, those that a window has left included.
    `block_tables`: of each slot and KV group.
    """

    def __init__(self, config: ResolvedConfig, pool: BlockPool | None = None):
        slots = config.max_num_seqs
        self.pool = BlockPool(config.num_blocks) if pool is None else pool
        self.num_groups = len(config.kv_windows)
        self.num_blocks = np.zeros(slots, np.int32)
        self.block_tables: list[list[list[int]]] = [[] for _ in range(slots)]
        self._first_blocks: list[list[int]] = [[] for _ in range(slots)]  # by slot and group: first block still held
        self._appended: list[tuple[int, int, int]] = []  # slot, group, block, since `take_appended`
        self._block_size = config.block_size
        self._full_groups = [group for group, window in enumerate(config.kv_windows) if not window]
        self._windowed_groups = [
            (group, window, window_blocks(window, config.max_num_batched_tokens, config.block_size))
            for group, window in enumerate(config.kv_windows)
            if window
        ]
        # Equal content has a block of its own in each group, so the hashes of the groups differ by a suffix.
        self._suffixes = [bytes([group]) if group else b"" for group in range(self.num_groups)]

    # ---------------------------------------------------------------------------------------------------- admission

    def find_cached_prefix(self, hashes: Sequence[bytes]) -> CachedPrefix:
        """The longest cached prefix of a chain of block hashes."""
        count, first_blocks = len(hashes), [0] * self.num_groups
        tables: list[list[int]] = [[]] * self.num_groups
        for group in self._full_groups:
            tables[group] = self.pool.get_cached(self._group_hashes(hashes[:count], group))
            count = len(tables[group])
        if self._windowed_groups:
            count = self._longest_end_in_all_windows(hashes, count, self.pool.block_of)
            tables = [table[:count] for table in tables]
            for group, window, _ in self._windowed_groups:
                first = first_blocks[group] = self._first_attended_block(count * self._block_size, window)
                tables[group] = [NULL_BLOCK] * first + self.pool.get_cached(
                    self._group_hashes(hashes[first:count], group)
                )
        return CachedPrefix(count, tables, first_blocks)

    def empty_prefix(self) -> CachedPrefix:
        return CachedPrefix(0, [[] for _ in range(self.num_groups)], [0] * self.num_groups)

    def key(self, block_hash: bytes, group: int) -> bytes:
        """What a block of a KV group is cached under."""
        return block_hash + self._suffixes[group]

    def _group_hashes(self, hashes: Sequence[bytes], group: int) -> Sequence[bytes]:
        suffix = self._suffixes[group]
        return [one + suffix for one in hashes] if suffix else hashes

    def _longest_end_in_all_windows(self, hashes: Sequence[bytes], count: int, cached: Container[bytes]) -> int:
        """The longest prefix, up to `count` blocks, whose last blocks are cached for every window.

        `cached`: the hashes of cached blocks, with the suffixes of groups.
        """
        before = -1
        while count != before:  # a prefix shortened for one window may end where another has no blocks
            before = count
            for group, window, _ in self._windowed_groups:
                count = self._longest_end_in_window(hashes, count, group, window, cached)
        return count

    def _longest_end_in_window(
        self, hashes: Sequence[bytes], count: int, group: int, window: int, cached: Container[bytes]
    ) -> int:
        """The longest prefix, up to `count` blocks, for which all blocks that its next token attends to are cached."""
        suffix = self._suffixes[group]
        end = count
        while end:
            first, block = self._first_attended_block(end * self._block_size, window), end
            while block > first and hashes[block - 1] + suffix in cached:
                block -= 1
            if block == first:
                break
            end = block - 1
        return end

    def _first_attended_block(self, position: int, window: int) -> int:
        """The block of the first key that the query at `position` attends to."""
        return max(0, position - window + 1) // self._block_size

    def num_blocks_needed(self, num_tokens: int, prefix: CachedPrefix) -> int:
        """How many free blocks it takes to admit a request of `num_tokens`."""
        total = -(-num_tokens // self._block_size)
        needed = sum(self._table_lengths(total, prefix.first_blocks)) - self.num_groups * prefix.num_blocks
        # Null blocks in the places of blocks that are not in the KV cache yet are counted too, as none is ever held.
        for table, first in zip(prefix.tables, prefix.first_blocks, strict=True):
            needed += self.pool.count_free(table[first:])
        return needed

    def _table_lengths(self, total: int, first_blocks: list[int]) -> list[int]:
        """The lengths of the tables of a slot of `total` blocks, given the first block in use of each."""
        lengths = [total] * self.num_groups
        for group, _, ahead in self._windowed_groups:
            lengths[group] = min(total, first_blocks[group] + ahead)
        return lengths

    def allocate(self, slot: int, num_tokens: int, prefix: CachedPrefix) -> None:
        """Give a slot the blocks of a cached prefix and new ones for the rest of `num_tokens`."""
        total = -(-num_tokens // self._block_size)
        self._hold(prefix)
        for table, length in zip(prefix.tables, self._table_lengths(total, prefix.first_blocks), strict=True):
            table += self.pool.allocate(length - len(table))
        self.num_blocks[slot] = total
        self.block_tables[slot], self._first_blocks[slot] = prefix.tables, prefix.first_blocks

    def _hold(self, prefix: CachedPrefix) -> None:
        """Add a reference to each block of a cached prefix."""
        for table, first in zip(prefix.tables, prefix.first_blocks, strict=True):
            self.pool.touch(table[first:])

    def add_cached(self, prefix: CachedPrefix, keys: Sequence[bytes]) -> list[int]:
        """Enter content into the prefix cache that the next step writes into the returned blocks, which are free then.

        Args:
            prefix: stays cached.
            keys: of content that is not cached.
        """
        pairs = zip(prefix.tables, prefix.first_blocks, strict=True)
        kept = [block for table, first in pairs for block in table[first:] if block != NULL_BLOCK]
        self.pool.touch(kept)
        blocks = self.pool.allocate(len(keys))
        self.pool.cache(blocks, keys)
        self.pool.free(blocks)
        self.pool.free(kept)
        return blocks

    # ------------------------------------------------------------------------------------------------------- growth

    @property
    def has_windows(self) -> bool:
        return bool(self._windowed_groups)

    def free_before_window(self, slot: int, position: int) -> None:
        """Free the blocks that no query from `position` on attends to."""
        for group, window, _ in self._windowed_groups:
            table, first = self.block_tables[slot][group], self._first_blocks[slot][group]
            attended = min(self._first_attended_block(position, window), len(table))
            if attended > first:
                self.pool.free(table[first:attended])
                table[first:attended] = [NULL_BLOCK] * (attended - first)
                self._first_blocks[slot][group] = attended

    def num_window_blocks_needed(self, slot: int) -> int:
        """How many blocks of its windows must be allocated for the next chunk of a slot."""
        lengths = self._table_lengths(int(self.num_blocks[slot]), self._first_blocks[slot])
        return sum(length - len(table) for length, table in zip(lengths, self.block_tables[slot], strict=True))

    def allocate_window_blocks(self, slot: int) -> None:
        """Allocate the blocks that `num_window_blocks_needed` counts."""
        lengths = self._table_lengths(int(self.num_blocks[slot]), self._first_blocks[slot])
        for group, (length, table) in enumerate(zip(lengths, self.block_tables[slot], strict=True)):
            for block in self.pool.allocate(length - len(table)):
                table.append(block)
                self._appended.append((slot, group, block))

    def append_blocks(self, slots: NDArray[np.intp], counts: NDArray[np.integer] | int = 1) -> None:
        """Allocate `counts` more blocks in every group for each of `slots`, which are distinct."""
        if not len(slots):
            return
        self.num_blocks[slots] += counts
        each = np.repeat(slots, counts).tolist()
        tables, appended = self.block_tables, self._appended
        for group in range(self.num_groups):
            for slot, block in zip(each, self.pool.allocate(len(each)), strict=True):
                tables[slot][group].append(block)
                appended.append((slot, group, block))

    def take_appended(self) -> list[tuple[int, int, int]]:
        """Slot, group and block of each block that was appended to a table since the last call."""
        appended, self._appended = self._appended, []
        return appended

    # ---------------------------------------------------------------------------------------------------------- end

    def cache_blocks(self, slot: int, hashes: Sequence[bytes], first: int, end: int) -> None:
        """Enter those of a slot's blocks `first` to `end` that it still holds into the prefix cache."""
        for group, table in enumerate(self.block_tables[slot]):
            self.pool.cache(table[first:end], self._group_hashes(hashes[first:end], group))

    def forget(self, hashes: Sequence[bytes]) -> None:
        """Take blocks out of the prefix cache, in all groups."""
        for group in range(self.num_groups):
            self.pool.forget(self._group_hashes(hashes, group))

    def reset_cache(self) -> int:
        """Empty the prefix cache; returns how many blocks were cached."""
        count = len(self.pool.block_of)
        self.pool.reset_cache()
        return count

    def free(self, slot: int) -> None:
        """Free all blocks of a slot."""
        for table, first in zip(self.block_tables[slot], self._first_blocks[slot], strict=True):
            self.pool.free(table[first:])
        self.block_tables[slot], self._first_blocks[slot] = [], []
        if self._appended:  # the slot may have received blocks earlier in the same step
            self._appended = [entry for entry in self._appended if entry[0] != slot]

    def check(self, slots: Sequence[int]) -> None:
        """Assert the invariants between steps, given the live slots."""
        self.pool.check()
        references = [0] * self.pool.num_blocks
        for slot in slots:
            for table, first in zip(self.block_tables[slot], self._first_blocks[slot], strict=True):
                assert not any(table[:first]), f"slot {slot} keeps blocks that it freed"
                for block in table[first:]:
                    references[block] += 1
        assert not references[NULL_BLOCK], "a slot holds the null block"
        assert references == self.pool.references, "references don't match the block tables"
