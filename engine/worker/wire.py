"""What passes between an executor and its ranks: orders through memory that all share, answers over sockets.

executor ──FORWARD (a StepMessage), SAMPLE, CALL──► every rank    executor ◄──LOADED, DONE, RESULT, ANSWER── rank 0
                                                                  executor ◄──UP, FAILED──────────────────── every rank

Of an order each rank's socket carries the head alone, for which it waits; the body is in the ring (see ring.py), once
for all. Of an answer it carries both. Where rank 0 drives the others (see broadcast.py), it alone gets orders.
"""

import socket
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import msgspec

from engine.children import Failure
from engine.worker.ring import RingReader

_HEAD = struct.Struct("<BI")
_STEP = struct.Struct("<q")
_LOADED = struct.Struct("<qq")


class PeerLostError(Exception):
    """Another rank doesn't answer any more: the cause is there."""


class Kind(IntEnum):
    FORWARD = 0
    SAMPLE = 1
    DONE = 2  # a forward pass
    RESULT = 3  # an encoded StepResult
    UP = 4
    FAILED = 5
    MORE = 6  # a part of an order whose rest follows
    LOADED = 7  # bytes of the weights, and of all
    CALL = 8  # what isn't a step
    ANSWER = 9


class Orders(msgspec.Struct):
    """What a rank is to run, as plain data of EngineConfig, ModelFacts and ResolvedConfig."""

    rank: int
    config: dict[str, Any]
    facts: dict[str, Any]
    resolved: dict[str, Any]
    store: str  # the file by which ranks find each other
    socket_fd: int
    ring_fd: int | None  # None: rank 0 tells it what to do
    listeners: int  # ranks that read the ring, the first ones


class Call(msgspec.Struct):
    method: str
    arguments: dict[str, Any]


class Answer(msgspec.Struct):
    """Of rank 0; all ranks have the same."""

    result: Any = None
    failure: Failure | None = None


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


def parts(kind: Kind, body: bytes, most: int) -> Iterator[tuple[bytes, bytes]]:
    """An order's heads and what each announces, of `most` bytes at most."""
    for begin in range(0, len(body) - most, most):
        yield _HEAD.pack(Kind.MORE, most), body[begin : begin + most]
    rest = body[(len(body) - 1) // most * most :] if body else b""
    yield _HEAD.pack(kind, len(rest)), rest


def receive_order(source: socket.socket, ring: RingReader) -> tuple[Kind, bytes] | None:
    """The next order, waited for without using the processor; None once the other end has closed."""
    before = b""
    while (head := _receive_exactly(source, _HEAD.size)) is not None:
        kind, length = _HEAD.unpack(head)
        body = before + ring.read(length)
        if kind != Kind.MORE:
            return Kind(kind), body
        before = body
    return None


def loaded_body(done: int, total: int) -> bytes:
    return _LOADED.pack(done, total)


def read_loaded(body: bytes) -> tuple[int, int]:
    """Bytes that were read, and all."""
    done, total = _LOADED.unpack(body)
    return done, total


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
