"""The protocol between an executor and its ranks: commands through shared memory, results over sockets.

executor ──FORWARD (a StepMessage), SAMPLE, CALL──────────► every rank
executor ◄──FORWARD_DONE, STEP_RESULT, CALL_RESULT───────── rank 0
executor ◄──REPORT (see `engine.children`)───────────────── every rank

Each rank's socket carries only the header of a command; the rank waits for it. The body is in the ring (see ring.py),
once for all ranks. Results have header and body on the socket. If rank 0 drives the others (see driver_broadcast.py),
only rank 0 gets commands.
"""

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from enum import IntEnum
from typing import Any

import msgspec

from engine.children import Failure, Report, encode_report
from engine.worker.ring import RingReader

_HEADER = struct.Struct("<BI")  # kind, bytes of the body
_STEP = struct.Struct("<q")


class PeerLostError(Exception):
    """Another rank does not answer any more. The cause is in that rank."""


class FrameKind(IntEnum):
    FORWARD = 0
    SAMPLE = 1
    FORWARD_DONE = 2
    STEP_RESULT = 3  # an encoded StepResult
    REPORT = 4
    MORE = 5  # part of a command whose rest follows
    CALL = 6
    CALL_RESULT = 7


class DeviceKind(msgspec.Struct):
    """What ranks run on besides the CPU.

    Args:
        torch_type: the device type of torch.
        use_triton: whether with the kernels in Triton, else with those in torch.
        memory_utilization: see `engine.worker.device_builder.build_device_runner`.
    """

    torch_type: str
    use_triton: bool
    memory_utilization: float | None = None


class RankOptions(msgspec.Struct):
    """What a rank is to run; config, model_info and resolved are the fields of those classes."""

    rank: int
    config: dict[str, Any]
    model_info: dict[str, Any]
    resolved: dict[str, Any]
    store: str  # the file by which the ranks find each other
    socket_fd: int
    ring_fd: int | None  # None: commands come from rank 0
    ring_readers: int  # number of ranks that read the ring, from rank 0 on
    device: DeviceKind | None = None  # None: the CPU


class Call(msgspec.Struct):
    method: str
    arguments: dict[str, Any]


class CallResult(msgspec.Struct):
    """Rank 0's result. The other ranks have the same."""

    result: Any = None
    failure: Failure | None = None


def send(to: socket.socket, kind: FrameKind, body: bytes = b"") -> None:
    to.sendall(frame(kind, body))


def send_report(to: socket.socket, report: Report) -> None:
    """Send a report; nothing happens if the executor is gone."""
    with suppress(BrokenPipeError):
        send(to, FrameKind.REPORT, encode_report(report))


def frame(kind: FrameKind, body: bytes = b"") -> bytes:
    return _HEADER.pack(kind, len(body)) + body


def split_command(kind: FrameKind, body: bytes, most: int) -> Iterator[tuple[bytes, bytes]]:
    """Headers of a command, each with its part of the body, at most `most` bytes."""
    for begin in range(0, len(body) - most, most):
        yield _HEADER.pack(FrameKind.MORE, most), body[begin : begin + most]
    rest = body[(len(body) - 1) // most * most :] if body else b""
    yield _HEADER.pack(kind, len(rest)), rest


def receive_command(source: socket.socket, ring: RingReader) -> tuple[FrameKind, bytes] | None:
    """Block until the next command, without using the CPU; None once the other end has closed."""
    before = b""
    while (header := _receive_exactly(source, _HEADER.size)) is not None:
        kind, length = _HEADER.unpack(header)
        body = before + ring.read(length)
        if kind != FrameKind.MORE:
            return FrameKind(kind), body
        before = body
    return None


def sample_body(step: int, masks: bytes = b"") -> bytes:
    return _STEP.pack(step) + masks


def read_sample(body: bytes) -> tuple[int, bytes]:
    """The number of the step, and its encoded masks."""
    step: int = _STEP.unpack_from(body)[0]
    return step, bytes(body[_STEP.size :])


def receive(source: socket.socket) -> tuple[FrameKind, bytes] | None:
    """Block until the next frame, without using the CPU; None once the other end has closed."""
    header = _receive_exactly(source, _HEADER.size)
    if header is None:
        return None
    kind, length = _HEADER.unpack(header)
    body = _receive_exactly(source, length)
    return None if body is None else (FrameKind(kind), body)


def _receive_exactly(source: socket.socket, length: int) -> bytes | None:
    parts = b""
    while len(parts) < length:
        try:
            part = source.recv(length - len(parts), socket.MSG_WAITALL)
        except ConnectionResetError:  # it ended with commands unread
            return None
        if not part:
            return None
        parts += part
    return parts
