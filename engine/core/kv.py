"""Which blocks each row holds: one table for every KV group, all from one pool.

The layers of a group see equally far back. Where that is a window, blocks that it has left are given back while the
row runs, and a prompt gets them only as far ahead as a step can reach; all others are there from admission on:

    sees all       a b c d e f g h     the whole prompt
    sees a window  0 0 i j k l . .     0: given back, the null block; .: not yet handed out
                       │   └ computed
                       └ the first key that the next token sees

A cached prefix needs all its blocks in groups that see all, but just the last ones where a window is seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.config import ResolvedConfig, window_blocks
from engine.core.blocks import NULL_BLOCK, BlockPool
from engine.core.rows import Rows

Handed = Callable[[int, int, int], None]


@dataclass(slots=True)
class Prefix:
    """A cached prefix of `count` blocks: the table of each group, and its first block that is still seen."""

    count: int
    tables: list[list[int]]
    firsts: list[int]


class KVTables:
    """Fills the tables of rows; `handed(row, group, block)` hears of each block that one gets after its admission."""

    def __init__(self, config: ResolvedConfig, rows: Rows, handed: Handed):
        self.pool = BlockPool(config.num_blocks)
        self.groups = len(config.kv_windows)
        self._tables = rows.tables
        self._firsts: list[list[int]] = [[] for _ in range(config.max_num_seqs)]
        self._size = size = config.block_size
        self._handed = handed
        self._full = [group for group, window in enumerate(config.kv_windows) if not window]
        budget = config.max_num_batched_tokens
        self._windowed = [
            (group, window, window_blocks(window, budget, size))
            for group, window in enumerate(config.kv_windows)
            if window
        ]
        # One content has a block in each group, each with a name of its own.
        self._suffixes = [bytes([group]) if group else b"" for group in range(self.groups)]

    # ---------------------------------------------------------------------------------------------------- admission

    def find(self, hashes: Sequence[bytes]) -> Prefix:
        """The longest cached prefix of a chain of hashes."""
        count, firsts = len(hashes), [0] * self.groups
        tables: list[list[int]] = [[]] * self.groups
        for group in self._full:
            tables[group] = self.pool.find(self._names(hashes[:count], group))
            count = len(tables[group])
        if self._windowed:
            count = self._last_seen_by_all(hashes, count)
            tables = [table[:count] for table in tables]
            for group, window, _ in self._windowed:
                first = firsts[group] = self._first_seen(count * self._size, window)
                tables[group] = [NULL_BLOCK] * first + self.pool.find(self._names(hashes[first:count], group))
        return Prefix(count, tables, firsts)

    def nothing(self) -> Prefix:
        """The empty prefix."""
        return Prefix(0, [[] for _ in range(self.groups)], [0] * self.groups)

    def _names(self, hashes: Sequence[bytes], group: int) -> Sequence[bytes]:
        suffix = self._suffixes[group]
        return [one + suffix for one in hashes] if suffix else hashes

    def _last_seen_by_all(self, hashes: Sequence[bytes], count: int) -> int:
        """The longest prefix, up to `count` blocks, whose end all windows have cached."""
        before = -1
        while count != before:  # what one window lacks may move another's end
            before = count
            for group, window, _ in self._windowed:
                count = self._last_seen(hashes, count, group, window)
        return count

    def _last_seen(self, hashes: Sequence[bytes], count: int, group: int, window: int) -> int:
        """How long a prefix, up to `count` blocks, has all blocks cached that a window sees from its end."""
        known, suffix = self.pool.block_of, self._suffixes[group]
        end = count
        while end:
            first, at = self._first_seen(end * self._size, window), end
            while at > first and hashes[at - 1] + suffix in known:
                at -= 1
            if at == first:
                break
            end = at - 1
        return end

    def _first_seen(self, position: int, window: int) -> int:
        """The block of the first key that a query at a position sees."""
        return max(0, position - window + 1) // self._size

    def wanted(self, length: int, prefix: Prefix) -> int:
        """How many blocks a row of `length` tokens takes from the free ones at admission."""
        wanted = sum(self._ends(-(-length // self._size), prefix.firsts)) - self.groups * prefix.count
        for table, first in zip(prefix.tables, prefix.firsts, strict=True):
            wanted += self.pool.free_among(table[first:])
        return wanted

    def _ends(self, total: int, firsts: list[int]) -> list[int]:
        """How far the tables of a row of `total` blocks reach, given what the windows still see."""
        ends = [total] * self.groups
        for group, _, ahead in self._windowed:
            ends[group] = min(total, firsts[group] + ahead)
        return ends

    def take(self, row: int, length: int, prefix: Prefix) -> None:
        """Give a row a prefix and the further blocks for `length` tokens."""
        for table, first in zip(prefix.tables, prefix.firsts, strict=True):
            self.pool.hold(table[first:])
        for table, end in zip(prefix.tables, self._ends(-(-length // self._size), prefix.firsts), strict=True):
            table += self.pool.allocate(end - len(table))
        self._tables[row], self._firsts[row] = prefix.tables, prefix.firsts

    # ------------------------------------------------------------------------------------------------------- growth

    @property
    def windowed(self) -> bool:
        """Whether any group sees a window only."""
        return bool(self._windowed)

    def shed(self, row: int, position: int) -> None:
        """Give back what nobody sees who computes from `position` on."""
        for group, window, _ in self._windowed:
            table, first = self._tables[row][group], self._firsts[row][group]
            seen = min(self._first_seen(position, window), len(table))
            if seen > first:
                self.pool.release(table[first:seen])
                table[first:seen] = [NULL_BLOCK] * (seen - first)
                self._firsts[row][group] = seen

    def lacks(self, row: int, total: int) -> int:
        """How many blocks the next chunk of a row, which will have `total` of them, may need beside its own."""
        ends = self._ends(total, self._firsts[row])
        return sum(end - len(table) for end, table in zip(ends, self._tables[row], strict=True))

    def follow(self, row: int, total: int) -> None:
        """Hand out what the row lacks."""
        for group, end in enumerate(self._ends(total, self._firsts[row])):
            table = self._tables[row][group]
            for block in self.pool.allocate(end - len(table)):
                table.append(block)
                self._handed(row, group, block)

    def append(self, rows: Sequence[int]) -> None:
        """One more block in every group for each of `rows`; one named twice gets two."""
        tables, handed = self._tables, self._handed
        for group in range(self.groups):
            for row, block in zip(rows, self.pool.allocate(len(rows)), strict=True):
                tables[row][group].append(block)
                handed(row, group, block)

    # ---------------------------------------------------------------------------------------------------------- end

    def publish(self, row: int, hashes: Sequence[bytes], first: int, end: int) -> None:
        """Name a row's blocks `first` to `end`, those that it still holds."""
        for group, table in enumerate(self._tables[row]):
            for block, name in zip(table[first:end], self._names(hashes[first:end], group), strict=True):
                if block != NULL_BLOCK:
                    self.pool.publish(block, name)

    def release(self, row: int) -> None:
        """Take all blocks from a row."""
        for table, first in zip(self._tables[row], self._firsts[row], strict=True):
            self.pool.release(table[first:])
        self._tables[row], self._firsts[row] = [], []

    def held(self, row: int) -> list[int]:
        """How many blocks a row holds, of each group."""
        return [len(table) - first for table, first in zip(self._tables[row], self._firsts[row], strict=True)]

    def check(self, rows: Sequence[int]) -> None:
        """Assert what must hold between steps, given which rows are live."""
        self.pool.check()
        references = [0] * self.pool.num_blocks
        for row in rows:
            for table, first in zip(self._tables[row], self._firsts[row], strict=True):
                assert not any(table[:first]), f"row {row} remembers blocks that it gave back"
                for block in table[first:]:
                    references[block] += 1
        assert not references[NULL_BLOCK], "a row holds the null block"
        assert references == self.pool.references, "references don't match the rows' tables"
