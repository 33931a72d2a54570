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
from engine.kv_transfer import KVTcp


class BlockLink:
    """The host blocks of a core, and the thread that sends them (prefill replicas) or fills them (decode replicas).

    `layout`: the fingerprint of the blocks, in hexadecimal digits.

    Args:
        core: whose loop does not run yet.
        layout: of its blocks.
        executor: of its ranks, which map the host blocks.
        memory: the host blocks, if the ranks have mapped them already.
        where: the folder of its sockets, or its machine if other replicas run elsewhere.
        wake: makes its loop turn; called from any thread.
    """

    address = ""  # where blocks are received

    def __init__(
        self,
        core: EngineCore,
        layout: KVLayout,
        executor: Executor,
        memory: HostBlocks | None,
        where: str | KVTcp,
        wake: Callable[[], None],
    ):
        assert isinstance(core, DisaggregatedCore), "the core has no role"
        self._core = core
        self._wake = wake
        self.layout = layout.fingerprint.hex()
        if memory is None:
            memory = HostBlocks(core.config.transfer_blocks, layout.part_bytes)
            executor.call(ATTACH, memory.attachment).result()
        self._end: BlockReceiver | BlockSender
        if core.config.role == DECODE:
            incoming = core.scheduler.incoming
            place = where if isinstance(where, KVTcp) else f"ipc://{where}/blocks"
            self._end = receiver = BlockReceiver(place, memory, incoming, layout.fingerprint, self._on_arrived)
            self.address = receiver.address
        else:
            secret = where.secret if isinstance(where, KVTcp) else ""
            self._end = sender = BlockSender(memory, layout.fingerprint, self._on_sent, secret)
            core.send_blocks, core.link_fault = sender.send, sender.fault

    def close(self) -> None:
        """End the thread."""
        self._end.close()

    def _on_arrived(self, arrived: ArrivedBlocks) -> None:
        self._core.receive_blocks(arrived)
        self._wake()

    def _on_sent(self, host_blocks: list[int]) -> None:
        self._core.scheduler.outgoing.give_back(host_blocks)
        self._wake()  # more may be due
