"""Blocks from host memory to host memory over real sockets; what is damaged, foreign or cut short is refused."""

import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
import zmq

from engine.columns import column
from engine.core.block_receiver import BlockReceiver
from engine.core.block_sender import BlockSender
from engine.core.incoming_blocks import ArrivedBlocks, IncomingBlocks
from engine.core.outgoing_blocks import Shipment
from engine.core.request import Request
from engine.host_blocks import HostBlocks
from engine.kv_format import pack_header
from engine.kv_transfer import BlocksHeader, Place, encode_header
from engine.messages import AddRequest, Sampling

FINGERPRINT, OTHER = b"f" * 16, b"g" * 16
RANKS, BYTES = 2, 96
HANDLE = 5
KEYS: dict[Place, bytes] = {(0, number): bytes([number]) * 16 for number in range(4)}


class End:
    """The receiving side: it waits for four blocks."""

    def __init__(self, folder: Path):
        self.memory = HostBlocks(8, BYTES, RANKS)
        self.incoming = IncomingBlocks(range(8))
        request = Request(AddRequest(HANDLE, column(range(20)), 1, Sampling()), 64, 0.0)
        assert self.incoming.wait(request, 0, dict(KEYS))
        assert [one.handle for one in self.incoming.take_wanted()] == [HANDLE]
        self.arrived: SimpleQueue[ArrivedBlocks] = SimpleQueue()
        self.receiver = BlockReceiver(
            f"ipc://{folder}/blocks", self.memory, self.incoming, FINGERPRINT, self.arrived.put
        )

    def content(self, place: Place) -> bytes:
        transfer = self.incoming.of(HANDLE)
        assert transfer is not None
        return b"".join(self.memory.parts(transfer.host_blocks[place]))


@pytest.fixture
def end(tmp_path: Path) -> Iterator[End]:
    made = End(tmp_path)
    yield made
    made.receiver.close()


def fill(memory: HostBlocks, block: int) -> bytes:
    for number, part in enumerate(memory.parts(block)):
        part[:] = bytes([block, number]) * (BYTES // 2)
    return b"".join(memory.parts(block))


def test_blocks_arrive_as_they_were_sent(end: End):
    memory, sent = HostBlocks(4, BYTES, RANKS), threading.Event()
    contents = [fill(memory, block) for block in range(4)]
    sender = BlockSender(memory, FINGERPRINT, lambda _: sent.set())
    header = BlocksHeader(HANDLE, tuple(KEYS), 12)
    sender.send(Shipment(end.receiver.address, header, list(KEYS.values()), [], [3, 2, 1, 0]))
    arrived = end.arrived.get(timeout=20)
    assert arrived == ArrivedBlocks(HANDLE, tuple(KEYS), 12)
    assert sent.wait(20)
    assert [end.content(place) for place in KEYS] == contents[::-1]
    end.incoming.arrive(arrived, 0.0)
    assert [request.handle for request in end.incoming.take_released()] == [HANDLE]
    sender.close()


def test_what_cannot_be_used_is_refused_block_by_block(end: End):
    payload = bytes(range(BYTES)) * RANKS
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.connect(end.receiver.address)
    blocks = [
        ((0, 0), pack_header(FINGERPRINT, KEYS[0, 0], [payload]), payload),
        ((0, 1), pack_header(FINGERPRINT, KEYS[0, 1], [payload]), payload[:-1] + b"?"),
        ((0, 2), pack_header(OTHER, KEYS[0, 2], [payload]), payload),
        ((0, 3), pack_header(FINGERPRINT, KEYS[0, 3], [payload]), payload[:-8]),
        ((0, 9), pack_header(FINGERPRINT, KEYS[0, 3], [payload]), payload),  # nothing waits for it
        ((0, 3), pack_header(FINGERPRINT, KEYS[0, 1], [payload]), payload),  # it is another block
    ]
    frames = [part for _, head, payload in blocks for part in (head, payload)]
    header = encode_header(BlocksHeader(HANDLE, tuple(place for place, *_ in blocks), 0))
    socket.send_multipart([b"no header"])
    socket.send_multipart([header, *frames[:-1]])
    socket.send_multipart([header, *frames])
    assert end.arrived.get(timeout=20) == ArrivedBlocks(HANDLE, ((0, 0),), 0, rejected=3)
    assert end.arrived.empty(), "the others have no blocks that could be read"
    assert end.content((0, 0)) == payload
    socket.close()
    context.term()


def test_an_ended_sender_leaves_no_thread():
    before = threading.active_count()
    sender = BlockSender(HostBlocks(1, BYTES, 1), FINGERPRINT, lambda _: None)
    sender.send(Shipment("ipc:///nowhere/at/all", BlocksHeader(1, ((0, 0),), 0), [b"k"], [], [0]))
    sender.close()
    assert threading.active_count() == before
