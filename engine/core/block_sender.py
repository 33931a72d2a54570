"""Sends the prompt blocks of a prefill replica from host blocks: a thread, since checksums take longer than the core's
loop may wait.

Each decode replica has a connection, on which few messages are queued. What waits for one stays in its host blocks, so
a slow network slows the sending, and memory stays bounded. What waits for a connection that is lost or refused is
dropped: the decode replica computes it.
"""

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

import zmq

from engine.core.outgoing_blocks import Shipment
from engine.curve import Change, Connections, connect, secure_client, send_heartbeats
from engine.errors import cause_of
from engine.host_blocks import HostBlocks
from engine.kv_format import pack_header
from engine.kv_transfer import QUEUED_MESSAGES, BlocksHeader, encode_header

log = logging.getLogger("redline.core")

CONNECT_S = 5.0  # until an address that does not answer is given up
RETRY_S = 5.0  # until an address that was given up is tried again
MESSAGE_BYTES = 1 << 20  # of blocks, at most, unless one is larger: the receiver checks a message while the next comes


@dataclass(slots=True, eq=False)
class _Peer:
    """The connection to a decode replica, and what is to be sent there.

    accept_by: when it is given up unless it is accepted, on the monotonic clock; infinite: it is, and can be used.
    num_sent: blocks of the first shipment that were sent.
    """

    address: str
    socket: "zmq.Socket[bytes]"
    connections: Connections
    accept_by: float
    shipments: deque[Shipment] = field(default_factory=deque)
    num_sent: int = 0

    def fault(self, now: float) -> str:
        """Why it can't be used any longer; empty: it can."""
        while (change := self.connections.next_change(0.0)) is not None:
            if change is Change.ACCEPTED:
                self.accept_by = math.inf
            elif change is Change.REFUSED:
                return f"{self.address} refuses the connection: it has another secret"
            elif change is Change.LOST and self.accept_by == math.inf:
                return f"the connection to {self.address} is lost"
        return f"{self.address} has not answered for {CONNECT_S:g} s" if now >= self.accept_by else ""


