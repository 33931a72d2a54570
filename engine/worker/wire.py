"""What passes between an executor and its ranks: orders and answers in frames over a pair of sockets each.

executor ──FORWARD (a StepMessage), SAMPLE──► every rank        executor ◄──DONE, RESULT── rank 0
                                                                executor ◄──UP, FAILED──── every rank
"""

import socket
import struct
from enum import IntEnum
from typing import Any

import msgspec

from engine.children import Failure

_HEAD = struct.Struct("<BI")
_STEP = struct.Struct("<q")


class PeerLostError(Exception):
    """Another rank doesn't answer any more: the cause is there."""


class Kind(IntEnum):
    FORWARD = 0
    SAMPLE = 1
    DONE = 2  # a forward pass
    RESULT = 3  # an encoded StepResult
    UP = 4
    FAILED = 5


class Orders(msgspec.Struct):
    """What a rank is to run, as plain data of EngineConfig, ModelFacts and ResolvedConfig."""

    rank: int
    config: dict[str, Any]
    facts: dict[str, Any]
    resolved: dict[str, Any]
    store: str  # the file by which ranks find each other
    socket_fd: int


class Up(msgspec.Struct):
    """A rank is ready: the start-up ledger, and what computes the model (see `engine.worker.network.Built`)."""

    seconds: dict[str, float]
    kernels: str
    warnings: tuple[str, ...]


class Failed(msgspec.Struct):
    """Why a rank ends; `peer_lost`: only because another one did."""

    failure: Failure
    peer_lost: bool = False


def send(to: socket.socket, kind: Kind, body: bytes = b"") -> None:
    to.sendall(frame(kind, body))


def frame(kind: Kind, body: bytes = b"") -> bytes:
    return _HEAD.pack(kind, len(body)) + body


def sample_body(step: int, masks: bytes) -> bytes:
    return _STEP.pack(step) + masks


def read_sample(body: bytes) -> tuple[int, bytes]:
    """Step and masks."""
    return _STEP.unpack_from(body)[0], body[_STEP.size :]


def receive(source: socket.socket) -> tuple[Kind, bytes] | None:
    """The next frame, waited for without using the processor; None once the other end has closed."""
    head = _receive_exactly(source, _HEAD.size)
    if head is None:
        return None
    kind, length = _HEAD.unpack(head)
    body = _receive_exactly(source, length)
    return None if body is None else (Kind(kind), body)


def _receive_exactly(source: socket.socket, length: int) -> bytes | None:
    parts = b""
    while len(parts) < length:
        try:
            part = source.recv(length - len(parts), socket.MSG_WAITALL)
        except ConnectionResetError:  # it ended with orders unread
            return None
        if not part:
            return None
        parts += part
    return parts
