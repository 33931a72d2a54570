"""Connects a core to the replicas that it sends blocks to, or gets them from."""

from collections.abc import Callable

from engine.core.block_receiver import BlockReceiver
from engine.core.block_sender import BlockSender
from engine.core.disaggregated_core import DisaggregatedCore
from engine.core.engine import EngineCore
from engine.core.incoming_blocks import ArrivedBlocks
from engine.core.protocols import Executor
from engine.disaggregation import DECODE
from engine.host_blocks import ATTACH, HostBlocks
from engine.kv_format import KVLayout


class BlockLink:
    """The host blocks of a core, and the thread that sends them (prefill replicas) or fills them (decode replicas).

    Args:
        core: whose loop does not run yet.
        layout: of its blocks.
        executor: of its ranks, which map the host blocks.
        folder: of its sockets.
        wake: makes its loop turn; called from any thread.
    """

    address = ""  # where blocks are received

    def __init__(self, core: EngineCore, layout: KVLayout, executor: Executor, folder: str, wake: Callable[[], None]):
        assert isinstance(core, DisaggregatedCore), "the core has no role"
        self._core = core
        self._wake = wake
        memory = HostBlocks(core.config.transfer_blocks, layout.block_bytes, layout.ranks)
        arguments = {"path": memory.path, "num_blocks": memory.num_blocks, "block_bytes": memory.block_bytes}
        executor.call(ATTACH, arguments).result()
        self._end: BlockReceiver | BlockSender
        if core.config.role == DECODE:
            incoming = core.scheduler.incoming
            self._end = receiver = BlockReceiver(
                f"ipc://{folder}/blocks", memory, incoming, layout.fingerprint, self._on_arrived
            )
            self.address = receiver.address
        else:
            self._end = sender = BlockSender(memory, layout.fingerprint, self._on_sent)
            core.send_blocks = sender.send

    def close(self) -> None:
        """End the thread."""
        self._end.close()

    def _on_arrived(self, arrived: ArrivedBlocks) -> None:
        self._core.receive_blocks(arrived)
        self._wake()

    def _on_sent(self, host_blocks: list[int]) -> None:
        self._core.scheduler.outgoing.give_back(host_blocks)
        self._wake()  # more may be due
