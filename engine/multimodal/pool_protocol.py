"""Messages between a front end and the processes of its pool, over a stream socket.

    front end ──Job, bytes of the input──► process
    front end ◄──Started, then Done or Failed for each job, in order── process

Each message is a frame (its length in 8 bytes, then MessagePack). The bytes of an input follow its Job as a frame of
their own.
"""

import socket
from typing import Any

import msgspec

from engine import children
from engine.media.limits import MediaLimits
from engine.multimodal.types import MediaKind

HEAD_BYTES = 8


class PoolOptions(msgspec.Struct):
    """The options of a process.

    Args:
        factory: `module:function`, which makes the Processor from `model`.
        model: what the factory needs to know.
        limits: of decoding.
        socket: descriptor of the process's end of the socket.
    """

    factory: str
    model: dict[str, Any]
    limits: MediaLimits = MediaLimits()
    socket: int = -1


class Job(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Process one input, and write its tensors to a new file."""

    kind: MediaKind
    count: int  # inputs of the kind in the prompt
    options: dict[str, Any]
    path: str


class Started(msgspec.Struct, array_like=True, frozen=True, tag=0, gc=False):
    """The process has made its processor."""

    resident: int  # bytes of its memory


class Done(msgspec.Struct, array_like=True, frozen=True, tag=1, gc=False):
    """An input was processed; fields as of `engine.multimodal.types.Processed`."""

    tokens: list[int]
    grid: tuple[int, int, int] = (0, 0, 0)
    seconds_per_frame: float = 0.0
    before: str = ""
    after: str = ""
    size: int = 0  # bytes of the file
    seconds: float = 0.0
    resident: int = 0


class Failed(msgspec.Struct, array_like=True, frozen=True, tag=2, gc=False):
    """An input could not be processed, or the process could not start."""

    failure: children.Failure
    field: str | None = None  # of a RequestError
    seconds: float = 0.0
    resident: int = 0


Answer = Started | Done | Failed

encode = msgspec.msgpack.Encoder().encode
decode_job = msgspec.msgpack.Decoder(Job).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode


def receive(connection: socket.socket) -> bytearray | None:
    """The next frame of a blocking socket; None once the other end has closed."""
    head = _receive_exactly(connection, HEAD_BYTES)
    return None if head is None else _receive_exactly(connection, int.from_bytes(head, "little"))


def _receive_exactly(connection: socket.socket, length: int) -> bytearray | None:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            return None
        view = view[count:]
    return data
