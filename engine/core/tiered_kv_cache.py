"""Prefix caching over three tiers (`--kv-spill`): the KV cache, blocks in host memory, and files.

A cached block that the KV cache evicts is copied to a host block before its own is used again. A request finds blocks
in the KV cache and in host blocks alike: it gets blocks of the KV cache for the latter, and its first step copies them.
What is found in host memory stays there, so it need not be copied out a second time.

All copies of a step are in its message, in the order in which they were decided here. What files hold is read into host
blocks before a request can find it, see `engine.core.read_ahead`.
"""

from collections import ChainMap
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from engine.columns import column
from engine.core.block_pool import NULL_BLOCK, BlockPool
from engine.core.disk_tier import DiskTier
from engine.core.host_tier import HostTier
from engine.core.kv_cache_manager import CachedPrefix, KVCacheManager
from engine.messages import COPY_IN, COPY_OUT
from engine.resolved_config import ResolvedConfig
from engine.stats import SpillStats


@dataclass(slots=True)
class TieredPrefix(CachedPrefix):
    """A cached prefix of which host blocks have a part: KV group, index in its table, and key of each such block.

    Until the prefix is allocated, the tables have the null block in their places.
    """

    in_host: list[tuple[int, int, bytes]] = field(default_factory=list)


class SpillingBlockPool(BlockPool):
    """A pool that reports each cached block and its key before it is evicted."""

    def __init__(self, num_blocks: int, evict: Callable[[int, bytes], None]):
        super().__init__(num_blocks)
        self._evict = evict

    def allocate(self, count: int) -> list[int]:
        block = self._next[self._end]
        for _ in range(count):
            key = self.hash_of[block]
            if key is not None:
                self._evict(block, key)
            block = self._next[block]
        return super().allocate(count)


