"""One request on the wire: its state, and everything that was seen of it."""

from array import array
from enum import Enum, auto

from bench.loadgen.connection import Connection
from bench.loadgen.response import Ending, Head, says_done


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
        "ending",
        "ends",
        "failure",
        "freed_ns",
        "head",
        "index",
        "intended_ns",
        "left",
        "payload",
        "read_ns",
        "ready_ns",
        "reused",
        "sent_ns",
        "stamps",
        "state",
        "unended",
    )

    def __init__(self, index: int, payload: bytes, intended_ns: int):
        self.index = index
        self.payload = payload
        self.left: memoryview | None = None  # what is still to be sent, while sending
        self.intended_ns = intended_ns  # closed loop: when its turn came
        self.freed_ns = 0  # closed loop: arrival of the end of the answer it follows; 0 where it follows none
        self.ready_ns = 0  # when the connection stood
        self.sent_ns = 0  # just before the first byte went out; 0: never
        self.state = State.UNOPENED
        self.connection: Connection | None = None
        self.reused = False  # the connection has carried a request before
        self.answer = bytearray()
        self.answering = False  # a part of the body of a 200 is there
        self.ends = array("q")  # length of the answer after each read
        self.stamps = array("q")  # arrival of the last segment of each read
        self.read_ns = array("q")  # when the client got to it
        self.head: Head | None = None
        self.ending: Ending | None = None  # with the head
        self.unended = False  # its framing ended late or never: the loop had to wait until nothing came any more
        self.failure: tuple[str, str] | None = None  # (status, error) of what the sockets saw

    @property
    def begun(self) -> bool:
        """Whether it counts: it was sent, or sending it was tried."""
        return self.sent_ns > 0 or self.failure is not None

    def says_done(self) -> bool:
        """Whether the server has said that this is the end, whatever its framing says."""
        return says_done(self.answer)
