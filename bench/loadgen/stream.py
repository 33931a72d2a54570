"""One request on the wire: its state and its recording."""

from array import array
from enum import Enum, auto

from bench.loadgen.connection import Connection
from bench.loadgen.response import Ending, Head, has_done

GENERATOR = "generator"  # status of a request for which this host had no connection


class State(Enum):
    """The state of a stream."""

    UNOPENED = auto()
    CONNECTING = auto()  # includes the TLS handshake
    READY = auto()
    SENDING = auto()
    RECEIVING = auto()
    CLOSED = auto()


class Stream:
    """The raw recording of one request; times are CLOCK_REALTIME in nanoseconds."""

    __slots__ = (
        "body_started", "connection", "ending", "ends", "failure", "freed_ns", "head", "index", "intended_ns", "left",
        "payload", "read_ns", "ready_ns", "response", "reused", "sent_ns", "stamps", "state", "unended",
    )  # fmt: skip

    def __init__(self, index: int, payload: bytes, intended_ns: int):
        self.index = index
        self.payload = payload
        self.left: memoryview | None = None  # the rest of the payload, while sending
        self.intended_ns = intended_ns  # closed loop: when it could be sent
        self.freed_ns = 0  # closed loop: arrival of the end of the response before it; 0 if there is none
        self.ready_ns = 0  # when the connection was ready
        self.sent_ns = 0  # just before the first byte was sent; 0: never
        self.state = State.UNOPENED
        self.connection: Connection | None = None
        self.reused = False  # the connection was used by a request before
        self.response = bytearray()
        self.body_started = False  # a part of the body of a 200 has arrived
        self.ends = array("q")  # length of the response after each read
        self.stamps = array("q")  # arrival of the last segment of each read
        self.read_ns = array("q")  # time of each read
        self.head: Head | None = None
        self.ending: Ending | None = None  # set with the head
        self.unended = False  # its framing has no end: the loop waited until no more bytes arrived
        self.failure: tuple[str, str] | None = None  # (status, error) of a failed connection

    @property
    def begun(self) -> bool:
        """Whether the request was sent, or sending it was tried."""
        return self.sent_ns > 0 or self.failure is not None

    def is_done(self) -> bool:
        """Whether the server has sent [DONE], even if the framing has no end."""
        return has_done(self.response)