class BlockSender:
    """Sends until it is closed.

    Args:
        memory: the host blocks.
        fingerprint: of the layout of blocks, see `engine.kv_format`.
        sent: called by the thread with host blocks that may be written again.
        secret: of the run, if blocks go over TCP.
    """

    def __init__(self, memory: HostBlocks, fingerprint: bytes, sent: Callable[[list[int]], None], secret: str = ""):
        self._memory = memory
        self._fingerprint = fingerprint
        self._sent = sent
        self._secret = secret
        self._per_message = max(1, MESSAGE_BYTES // sum(memory.part_bytes))
        self._outbox: SimpleQueue[Shipment | None] = SimpleQueue()
        self._peers: dict[str, _Peer] = {}
        self._faults: dict[str, tuple[str, float]] = {}  # by address: the cause, and when it is tried again
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._woken, self._wake = os.pipe()
        self._poller.register(self._woken, zmq.POLLIN)
        self._waking = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._send_all, name="core-block-output", daemon=True)
        self._thread.start()

    def send(self, shipment: Shipment) -> None:
        """Send blocks that are in their host blocks. May be called from any thread."""
        self._put(shipment)

    def fault(self, address: str) -> str:
        """Why nothing is sent to an address for now; empty: it is. May be called from any thread."""
        cause, until = self._faults.get(address, ("", 0.0))
        return cause if time.monotonic() < until else ""

    def close(self) -> None:
        """End the thread; what it has not sent is dropped."""
        self._put(None)
        self._thread.join()
        with self._waking:
            self._closed = True
            os.close(self._wake)
            os.close(self._woken)

    def _put(self, shipment: Shipment | None) -> None:
        with self._waking:
            if not self._closed:
                self._outbox.put(shipment)
                os.write(self._wake, b"\0")

    # ------------------------------------------------------------------------------------------------------ the thread

    def _send_all(self) -> None:
        while self._take_shipments():
            now = time.monotonic()
            self._faults = {address: one for address, one in self._faults.items() if now < one[1]}
            for peer in list(self._peers.values()):
                try:
                    if not (cause := peer.fault(now)):
                        self._send_some(peer)
                except Exception as error:
                    cause = f"KV blocks can't be sent to {peer.address}: {cause_of(error)}"
                if cause:
                    self._give_up(peer, cause, now)
        for peer in self._peers.values():
            self._close(peer)
        self._context.term()

    def _take_shipments(self) -> bool:
        """Wait for something to do, and give new shipments to their connections; False: the end."""
        accept_by = min((peer.accept_by for peer in self._peers.values()), default=math.inf)
        wait_s = accept_by - time.monotonic()
        if self._woken not in dict(self._poller.poll(None if wait_s == math.inf else max(0, math.ceil(1000 * wait_s)))):
            return True
        os.read(self._woken, 4096)
        while not self._outbox.empty():
            shipment = self._outbox.get()
            if shipment is None:
                return False
            if self.fault(shipment.address) or not self._connect(shipment.address):
                self._sent(shipment.host_blocks)
            else:
                self._peers[shipment.address].shipments.append(shipment)
        return True

    def _connect(self, address: str) -> bool:
        """Have a connection to an address; False if the system has no more of them."""
        if address not in self._peers:
            try:
                self._peers[address] = self._make_peer(address)
            except zmq.ZMQError as error:
                self._faults[address] = cause, _ = f"{address}: {error}", time.monotonic() + RETRY_S
                log.error("KV blocks of prompts are not sent to %s", cause)
                return False
        return True

    def _make_peer(self, address: str) -> _Peer:
        socket = self._context.socket(zmq.PUSH)
        socket.set_hwm(QUEUED_MESSAGES)
        socket.setsockopt(zmq.LINGER, 0)
        peer = _Peer(address, socket, Connections(socket), time.monotonic() + CONNECT_S)
        self._poller.register(peer.connections.socket, zmq.POLLIN)
        if self._secret:
            secure_client(socket, self._secret)
        else:
            send_heartbeats(socket)
        try:
            connect(socket, address)
        except zmq.ZMQError:
            self._close(peer)
            raise
        return peer

    def _send_some(self, peer: _Peer) -> None:
        """Send as much as the connection takes now."""
        if peer.accept_by < math.inf:
            return
        while peer.shipments and peer.socket.poll(0, zmq.POLLOUT):
            shipment = peer.shipments[0]
            begin, end = peer.num_sent, min(peer.num_sent + self._per_message, len(shipment.keys))
            peer.socket.send_multipart(self._frames(shipment, begin, end), zmq.NOBLOCK)
            self._sent(shipment.host_blocks[begin:end])
            peer.num_sent = end
            if end == len(shipment.keys):
                peer.shipments.popleft()
                peer.num_sent = 0
        self._poller.register(peer.socket, zmq.POLLOUT if peer.shipments else 0)

    def _frames(self, shipment: Shipment, begin: int, end: int) -> list[bytes]:
        """The message with some of the blocks of a shipment."""
        header = shipment.header
        frames = [encode_header(BlocksHeader(header.handle, header.places[begin:end], header.cached_tokens))]
        for key, block in zip(shipment.keys[begin:end], shipment.host_blocks[begin:end], strict=True):
            parts = self._memory.parts(block)
            frames += [pack_header(self._fingerprint, key, parts), b"".join(parts)]
        return frames

    def _give_up(self, peer: _Peer, cause: str, now: float) -> None:
        """Drop a connection, and what waits for it."""
        del self._peers[peer.address]
        self._faults[peer.address] = cause, now + RETRY_S
        self._close(peer)
        dropped = [block for shipment in peer.shipments for block in shipment.host_blocks][peer.num_sent :]
        level = logging.WARNING if dropped else logging.INFO
        log.log(level, "%s; %d KV blocks of prompts are not sent", cause, len(dropped))
        self._sent(dropped)

    def _close(self, peer: _Peer) -> None:
        for one in (peer.connections.socket, peer.socket):
            self._poller.register(one, 0)
        peer.connections.close()
        peer.socket.close()
