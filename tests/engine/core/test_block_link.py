"""Blocks from host memory to host memory over real sockets; what is damaged, foreign or cut short is refused."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
import zmq

from engine.columns import column
from engine.core import block_sender
from engine.core.block_receiver import BlockReceiver
from engine.core.block_sender import BlockSender
from engine.core.incoming_blocks import ArrivedBlocks, IncomingBlocks
from engine.core.outgoing_blocks import Shipment
from engine.core.request import Request
from engine.curve import new_secret
from engine.host_blocks import HostBlocks
from engine.kv_format import pack_header
from engine.kv_transfer import BlocksHeader, KVTcp, Place, encode_header
from engine.messages import AddRequest, Sampling

FINGERPRINT, OTHER = b"f" * 16, b"g" * 16
RANKS, BYTES = 2, 96
HANDLE = 5
KEYS: dict[Place, bytes] = {(0, number): bytes([number]) * 16 for number in range(4)}
PATIENCE_S = 60.0
TCP = KVTcp("127.0.0.1", new_secret())


class End:
    """The receiving side: it waits for four blocks."""

    def __init__(self, where: str | KVTcp, block_bytes: int = BYTES):
        self.memory = HostBlocks(8, (block_bytes,) * RANKS)
        self.incoming = IncomingBlocks(range(8))
        request = Request(AddRequest(HANDLE, column(range(20)), 1, Sampling()), 64, 0.0)
        assert self.incoming.wait(request, 0, dict(KEYS))
        assert [one.handle for one in self.incoming.take_wanted(0.0)] == [HANDLE]
        self.arrived: SimpleQueue[ArrivedBlocks] = SimpleQueue()
        self.receiver = BlockReceiver(where, self.memory, self.incoming, FINGERPRINT, self.arrived.put)

    def content(self, place: Place) -> bytes:
        transfer = self.incoming.of(HANDLE)
        assert transfer is not None
        return b"".join(self.memory.parts(transfer.host_blocks[place]))


class Sending:
    """The sending side: a sender, its memory, and the host blocks that it has returned."""

    def __init__(self, secret: str = "", blocks: int = 4, block_bytes: int = BYTES):
        self.memory = HostBlocks(blocks, (block_bytes,) * RANKS)
        self.contents = [fill(self.memory, block) for block in range(blocks)]
        self.returned: list[int] = []
        self.sender = BlockSender(self.memory, FINGERPRINT, self.returned.extend, secret)

    def send(self, address: str, host_blocks: list[int], handle: int = HANDLE) -> None:
        places = tuple((0, number) for number in range(len(host_blocks)))
        keys = [bytes([number]) * 16 for number in range(len(host_blocks))]
        self.sender.send(Shipment(address, BlocksHeader(handle, places, 12), keys, [], host_blocks))


def fill(memory: HostBlocks, block: int) -> bytes:
    for number, part in enumerate(memory.parts(block)):
        part[:] = bytes([block, number]) * (len(part) // 2)
    return b"".join(memory.parts(block))


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(params=["ipc", "tcp"])
def end(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[End]:
    made = End(TCP if request.param == "tcp" else f"ipc://{tmp_path}/blocks")
    yield made
    made.receiver.close()


@pytest.fixture
def tcp_end() -> Iterator[End]:
    made = End(TCP)
    yield made
    made.receiver.close()


@pytest.fixture
def sending() -> Iterator[Sending]:
    made = Sending(TCP.secret)
    yield made
    made.sender.close()


@pytest.mark.parametrize("message_bytes", [1, 2 * BYTES * RANKS, 1 << 20])
def test_blocks_arrive_as_they_were_sent(end: End, message_bytes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(block_sender, "MESSAGE_BYTES", message_bytes)
    over_tcp = end.receiver.address.startswith("tcp://127.0.0.1:")
    sending = Sending(TCP.secret if over_tcp else "")
    sending.send(end.receiver.address, [3, 2, 1, 0])
    messages = []
    while sum(len(one.places) for one in messages) < 4:
        messages.append(end.arrived.get(timeout=PATIENCE_S))
    assert len(messages) == {1: 4, 2 * BYTES * RANKS: 2}.get(message_bytes, 1)
    assert [place for one in messages for place in one.places] == list(KEYS)
    assert {(one.handle, one.cached_tokens, one.rejected) for one in messages} == {(HANDLE, 12, 0)}
    wait_until(lambda: sending.returned == [3, 2, 1, 0])
    assert [end.content(place) for place in KEYS] == sending.contents[::-1]
    for one in messages:
        end.incoming.arrive(one, 0.0)
    assert [request.handle for request in end.incoming.take_released()] == [HANDLE]
    sending.sender.close()


def test_what_cannot_be_used_is_refused_block_by_block(tmp_path: Path):
    end = End(f"ipc://{tmp_path}/blocks")
    payload = bytes(range(BYTES)) * RANKS
    context = zmq.Context()
    pushing = context.socket(zmq.PUSH)
    pushing.connect(end.receiver.address)
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
    pushing.send_multipart([b"no header"])
    pushing.send_multipart([header, *frames[:-1]])
    pushing.send_multipart([header, *frames])
    assert end.arrived.get(timeout=PATIENCE_S) == ArrivedBlocks(HANDLE, ((0, 0),), 0, rejected=3)
    assert end.arrived.empty(), "the others have no blocks that could be read"
    assert end.content((0, 0)) == payload
    pushing.close()
    context.term()
    end.receiver.close()


def test_another_secret_is_refused_and_both_ends_log_it(tcp_end: End, caplog: pytest.LogCaptureFixture):
    stranger = Sending(new_secret())
    stranger.send(tcp_end.receiver.address, [0, 1])
    wait_until(lambda: sorted(stranger.returned) == [0, 1])
    assert "refuses the connection: it has another secret" in stranger.sender.fault(tcp_end.receiver.address)
    wait_until(lambda: "was refused: the other end has another secret" in caplog.text)
    assert "another secret; 2 KV blocks of prompts are not sent" in caplog.text
    stranger.sender.close()
    assert tcp_end.arrived.empty()


def test_a_peer_without_keys_is_refused(tcp_end: End, sending: Sending, caplog: pytest.LogCaptureFixture):
    with zmq.Context() as context, context.socket(zmq.PUSH) as plain:
        plain.setsockopt(zmq.LINGER, 0)
        plain.connect(tcp_end.receiver.address)
        plain.send_multipart([encode_header(BlocksHeader(HANDLE, (), 0))])
        wait_until(lambda: "was refused" in caplog.text)
        sending.send(tcp_end.receiver.address, [0])
        assert tcp_end.arrived.get(timeout=PATIENCE_S).places == ((0, 0),)
        assert tcp_end.arrived.empty()


def test_what_waits_for_a_lost_connection_is_dropped_and_a_new_address_is_used(sending: Sending):
    first = End(TCP)
    address = first.receiver.address
    sending.send(address, [0])
    assert first.arrived.get(timeout=PATIENCE_S).places == ((0, 0),)
    first.receiver.close()
    wait_until(lambda: sending.sender.fault(address))
    assert sending.sender.fault(address) == f"the connection to {address} is lost"
    sending.send(address, [1, 2])
    wait_until(lambda: sending.returned == [0, 1, 2])
    second = End(TCP)
    assert not sending.sender.fault(second.receiver.address)
    sending.send(second.receiver.address, [3])
    assert second.arrived.get(timeout=PATIENCE_S).places == ((0, 0),)
    assert second.content((0, 0)) == sending.contents[3]
    second.receiver.close()


def test_an_address_that_does_not_answer_is_given_up_and_tried_again(
    sending: Sending, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(block_sender, "CONNECT_S", 0.2)
    monkeypatch.setattr(block_sender, "RETRY_S", 0.2)
    with socket.socket() as silent:  # accepts connections, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        sending.send(address, [0, 1])
        wait_until(lambda: sending.returned == [0, 1])
        assert f"{address} has not answered for 0.2 s; 2 KV blocks of prompts are not sent" in caplog.text
    wait_until(lambda: not sending.sender.fault(address))
    end = End(TCP)
    sending.send(end.receiver.address, [2])
    assert end.arrived.get(timeout=PATIENCE_S).places == ((0, 0),)
    end.receiver.close()


def test_a_slow_receiver_holds_up_its_own_blocks_only(tmp_path: Path):
    """What it does not take stays in host blocks, so nothing piles up in memory."""
    size, blocks = 1 << 20, 64
    sending = Sending("", blocks, size)
    context = zmq.Context()
    slow = context.socket(zmq.PULL)
    slow.set_hwm(1)
    port = slow.bind_to_random_port("tcp://127.0.0.1")
    sending.send(f"tcp://127.0.0.1:{port}", list(range(blocks - 1)))
    wait_until(lambda: sending.returned)
    other = End(f"ipc://{tmp_path}/blocks", size)
    sending.send(other.receiver.address, [blocks - 1])
    assert other.arrived.get(timeout=PATIENCE_S).places == ((0, 0),)
    assert 0 < len(sending.returned) < blocks
    received = 0
    while received < blocks - 1:
        frames = slow.recv_multipart()
        assert frames[2] == sending.contents[received]
        received += 1
    wait_until(lambda: len(sending.returned) == blocks)
    sending.sender.close()
    other.receiver.close()
    slow.close()
    context.term()


def test_an_address_that_can_not_be_connected_is_logged(sending: Sending, caplog: pytest.LogCaptureFixture):
    sending.send("nonsense", [0, 1])
    wait_until(lambda: sending.returned == [0, 1])
    assert "KV blocks of prompts are not sent to nonsense: " in caplog.text
    assert sending.sender.fault("nonsense")


def test_ended_ends_leave_no_thread():
    before = threading.active_count()
    sender = Sending()
    sender.send("ipc:///nowhere/at/all", [0])
    sender.sender.close()
    sender.send("ipc:///nowhere/at/all", [1])
    end = End(TCP)
    end.receiver.close()
    assert threading.active_count() == before
