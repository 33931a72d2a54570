import asyncio
from pathlib import Path

import pytest
import zmq

from engine.frontend import transport as module
from engine.frontend.transport import CoreAddress, ZmqTransport
from engine.messages import Abort, Ready, decode_to_core

READY = Ready("fake", "fake", "float32", 300, 128, 4, 64, 16, 10, True)


@pytest.mark.parametrize("turn_s", [module.TURN_S, 0.0])
async def test_messages_travel_both_ways_in_order_and_none_is_left_behind(
    turn_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "TURN_S", turn_s)
    to_core, from_core = (f"ipc://{tmp_path}/{name}" for name in ("core", "front"))
    context = zmq.Context()
    inbound, outbound = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbound.setsockopt(zmq.RCVTIMEO, 60_000)
    inbound.bind(to_core)
    outbound.connect(from_core)
    transport = ZmqTransport(to_core, from_core)
    received: list[bytes] = []
    enough = asyncio.Event()
    count = 200

    def deliver(data: bytes) -> None:
        received.append(data)
        if len(received) == count:
            enough.set()

    try:
        transport.open(deliver)
        transport.send(Abort((1, 2)))
        assert decode_to_core(inbound.recv()) == Abort((1, 2))
        for number in range(count):
            outbound.send(str(number).encode())
        await asyncio.wait_for(enough.wait(), 60)
        assert received == [str(number).encode() for number in range(count)]
    finally:
        transport.close()
        transport.close()
        inbound.close()
        outbound.close()
        context.term()


async def test_a_core_that_has_ended_before_a_front_end_connects(tmp_path: Path):
    """Its sockets are gone; an event reports its end."""
    gone = tmp_path / "gone"
    transport = CoreAddress(READY, f"ipc://{gone}/core", f"ipc://{gone}/front-0").make_transport()
    arrived: list[bytes] = []
    transport.open(arrived.append)
    transport.send(Abort((1,)))
    transport.close()
    assert not arrived
    with pytest.raises(zmq.ZMQError):
        CoreAddress(READY, f"ipc://{tmp_path}/core", f"ipc://{tmp_path}/{'long' * 100}").make_transport()
