"""The host blocks and files of a rank that has no memory in common with its core (see `engine.block_orders`)."""

from collections.abc import Callable
from functools import partial
from hashlib import blake2b

from engine.block_files import BlockFiles, open_folder
from engine.block_orders import BlocksDone, OpenBlocks, ReadBlock, RemoveBlock, WriteBlock, decode_order, encode_blocks
from engine.errors import RedlineError
from engine.host_blocks import OwnHostBlocks
from engine.owned_folder import OwnedFolder
from engine.text import human_bytes
from engine.worker.kv_blocks import KVBlocks


class OwnBlocks:
    """Executes the core's orders. A file of another rank is as foreign as one of another engine.

    Args:
        rank: its number.
        blocks: of its KV cache; None: it copies none, and gets no orders.
        send: sends an encoded BlocksDone to the core; may be called from any thread.
    """

    def __init__(self, rank: int, blocks: KVBlocks | None, send: Callable[[bytes], None]):
        self._rank = rank
        self._blocks = blocks
        self._send = send
        self._files: BlockFiles | None = None
        self._folder: OwnedFolder | None = None

    def execute(self, body: bytes) -> None:
        """Execute an encoded BlockOrder; files are read and written by threads."""
        order = decode_order(body)
        if isinstance(order, OpenBlocks):
            self._report(order.number, self._open(order))
            return
        assert self._files is not None, "no files were asked for"
        if isinstance(order, WriteBlock):
            self._files.write(order.key, order.block, partial(self._report, order.number))
        elif isinstance(order, ReadBlock):
            self._files.read(order.key, order.block, partial(self._report, order.number))
        else:
            assert isinstance(order, RemoveBlock)
            self._files.remove(order.key)

    def close(self) -> None:
        """End the threads and remove the files."""
        if self._files is not None:
            self._files.close()
        if self._folder is not None:
            self._folder.remove()

    def _report(self, number: int, cause: str) -> None:
        self._send(encode_blocks(BlocksDone(number, cause)))

    def _open(self, order: OpenBlocks) -> str:
        """The cause if it fails."""
        assert self._blocks is not None, "this worker copies no KV blocks"
        size = self._blocks.block_bytes
        try:
            host = OwnHostBlocks(order.num_blocks, size)
        except (OSError, ValueError, OverflowError) as error:
            return f"--kv-spill host=: {human_bytes(order.num_blocks * size)} can't be allocated: {error}"
        self._blocks.use(host.array)
        if order.disk_path:
            try:
                self._folder = open_folder(order.disk_path)
            except RedlineError as error:
                return str(error)
            own = blake2b(order.fingerprint + self._rank.to_bytes(4, "little"), digest_size=16).digest()
            self._files = BlockFiles(self._folder.path, host, own)
        return ""
