"""Sends the prompt blocks of a prefill replica from host blocks: a thread, since checksums take longer than the core's
loop may wait."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from queue import SimpleQueue

import zmq

from engine.core.outgoing_blocks import Shipment
from engine.host_blocks import HostBlocks
from engine.kv_format import pack_header
from engine.kv_transfer import encode_header

log = logging.getLogger("redline.core")

MAX_SOCKETS = 64  # more than living decode replicas; those of dead ones are closed first


class BlockSender:
    """Sends until it is closed.

    Args:
        memory: the host blocks.
        fingerprint: of the layout of blocks, see `engine.kv_format`.
        sent: called by the thread when the host blocks of a shipment may be written again.
    """

    def __init__(self, memory: HostBlocks, fingerprint: bytes, sent: Callable[[list[int]], None]):
        self._memory = memory
        self._fingerprint = fingerprint
        self._sent = sent
        self._outbox: SimpleQueue[Shipment | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._send_all, name="core-block-output", daemon=True)
        self._thread.start()

    def send(self, shipment: Shipment) -> None:
        """Send blocks that are in their host blocks. May be called from any thread."""
        self._outbox.put(shipment)

    def close(self) -> None:
        """End the thread once what it was given is sent."""
        self._outbox.put(None)
        self._thread.join()

    def _send_all(self) -> None:
        context = zmq.Context()
        sockets: OrderedDict[str, zmq.Socket[bytes]] = OrderedDict()  # least recently used first
        while (shipment := self._outbox.get()) is not None:
            try:
                socket = sockets.get(shipment.address)
                if socket is None:
                    socket = sockets[shipment.address] = context.socket(zmq.PUSH)
                    socket.set_hwm(0)  # a decode replica requests no more than it has room for
                    socket.setsockopt(zmq.LINGER, 0)
                    socket.connect(shipment.address)
                sockets.move_to_end(shipment.address)
                if len(sockets) > MAX_SOCKETS:
                    sockets.popitem(last=False)[1].close()
                socket.send_multipart(self._frames(shipment), zmq.NOBLOCK)
            except Exception:  # the decode replica computes the blocks
                log.exception("%d KV blocks could not be sent to %s", len(shipment.keys), shipment.address)
            self._sent(shipment.host_blocks)
        for socket in sockets.values():
            socket.close()
        context.term()

    def _frames(self, shipment: Shipment) -> list[bytes]:
        frames = [encode_header(shipment.header)]
        for key, block in zip(shipment.keys, shipment.host_blocks, strict=True):
            parts = self._memory.parts(block)
            frames += [pack_header(self._fingerprint, key, parts), b"".join(parts)]
        return frames
