"""One request on the wire: its state, and everything that was seen of it."""

from array import array
from enum import Enum, auto

from bench.loadgen.connection import Connection
from bench.loadgen.response import Head


class State(Enum):
    """How far a stream is."""

    UNOPENED = auto()
    CONNECTING = auto()  # includes the TLS handshake
    READY = auto()
    SENDING = auto()
    RECEIVING = auto()
    CLOSED = auto()


class Stream:
    """The raw record of one request; stamps are CLOCK_REALTIME in nanoseconds."""

    __slots__ = (
        "answer",
        "answering",
        "connection",
        "done_seen_ns",
        "ends",
        "failure",
        "head",
        "index",
        "intended_ns",
        "left",
        "read_ns",
        "ready_ns",
        "sent_ns",
        "stamps",
        "state",
    )

    def __init__(self, index: int, payload: bytes, intended_ns: int):
        self.index = index
        self.left = memoryview(payload)  # what is still to be sent
        self.intended_ns = intended_ns
        self.ready_ns = 0  # when the connection stood
        self.sent_ns = 0  # just before the first byte went out; 0: never
        self.state = State.UNOPENED
        self.connection: Connection | None = None
        self.answer = bytearray()
        self.answering = False  # a part of the body of a 200 is there
        self.ends = array("q")  # length of the answer after each read
        self.stamps = array("q")  # arrival of the last segment of each read
        self.read_ns = array("q")  # when the client got to it
        self.head: Head | None = None
        self.done_seen_ns = 0
        self.failure: tuple[str, str] | None = None  # (status, error) of what the sockets saw

    @property
    def begun(self) -> bool:
        """Whether it counts: it was sent, or sending it was tried."""
        return self.sent_ns > 0 or self.failure is not None
