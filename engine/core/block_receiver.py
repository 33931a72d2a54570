"""Receives the prompt blocks that prefill replicas send, checks them, and puts them into host blocks.

A thread does so, since checksums and copies take longer than the core's loop may wait. It reports the blocks that can
be used to the loop.
"""

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import zmq

from engine.core.incoming_blocks import ArrivedBlocks, IncomingBlocks
from engine.curve import Change, Connections, Gate, bind
from engine.errors import RedlineError, cause_of
from engine.host_blocks import HostBlocks
from engine.kv_format import KVBlockError, read_header
from engine.kv_transfer import QUEUED_MESSAGES, BlocksHeader, KVTcp, Place, decode_header

log = logging.getLogger("redline.core")


class BlockReceiver:
    """Binds an address and receives until it is closed.

    Args:
        where: the address of a Unix socket, or the machine, of which a free port is bound; `address` has the result.
        memory: the host blocks.
        incoming: the blocks that are expected.
        fingerprint: of the layout of blocks, see `engine.kv_format`.
        deliver: called by the thread after each message.
    """

    def __init__(
        self,
        where: str | KVTcp,
        memory: HostBlocks,
        incoming: IncomingBlocks,
        fingerprint: bytes,
        deliver: Callable[[ArrivedBlocks], None],
    ):
        self._memory = memory
        self._incoming = incoming
        self._fingerprint = fingerprint
        self._deliver = deliver
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.set_hwm(QUEUED_MESSAGES)
        self._connections = Connections(self._socket)
        self._gate: Gate | None = None
        if isinstance(where, KVTcp):
            self._gate = Gate(self._context, where.secret)
            self._gate.secure(self._socket)
            self.address = bind(self._socket, where.host)
            log.info("KV blocks of prompts are received at %s", self.address)
        else:
            self._socket.bind(where)
            self.address = where
        self._stopped, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._receive_all, name="core-block-input", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Receive no more."""
        os.write(self._stop, b"\0")
        self._thread.join()
        if self._gate is not None:
            self._gate.close()
        self._context.term()
        os.close(self._stop)
        os.close(self._stopped)

    def _receive_all(self) -> None:
        poller = zmq.Poller()
        for one in (self._stopped, self._connections.socket, self._socket):
            poller.register(one, zmq.POLLIN)
        while self._stopped not in (ready := dict(poller.poll())):
            if self._connections.socket in ready and self._connections.next_change(0.0) is Change.REFUSED:
                log.warning("a connection to %s was refused: the other end has another secret", self.address)
            if self._socket in ready:
                self._receive()
        self._connections.close()
        self._socket.close(linger=0)

    def _receive(self) -> None:
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:  # a connection that was refused has made the socket readable
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
