"""The scheduler of an engine with `--kv-spill`: what the KV cache evicts stays in host memory and in files."""

from collections.abc import Callable, Sequence

from msgspec.structs import asdict, replace
from numpy import bool_
from numpy.typing import NDArray

from engine.core.disk_tier import DiskTier, Files
from engine.core.feature_mirror import FeatureMirror
from engine.core.read_ahead import ReadAheadQueue
from engine.core.request import Request
from engine.core.scheduler import Scheduler
from engine.core.step_builder import StepBuilder
from engine.core.steps import ScheduledStep, StepOutcome
from engine.core.tiered_kv_cache import TieredKVCacheManager
from engine.messages import CopyingStep, StepMessage, StepResult
from engine.resolved_config import ResolvedConfig
from engine.stats import Stats


class CopyingStepBuilder(StepBuilder):
    """Adds the copies of blocks to the messages of another builder."""

    def __init__(self, inner: StepBuilder, tiers: TieredKVCacheManager):
        self._inner, self._tiers = inner, tiers
        self.assign_slot, self.free_slot = inner.assign_slot, inner.free_slot  # type: ignore[method-assign]

    @property
    def has_freed_slots(self) -> bool:
        return self._inner.has_freed_slots

    def build(self, step: int, scheduled: NDArray[bool_], chunks: list[tuple[int, int]], num_steps: int) -> StepMessage:
        message = self._inner.build(step, scheduled, chunks, num_steps)
        copies = self._tiers.take_copies(step)
        return CopyingStep(**asdict(message), block_copies=copies) if copies else message


class SpillScheduler(Scheduler):
    """Schedules as `Scheduler` does, with a prefix cache of several tiers."""

    def __init__(self, config: ResolvedConfig, features: FeatureMirror | None = None):
        self.tiers = TieredKVCacheManager(config)
        super().__init__(config, features, self.tiers)
        self._builder = CopyingStepBuilder(self._builder, self.tiers)
        self._reads: ReadAheadQueue | None = None

    def use_disk(self, num_blocks: int, files: Files, wake: Callable[[], None] = lambda: None) -> None:
        """Also keep up to `num_blocks` blocks in files; before any request arrives. Arguments as of `DiskTier`."""
        disk = DiskTier(num_blocks, self.tiers.host, files, wake)
        self.tiers.use_disk(disk)
        self.waiting = self._reads = ReadAheadQueue(self.waiting, self.tiers, disk, self._prefix_hashes)

    def _prefix_hashes(self, request: Request) -> Sequence[bytes]:
        if not request.reads_prefix_cache:
            return ()
        return request.block_hashes[: (len(request.tokens) - 1) // self.config.block_size]

    @property
    def has_work(self) -> bool:
        return super().has_work or len(self.waiting) > 0

    def schedule(self, now: float, max_steps: int = 1) -> ScheduledStep | None:
        if self._reads is not None:
            self._reads.turn()
        return super().schedule(now, max_steps)

    def update(self, step: ScheduledStep, result: StepResult) -> StepOutcome:
        self.tiers.host.complete(step.step)
        return super().update(step, result)

    def stats(self, last_step_at: float) -> Stats:
        return replace(super().stats(last_step_at), spill=self.tiers.stats())

    def check(self) -> None:
        super().check()
        if self._reads is not None:
            self._reads.check()
