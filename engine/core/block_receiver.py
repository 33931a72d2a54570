"""Receives the prompt blocks that prefill replicas send, checks them, and puts them into host blocks.

A thread does so, since checksums and copies take longer than the core's loop may wait. It reports the blocks that can
be used to the loop.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

import zmq

from engine.core.incoming_blocks import ArrivedBlocks, IncomingBlocks
from engine.errors import RedlineError, cause_of
from engine.host_blocks import HostBlocks
from engine.kv_format import KVBlockError, read_header
from engine.kv_transfer import BlocksHeader, Place, decode_header

log = logging.getLogger("redline.core")


class BlockReceiver:
    """Binds an address and receives until it is closed.

    Args:
        address: to bind; `address` has it with the port that was chosen.
        memory: the host blocks.
        incoming: the blocks that are expected.
        fingerprint: of the layout of blocks, see `engine.kv_format`.
        deliver: called by the thread after each message.
    """

    def __init__(
        self,
        address: str,
        memory: HostBlocks,
        incoming: IncomingBlocks,
        fingerprint: bytes,
        deliver: Callable[[ArrivedBlocks], None],
    ):
        self._memory = memory
        self._incoming = incoming
        self._fingerprint = fingerprint
        self._deliver = deliver
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        self.address = self._socket.getsockopt(zmq.LAST_ENDPOINT).decode().rstrip("\0")  # type: ignore[union-attr]
        self._thread = threading.Thread(target=self._receive_all, name="core-block-input", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Receive no more."""
        self._context.term()
        self._thread.join()

    def _receive_all(self) -> None:
        while True:
            try:
                frames = self._socket.recv_multipart(copy=False)
            except zmq.ContextTerminated:
                self._socket.close(linger=0)
                return
            try:
                self._deliver(self.read([frame.buffer for frame in frames]))
            except Exception as error:  # its request is computed here once the prefill has ended
                log.error("a message with %d frames of KV blocks could not be read: %s", len(frames), cause_of(error))

    def read(self, frames: list[Any]) -> ArrivedBlocks:
        """Put the blocks of a message into host blocks. Raises RedlineError if its frames do not fit together."""
        header = decode_header(frames[0])
        if len(frames) != 1 + 2 * len(header.places):
            raise RedlineError(f"{len(frames)} frames do not hold {len(header.places)} blocks")
        arrived, rejected = [], 0
        for place, head, payload in zip(header.places, frames[1::2], frames[2::2], strict=True):
            try:
                if self._put(header, place, bytes(head), payload):
                    arrived.append(place)
            except KVBlockError as error:
                log.error("block %d of a prompt is computed again: %s", place[1], error)
                rejected += 1
        return ArrivedBlocks(header.handle, tuple(arrived), header.cached_tokens, rejected)

    def _put(self, header: BlocksHeader, place: Place, head: bytes, payload: memoryview) -> bool:
        """Put one block; False if nothing waits for it. Raises KVBlockError if it can't be used."""
        block_header = read_header(head, self._fingerprint)

        def write(host_block: int) -> None:
            parts = self._memory.parts(host_block)
            begin = 0
            for part in parts:
                end = begin + len(part)
                part[:] = payload[begin:end]
                begin = end
            block_header.check(parts)  # of the copy, which is what the ranks will read

        if len(payload) != block_header.payload_bytes:
            block_header.check([payload])
        return self._incoming.put(header.handle, place, block_header.key, write)
