"""Drives a core with `--kv-spill` in virtual time; its files are in memory and arrive when the test lets them."""

from collections import deque
from collections.abc import Callable
from random import Random

from engine.core.spill_scheduler import SpillScheduler
from tests.engine.core_driver import Driver
from tests.engine.fake_executor import FakeExecutor


class FakeFiles:
    """Implements `engine.core.disk_tier.Files` for the host blocks of a `FakeExecutor`.

    Each operation takes until `pump`. It fails if a step copies to the host block of a read or write meanwhile.
    """

    def __init__(self, worker: FakeExecutor, fails: Callable[[], bool] = lambda: False):
        self.fails = fails  # whether the next file is broken, or can't be written
        self.contents: dict[bytes, list[bytes | None]] = {}
        self._worker = worker
        self._reads: deque[Callable[[], None]] = deque()
        self._writes: deque[Callable[[], None]] = deque()

    def write(self, key: bytes, block: int, done: Callable[[str], None]) -> None:
        self._check_settled(block)
        copied_out = self._worker.copied_out.get(block)

        def finish() -> None:
            assert self._worker.copied_out.get(block) == copied_out, "a host block was reused while it was written"
            if self.fails():
                done("the disk is full")
                return
            self.contents[key] = list(self._worker.host[block])
            done("")

        self._writes.append(finish)

    def read(self, key: bytes, block: int, done: Callable[[str], None]) -> None:
        self._check_settled(block)
        copied_in = self._worker.copied_in.get(block)

        def finish() -> None:
            assert self._worker.copied_in.get(block) == copied_in, "a host block was used while it was read"
            if self.fails() or key not in self.contents:
                self._worker.host[block] = [b"half of a file"] * len(self._worker.host.get(block, [b""]))
                done("the file is broken")
                return
            self._worker.host[block] = list(self.contents[key])
            done("")

        self._reads.append(finish)

    def remove(self, key: bytes) -> None:
        self._writes.append(lambda: self.contents.pop(key, None))  # type: ignore[arg-type, return-value]

    def _check_settled(self, block: int) -> None:
        last = self._worker.copied_in.get(block, 0)
        assert last <= self._worker.delivered, f"step {last}, which copies host block {block}, may not have run"

    def pump(self, count: int) -> None:
        """Finish up to `count` reads, and writes."""
        for queue in (self._reads, self._writes):
            for _ in range(min(count, len(queue))):
                queue.popleft()()


class SpillDriver(Driver):
    """A driver of a core with host blocks; `use_disk` adds files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert isinstance(self.core.scheduler, SpillScheduler)
        self.scheduler = self.core.scheduler
        self.tiers = self.scheduler.tiers
        self.files = FakeFiles(self.worker)
        self.luck: Random | None = None  # how many operations on files end at a time; None: all

    def use_disk(self, num_blocks: int) -> None:
        self.scheduler.use_disk(num_blocks, self.files)

    def advance(self) -> None:
        super().advance()
        self.files.pump(100 if self.luck is None else self.luck.randint(0, 3))

    def settle(self) -> None:
        """Let all writes end."""
        for _ in range(100):
            self.files.pump(100)
            self.turn()
