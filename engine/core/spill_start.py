"""What `--kv-spill` needs besides the core: host blocks that the ranks map, and the folder of the files."""

import os
from collections.abc import Callable

from engine.config import EngineConfig
from engine.core.block_files import BlockFiles
from engine.core.protocols import Executor
from engine.core.scheduler import Scheduler
from engine.core.spill_scheduler import SpillScheduler
from engine.errors import ConfigError
from engine.host_blocks import ATTACH, HostBlocks
from engine.kv_format import KVLayout
from engine.kv_spill import FLAG, parse_kv_spill
from engine.owned_folder import OwnedFolder
from engine.resolved_config import ResolvedConfig

PREFIX = "redline-kv-"


class SpillStore:
    """The memory and the files of one core. `close` removes the files."""

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
        self.host = HostBlocks(resolved.host_blocks, layout.block_bytes, layout.ranks)
        arguments = {"path": self.host.path, "num_blocks": self.host.num_blocks, "block_bytes": layout.block_bytes}
        executor.call(ATTACH, arguments).result()
        self._folder: OwnedFolder | None = None
        self._files: BlockFiles | None = None
        if resolved.disk_blocks:
            self._folder = _open_folder(spill.disk_path)
            self._files = BlockFiles(self._folder.path, self.host, layout.fingerprint)
            scheduler.use_disk(resolved.disk_blocks, self._files, wake)

    def close(self) -> None:
        if self._files is not None:
            self._files.close()
        if self._folder is not None:
            self._folder.remove()


def _open_folder(path: str) -> OwnedFolder:
    """A folder for the files of one core, which also removes those of cores that were killed."""
    try:
        os.makedirs(path, exist_ok=True)
        return OwnedFolder(path, PREFIX)
    except OSError as error:
        raise ConfigError(f"{FLAG} disk=: {path} can't be used: {error.strerror or error}") from error