class TieredKVCacheManager(KVCacheManager):
    """Also keeps what the KV cache evicts.

    host: the host blocks. disk: the files; None without `disk=`, and until `use_disk`.
    """

    def __init__(self, config: ResolvedConfig):
        super().__init__(config, SpillingBlockPool(config.num_blocks, self._spill))
        self.host = HostTier(config.host_blocks)
        self.disk: DiskTier | None = None
        self._copies: list[tuple[int, int, int]] = []  # of the step that is being scheduled
        self._near = ChainMap[bytes, object](self.pool.block_of, self.host.block_of)  # type: ignore[arg-type]
        self._all = self._near
        self._from_disk: set[int] = set()  # host blocks that were read and have not been used since
        self.num_spilled = self.num_lost = self.num_host_hits = self.num_disk_hits = 0

    def use_disk(self, disk: DiskTier) -> None:
        """Keep blocks in files too."""
        self.disk = disk
        self._all = ChainMap[bytes, object](*self._near.maps, disk.keys)  # type: ignore[arg-type]

    # ---------------------------------------------------------------------------------------------------------- find

    def find_cached_prefix(self, hashes: Sequence[bytes]) -> CachedPrefix:
        count = self._longest_prefix(hashes, self._near)
        tables: list[list[int]] = []
        first_blocks = self._first_blocks_at(count)
        in_host = []
        for group, first in enumerate(first_blocks):
            table = [NULL_BLOCK] * first
            for index, key in enumerate(self._group_hashes(hashes[first:count], group), first):
                block = self.pool.block_of.get(key, NULL_BLOCK)
                if block == NULL_BLOCK:
                    in_host.append((group, index, key))
                table.append(block)
            tables.append(table)
        return TieredPrefix(count, tables, first_blocks, in_host)

    def find_outside(self, hashes: Sequence[bytes]) -> list[bytes]:
        """The keys of what the KV cache lacks of the longest prefix that all tiers have, in the order of its tokens."""
        count = self._longest_prefix(hashes, self._all)
        missing = [
            (index, group, key)
            for group, first in enumerate(self._first_blocks_at(count))
            for index, key in enumerate(self._group_hashes(hashes[first:count], group), first)
            if key not in self.pool.block_of
        ]
        return [key for _, _, key in sorted(missing)]

    def num_cached_blocks(self, hashes: Sequence[bytes]) -> int:
        """The blocks of the longest prefix that all tiers have."""
        return self._longest_prefix(hashes, self._all)

    def _longest_prefix(self, hashes: Sequence[bytes], cached: Container[bytes]) -> int:
        """The blocks of the longest prefix that a slot can begin with, given the cached keys."""
        count = len(hashes)
        for group in self._full_groups:
            keys = self._group_hashes(hashes[:count], group)
            count = next((index for index, key in enumerate(keys) if key not in cached), count)
        return self._longest_end_in_all_windows(hashes, count, cached)

    def _first_blocks_at(self, count: int) -> list[int]:
        """Of each group, the first block that the token behind a prefix of `count` blocks attends to."""
        first_blocks = [0] * self.num_groups
        for group, window, _ in self._windowed_groups:
            first_blocks[group] = self._first_attended_block(count * self._block_size, window)
        return first_blocks

    # --------------------------------------------------------------------------------------------------------- copies

    def _hold(self, prefix: CachedPrefix) -> None:
        for table, first in zip(prefix.tables, prefix.first_blocks, strict=True):
            self.pool.touch([block for block in table[first:] if block != NULL_BLOCK])
        if isinstance(prefix, TieredPrefix) and prefix.in_host:
            self._fetch(prefix)

    def _fetch(self, prefix: TieredPrefix) -> None:
        """Give a prefix blocks of the KV cache in place of its host blocks, which the next step copies."""
        sources: dict[bytes, int] = {}
        for _, _, key in reversed(prefix.in_host):  # so that the first blocks of a prompt are reused last
            found = self.host.find(key)
            assert found is not None, "a host block was reused while a request was admitted with it"
            self.host.pin(found)  # allocating evicts blocks, which go to host blocks
            sources[key] = found
        blocks = self.pool.allocate(len(sources))
        for (group, index, key), block in zip(prefix.in_host, blocks, strict=True):
            source = sources[key]
            prefix.tables[group][index] = block
            self._copies.append((COPY_IN, block, source))
            self.host.mark_copied(source)
            self.host.unpin(source)
            was_read = source in self._from_disk
            self._from_disk.discard(source)
            self.num_disk_hits += was_read
            self.num_host_hits += not was_read
        self.pool.cache(blocks, [key for _, _, key in prefix.in_host])

    def add_cached(self, prefix: CachedPrefix, keys: Sequence[bytes]) -> list[int]:
        sources = [self.host.block_of[key] for _, _, key in prefix.in_host] if isinstance(prefix, TieredPrefix) else []
        for source in sources:  # what is evicted for the new content must not take their place
            self.host.pin(source)
        blocks = super().add_cached(prefix, keys)
        for source in sources:
            self.host.unpin(source)
        return blocks

    def add_copies(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Add copies between blocks and host blocks of others to the step that is being scheduled."""
        self._copies += copies

    def _spill(self, block: int, key: bytes) -> None:
        """Keep a block that is evicted."""
        if self.host.find(key) is None:
            host_block = self.host.take()
            if host_block is None:
                self.num_lost += 1
                return
            self._copies.append((COPY_OUT, block, host_block))
            self._from_disk.discard(host_block)
            self.host.mark_copied(host_block)
            self.host.enter(key, host_block)
            self.host.unpin(host_block)
            self.num_spilled += 1
        if self.disk is not None:
            self.disk.add(key)

    def note_read(self, host_block: int) -> None:
        """A host block was read from a file."""
        self._from_disk.add(host_block)

    def take_copies(self, step: int) -> bytes:
        """`CopyingStep.block_copies` of the step that was scheduled, given its number."""
        copies, self._copies = self._copies, []
        if not copies:
            return b""
        self.host.send_copies(step)
        return column(copies)

    # --------------------------------------------------------------------------------------------------------- forget

    def forget(self, hashes: Sequence[bytes]) -> None:
        super().forget(hashes)
        for group in range(self.num_groups):
            for key in self._group_hashes(hashes, group):
                self.host.drop(key)
                if self.disk is not None:
                    self.disk.drop(key)

    def reset_cache(self) -> int:
        count = len(self._all)
        super().reset_cache()
        self.host.reset()
        if self.disk is not None:
            self.disk.reset()
        return count

    def stats(self) -> SpillStats:
        disk = self.disk
        return SpillStats(
            host_blocks=self.host.num_blocks,
            host_used=self.host.num_used,
            spilled=self.num_spilled,
            lost=self.num_lost,
            host_hits=self.num_host_hits,
            disk_hits=self.num_disk_hits,
            disk_blocks=disk.num_blocks if disk else 0,
            disk_used=len(disk.keys) if disk else 0,
            disk_read=disk.num_read if disk else 0,
            disk_written=disk.num_written if disk else 0,
            disk_faults=disk.num_faults if disk else 0,
        )

    def check(self, slots: Sequence[int]) -> None:
        super().check(slots)
        self.host.check()
        if self.disk is not None:
            self.disk.check()
