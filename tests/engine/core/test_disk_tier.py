"""The index of files beside a model of the files: what is read is what was spilled, and never what was forgotten."""

from collections import OrderedDict, deque
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.core.disk_tier import DiskTier
from engine.core.host_tier import HostTier

KEYS = [bytes([i]) for i in range(8)]
Content = tuple[bytes, int]  # a key, and how often its content was forgotten before


class ModelFiles:
    """Files and host blocks as what they hold. Writes and removals end in order, and so do reads."""

    def __init__(self) -> None:
        self.host: dict[int, Content] = {}
        self.files: dict[bytes, Content] = {}
        self.writes: deque[Callable[[bool], None]] = deque()
        self.reads: deque[Callable[[bool], None]] = deque()

    def write(self, key: bytes, block: int, done: Callable[[str], None]) -> None:
        content = self.host[block]
        assert content[0] == key, "another block is written than was asked for"

        def finish(fails: bool) -> None:
            assert self.host[block] == content, "a host block changed while it was written"
            if not fails:
                self.files[key] = content
            done("the disk is full" if fails else "")

        self.writes.append(finish)

    def read(self, key: bytes, block: int, done: Callable[[str], None]) -> None:
        self.host.pop(block, None)

        def finish(fails: bool) -> None:
            assert block not in self.host, "a host block was reused while it was read"
            if fails or key not in self.files:
                done("the file is broken")
            else:
                self.host[block] = self.files[key]
                done("")

        self.reads.append(finish)

    def remove(self, key: bytes) -> None:
        self.writes.append(lambda _: self.files.pop(key, None))  # type: ignore[arg-type, return-value]


class DiskTierMachine(RuleBasedStateMachine):
    @initialize(host_blocks=st.integers(1, 5), disk_blocks=st.integers(1, 6))
    def start(self, host_blocks: int, disk_blocks: int) -> None:
        self.host, self.files = HostTier(host_blocks), ModelFiles()
        self.tier = DiskTier(disk_blocks, self.host, self.files)
        self.forgotten = dict.fromkeys(KEYS, 0)
        self.asked: OrderedDict[bytes, None] = OrderedDict()  # reads on their way
        self.step = 0

    @rule(key=st.sampled_from(KEYS))
    def spill(self, key: bytes) -> None:
        """As `TieredKVCacheManager._spill` does it, in a step whose result is known at once."""
        if self.host.find(key) is None:
            block = self.host.take()
            if block is None:
                return
            self.host.mark_copied(block)
            self.host.enter(key, block)
            self.host.unpin(block)
            self.files.host[block] = key, self.forgotten[key]
            self.step += 1
            self.host.send_copies(self.step)
        self.tier.add(key)

    @rule()
    def complete(self) -> None:
        self.host.complete(self.step)

    @rule(key=st.sampled_from(KEYS))
    def read(self, key: bytes) -> None:
        if key in self.tier.keys and key not in self.host.block_of and self.tier.read(key):
            self.tier.touch([key])
            self.asked[key] = None

    @rule(key=st.sampled_from(KEYS))
    def forget(self, key: bytes) -> None:
        self.host.drop(key)
        self.tier.drop(key)
        self.forgotten[key] += 1

    @rule()
    def reset(self) -> None:
        self.host.reset()
        self.tier.reset()
        for key in KEYS:
            self.forgotten[key] += 1
        assert not self.tier.keys

    @rule(fails=st.sampled_from([False, False, True]))
    def end_read(self, fails: bool) -> None:
        if self.files.reads:
            self.files.reads.popleft()(fails)

    @rule(fails=st.sampled_from([False, False, True]), count=st.integers(1, 4))
    def end_writes(self, fails: bool, count: int) -> None:
        for _ in range(min(count, len(self.files.writes))):
            self.files.writes.popleft()(fails)

    @rule()
    def turn(self) -> None:
        self.tier.turn(self._arrived)

    def _arrived(self, key: bytes, block: int | None) -> None:
        del self.asked[key]
        if block is not None:
            assert self.files.host[block] == (key, self.forgotten[key])
            assert self.host.block_of[key] == block

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "tier"):
            return
        self.host.check()
        self.tier.check()
        for key, block in self.host.block_of.items():
            assert self.files.host[block] == (key, self.forgotten[key]), "a host block has other content"

    def teardown(self) -> None:
        """Everything ends, and each file that is indexed is there."""
        if not hasattr(self, "tier"):
            return
        self.complete()
        for _ in range(40):
            self.end_read(False)
            self.end_writes(False, 4)
            self.turn()
        assert not self.asked, "a read was never answered"
        for key in self.tier.keys:
            assert self.files.files[key] == (key, self.forgotten[key])
        assert self.files.files.keys() == self.tier.keys.keys(), "a file is left that nobody knows of"


TestDiskTierMachine = DiskTierMachine.TestCase
TestDiskTierMachine.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
