"""Messages between front ends and a core elsewhere: in order, to whom they are for, with the right secret only."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from engine.curve import Connections, RefusedError, new_secret, secure_client
from engine.frontend.transport import TcpTransport
from engine.gateway import Gateway, front_end_name
from engine.messages import Abort, decode_to_core
from engine.multimodal.feature_files import PREFIX, FeatureFolder, find_parent
from engine.socket_folder import SocketFolder

FRONT_ENDS = 2
WAIT_S = 20.0


class Core:
    """The sockets of a core, and its gateway."""

    def __init__(self) -> None:
        self.secret = new_secret()
        self.folder = SocketFolder()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.inbound = self.context.socket(zmq.PULL)
        path = self.folder.path
        self.inbound.bind(f"ipc://{path}/core")
        addresses = [f"ipc://{path}/front-{number}" for number in range(FRONT_ENDS)]
        self.gateway = Gateway("127.0.0.1", self.secret, f"ipc://{path}/core", addresses)
        self.outbound = []
        for address in addresses:
            socket = self.context.socket(zmq.PUSH)
            socket.connect(address)
            self.outbound.append(socket)

    def receive(self) -> Any:
        assert self.inbound.poll(1000 * WAIT_S), "nothing has come"
        return decode_to_core(self.inbound.recv())

    def close(self) -> None:
        self.gateway.close()
        for socket in (self.inbound, *self.outbound):
            socket.close(linger=0)
        self.context.term()
        self.folder.remove()


@pytest.fixture
def core() -> Iterator[Core]:
    made = Core()
    yield made
    made.close()
    assert not Path(made.folder.path).exists()


class FrontEnd:
    """A front end's transport, and what it has received."""

    def __init__(self, core: Core, number: int):
        self.received: asyncio.Queue[bytes] = asyncio.Queue()
        self.transport = TcpTransport(core.gateway.address, front_end_name(number), core.secret)
        self.transport.open(self.received.put_nowait)

    async def next(self) -> bytes:
        return await asyncio.wait_for(self.received.get(), WAIT_S)


async def test_messages_arrive_in_order_at_those_they_are_for(core: Core) -> None:
    front_ends = [FrontEnd(core, number) for number in range(FRONT_ENDS)]
    for turn in range(50):
        for number, front_end in enumerate(front_ends):
            front_end.transport.send(Abort((turn, number)))
    found = [await asyncio.to_thread(core.receive) for _ in range(100)]
    for number in range(FRONT_ENDS):
        assert [one.handles for one in found if one.handles[1] == number] == [(turn, number) for turn in range(50)]
    for turn in range(50):
        for number, socket in enumerate(core.outbound):
            socket.send(f"{turn} for {number}".encode())
    for number, front_end in enumerate(front_ends):
        assert [await front_end.next() for _ in range(50)] == [f"{turn} for {number}".encode() for turn in range(50)]
        front_end.transport.close()


async def test_what_comes_while_a_message_is_sent_is_read(core: Core) -> None:
    front_end = FrontEnd(core, 0)
    for turn in range(200):
        front_end.transport.send(Abort((turn,)))
        await asyncio.to_thread(core.receive)
        core.outbound[0].send(b"%d" % turn)
        front_end.transport.send(Abort((turn,)))
        assert await front_end.next() == b"%d" % turn
        await asyncio.to_thread(core.receive)
    front_end.transport.close()


async def test_a_front_end_that_ended_is_replaced_by_one_of_its_name(core: Core) -> None:
    first = FrontEnd(core, 1)
    first.transport.send(Abort((1,)))
    await asyncio.to_thread(core.receive)
    first.transport.close()
    core.outbound[1].send(b"for nobody")
    second = FrontEnd(core, 1)
    second.transport.send(Abort((2,)))
    assert (await asyncio.to_thread(core.receive)).handles == (2,)
    core.outbound[1].send(b"for the second")
    while (message := await second.next()) != b"for the second":
        assert message == b"for nobody"
    second.transport.close()


async def test_a_wrong_secret_is_refused(core: Core) -> None:
    stranger = TcpTransport(core.gateway.address, front_end_name(0), new_secret())
    stranger.open(lambda _: None)
    stranger.send(Abort((666,)))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    connections = Connections(socket)
    secure_client(socket, new_secret())
    socket.connect(core.gateway.address)
    with pytest.raises(RefusedError, match="another secret"):
        await asyncio.to_thread(connections.wait_accepted, core.gateway.address, WAIT_S)
    friend = FrontEnd(core, 0)
    friend.transport.send(Abort((1,)))
    assert (await asyncio.to_thread(core.receive)).handles == (1,), "the stranger's message has not come"
    connections.close()
    socket.close(linger=0)
    context.term()
    stranger.close()
    friend.transport.close()


async def test_files_of_features_arrive_before_the_messages_that_follow(
    core: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.frontend.transport.PIECE_BYTES", 1000)
    front_end, source = FrontEnd(core, 0), tmp_path / "features"
    source.write_bytes(bytes(i % 251 for i in range(4321)))
    folder = FeatureFolder()
    try:
        paths = [f"{folder.path}/{name}" for name in ("1-0", "1-1", "2-0")]
        for path in paths:
            front_end.transport.hand_over(str(source), path)
        front_end.transport.take_back(paths[1])
        front_end.transport.send(Abort((1,)))
        await asyncio.to_thread(core.receive)
        assert {path: Path(path).read_bytes() for path in (paths[0], paths[2])} == dict.fromkeys(
            (paths[0], paths[2]), source.read_bytes()
        )
        assert not Path(paths[1]).exists()
    finally:
        folder.remove()
    front_end.transport.close()


async def test_other_folders_are_not_written(core: Core, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    front_end, source = FrontEnd(core, 0), tmp_path / "features"
    source.write_bytes(b"features")
    for path in (tmp_path / "1-0", Path(find_parent()) / "1-0", Path(find_parent()) / PREFIX / ".." / "1-0"):
        front_end.transport.hand_over(str(source), str(path))
        front_end.transport.send(Abort((1,)))
        await asyncio.to_thread(core.receive)
        assert not path.exists()
        assert f"has sent a file for {path.parent}, which is no folder" in caplog.text
    front_end.transport.close()


async def test_a_file_without_room_is_not_left_in_part(
    core: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first piece can't be written: the rest must not look like a file."""
    monkeypatch.setattr("engine.frontend.transport.PIECE_BYTES", 1000)
    front_end, source = FrontEnd(core, 0), tmp_path / "features"
    source.write_bytes(bytes(5000))
    folder = f"{find_parent()}/{PREFIX}missing"
    front_end.transport.hand_over(str(source), f"{folder}/1-0")
    front_end.transport.send(Abort((1,)))
    await asyncio.to_thread(core.receive)
    assert "the features of an input can't be stored: " in caplog.text
    assert len([one for one in caplog.records if "can't be stored" in one.message]) == 1
    front_end.transport.close()
