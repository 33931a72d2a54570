"""What `--kv-spill` needs besides the core: host blocks that the ranks map, and the folder of the files.

Ranks on several machines have memory and files of their own (see `engine.core.rank_files`).
"""

from collections.abc import Callable
from typing import cast

from engine.block_files import BlockFiles, open_folder
from engine.config import EngineConfig
from engine.core.disk_tier import Files
from engine.core.protocols import Executor
from engine.core.rank_files import BlockRanks, RankFiles
from engine.core.scheduler import Scheduler
from engine.core.spill_scheduler import SpillScheduler
from engine.executor_backend import RAY
from engine.host_blocks import ATTACH, HostBlocks
from engine.kv_format import KVLayout
from engine.kv_spill import parse_kv_spill
from engine.owned_folder import OwnedFolder
from engine.resolved_config import ResolvedConfig


class SpillStore:
    """The memory and the files of one core. `close` removes the files of its own process; ranks remove theirs.

    host: the host blocks, of which those for prompts that go to other replicas, or come from there, are the last. It is
    None if ranks have their own.
    """

    def __init__(
        self,
        config: EngineConfig,
        resolved: ResolvedConfig,
        layout: KVLayout,
        executor: Executor,
        scheduler: Scheduler,
        wake: Callable[[], None],
    ):
        """Attach them to the ranks and to the scheduler, before any request arrives.

        Args:
            config, resolved: of the replica.
            layout: of its blocks.
            executor: of its ranks.
            scheduler: of its core.
            wake: makes the core's loop turn; called from any thread.

        Raises ConfigError if the folder can't be used, or the system has no such memory.
        """
        assert config.kv_spill is not None
        assert isinstance(scheduler, SpillScheduler)
        spill = parse_kv_spill(config.kv_spill)
        self.host: HostBlocks | None = None
        self._folder: OwnedFolder | None = None
        self._files: BlockFiles | None = None
        disk_path = spill.disk_path if resolved.disk_blocks else ""
        files: Files
        if config.distributed_executor_backend == RAY:
            ranks = cast(BlockRanks, executor)
            files = RankFiles(ranks, resolved.host_blocks, layout.fingerprint, disk_path)
        else:
            self.host = host = HostBlocks(resolved.host_blocks + resolved.transfer_blocks, layout.part_bytes)
            executor.call(ATTACH, host.attachment).result()
            if disk_path:
                self._folder = open_folder(disk_path)
                files = self._files = BlockFiles(self._folder.path, host, layout.fingerprint)
        if disk_path:
            scheduler.use_disk(resolved.disk_blocks, files, wake)

    def close(self) -> None:
        if self._files is not None:
            self._files.close()
        if self._folder is not None:
            self._folder.remove()
