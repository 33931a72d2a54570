"""Which content the host blocks have, and the order in which they are reused: least recently used first.

Ranks copy blocks to and from host blocks in the order of step messages, so among their copies any block may be reused
at any time. Threads of the core's process, which read and write files, are not in this order. A block that a thread
uses is *pinned*, and a thread only gets *settled* blocks, whose copies have all been made.
"""

from collections import OrderedDict, deque

PENDING = 1 << 62  # in place of the number of a step that isn't known yet


class HostTier:
    """The index of the host blocks; their bytes are in `engine.host_blocks`."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.block_of: OrderedDict[bytes, int] = OrderedDict()  # by key, the least recently used first
        self.key_of: list[bytes | None] = [None] * num_blocks
        self._free = deque(range(num_blocks))  # without content; those that were given up last are reused last
        self._pins = [0] * num_blocks
        self._copied_in = [0] * num_blocks  # the last step that copies to or from each block
        self._unsent: set[int] = set()  # blocks with copies in the step that is being scheduled
        self._completed = 0  # the last step whose copies have been made

    @property
    def num_used(self) -> int:
        """Blocks with content."""
        return len(self.block_of)

    def find(self, key: bytes) -> int | None:
        """The block with some content, which becomes the most recently used one."""
        block = self.block_of.get(key)
        if block is not None:
            self.block_of.move_to_end(key)
        return block

    def take(self, *, settled: bool = False) -> int | None:
        """A block for new content, which is pinned; what it held is forgotten. None: all are pinned, or not settled."""
        block = next((one for one in self._free if not settled or self.is_settled(one)), None)
        if block is not None:
            self._free.remove(block)
        else:
            found = (one for one in self.block_of.values() if not self._pins[one])
            block = next((one for one in found if not settled or self.is_settled(one)), None)
            if block is None:
                return None
            self._forget(block)
        self._pins[block] = 1
        return block

    def enter(self, key: bytes, block: int) -> None:
        """A taken block has, or gets in the next step, the content of `key`, which no other block has."""
        assert key not in self.block_of, "two blocks of one content"
        self.block_of[key] = block
        self.key_of[block] = key

    def pin(self, block: int) -> None:
        self._pins[block] += 1

    def unpin(self, block: int) -> None:
        self._pins[block] -= 1
        self._give_up(block)

    def drop(self, key: bytes) -> None:
        """Forget some content, if a block has it."""
        block = self.block_of.get(key)
        if block is not None:
            self._forget(block)
            self._give_up(block)

    def reset(self) -> None:
        """Forget all content."""
        for key in list(self.block_of):
            self.drop(key)

    def _forget(self, block: int) -> None:
        key = self.key_of[block]
        assert key is not None, f"host block {block} has no content"
        del self.block_of[key]
        self.key_of[block] = None

    def _give_up(self, block: int) -> None:
        if self.key_of[block] is None and not self._pins[block]:
            self._free.append(block)

    # --------------------------------------------------------------------------------------------- copies of the ranks

    def mark_copied(self, block: int) -> None:
        """The step that is being scheduled copies to or from a block."""
        self._copied_in[block] = PENDING
        self._unsent.add(block)

    def send_copies(self, step: int) -> None:
        """The copies that were marked are in the message of a step."""
        for block in self._unsent:
            self._copied_in[block] = step
        self._unsent.clear()

    def complete(self, step: int) -> None:
        """The result of a step has arrived, so its copies have been made."""
        self._completed = step

    def is_settled(self, block: int) -> bool:
        """Whether all copies of a block have been made, so that a thread may read it, or write to it if it is taken."""
        return self._copied_in[block] <= self._completed

    def check(self) -> None:
        """Assert the invariants."""
        free = set(self._free)
        assert len(free) == len(self._free), "a host block is free twice"
        for key, block in self.block_of.items():
            assert self.key_of[block] == key, f"host block {block} is found under a key that it does not have"
        assert sum(key is not None for key in self.key_of) == len(self.block_of), "a key is of two host blocks"
        for block in range(self.num_blocks):
            in_use = self.key_of[block] is not None or self._pins[block] > 0
            assert self._pins[block] >= 0, f"host block {block} has {self._pins[block]} pins"
            assert in_use != (block in free), f"host block {block} is free: {block in free}, in use: {in_use}"
