"""Messages between a run and its generators: msgpack, one tagged struct each. `VERSION` changes with them."""

import msgspec
import numpy as np

from bench.loadgen.response import read_head
from bench.loadgen.stream import Stream

VERSION = 1


class Message(msgspec.Struct, frozen=True, tag_field="t"):
    """What crosses the connection; the tag is the name of the class."""


class Hello(Message, frozen=True, tag="hello"):
    """From the run, first of all."""

    version: int
    nonce: bytes


class Challenge(Message, frozen=True, tag="challenge"):
    """From the generator, in answer to Hello."""

    version: int
    nonce: bytes


class Proof(Message, frozen=True, tag="proof"):
    """From the run: that it has the token."""

    code: bytes


class Welcome(Message, frozen=True, tag="welcome"):
    """From the generator: that it has the token too, and what it is."""

    code: bytes
    network: str  # equal for processes that have the same loopback interface
    processes: str  # equal for processes that know each other by the same ids
    pid: int
    cores: int


class Refused(Message, frozen=True, tag="refused"):
    """From the generator, instead of Challenge or Welcome."""

    reason: str
    busy: bool = False  # with the load of another run


class Ping(Message, frozen=True, tag="ping"):
    """From the run, between loads and before their start."""


class Pong(Message, frozen=True, tag="pong"):
    """From the generator; its real-time clock in nanoseconds."""

    received_ns: int
    sent_ns: int


class Prepare(Message, frozen=True, tag="prepare"):
    """From the run: what the next load is; `count` requests follow in Requests."""

    base_url: str
    insecure: bool
    ca: str | None  # certificates to trust, in PEM
    count: int
    offsets_ns: bytes  # int64[count] after time 0; of a closed loop empty
    time_limit_s: float
    needed: int
    concurrency: int | None
    chunks_per_s: float


class Requests(Message, frozen=True, tag="requests"):
    payloads: list[bytes]


class Ready(Message, frozen=True, tag="ready"):
    """From the generator: the load can begin."""


class Failed(Message, frozen=True, tag="failed"):
    """From the generator: the load cannot be prepared, or broke off."""

    cause: str


class Begin(Message, frozen=True, tag="begin"):
    """From the run."""

    at_ns: int  # time 0, on the generator's real-time clock


class Progress(Message, frozen=True, tag="progress"):
    """From the generator, about five times a second while the load runs."""

    sent: int
    first_token: int
    finished: int
    failed: int
    awaited: int


class Cut(Message, frozen=True, tag="cut"):
    """From the run: end the load now."""


class Enough(Message, frozen=True, tag="enough"):
    """From the run: no generator waits for a request any more."""


class Ended(Message, frozen=True, tag="ended"):
    """From the generator: the load is over, and its recording can be collected."""

    cpu_s: float
    cpu_share: float
    starved_share: float
    processes: int
    cut_short: bool


class Collect(Message, frozen=True, tag="collect"):
    """From the run: send the recording."""


class Recorded(msgspec.Struct, frozen=True, array_like=True):
    """One request that was begun, as in `Stream`; times in nanoseconds on the generator's real-time clock.

    Arrays are int64 in the byte order of the hosts, which is little-endian on all that are supported.
    """

    index: int
    intended_ns: int
    freed_ns: int
    ready_ns: int
    sent_ns: int
    response: bytes
    ends: bytes  # an array over the reads, as the next two
    stamps: bytes
    read_ns: bytes
    has_head: bool
    unended: bool
    failure: tuple[str, str] | None

    @classmethod
    def of(cls, stream: Stream) -> "Recorded":
        return cls(
            stream.index, stream.intended_ns, stream.freed_ns, stream.ready_ns, stream.sent_ns, bytes(stream.response),
            stream.ends.tobytes(), stream.stamps.tobytes(), stream.read_ns.tobytes(), stream.head is not None,
            stream.unended, stream.failure,
        )  # fmt: skip

    def stream(self, ahead_ns: int) -> Stream:
        """The stream on the clock here, from which the generator's is `ahead_ns` ahead."""
        stream = Stream(self.index, b"", self.intended_ns - ahead_ns)
        # 0 stands for "never".
        stream.freed_ns, stream.ready_ns, stream.sent_ns = (
            at and at - ahead_ns for at in (self.freed_ns, self.ready_ns, self.sent_ns)
        )
        stream.response = bytearray(self.response)
        stream.ends.frombytes(self.ends)
        stream.stamps.frombytes(_earlier(self.stamps, ahead_ns))
        stream.read_ns.frombytes(_earlier(self.read_ns, ahead_ns))
        stream.head = read_head(self.response) if self.has_head else None
        stream.unended, stream.failure = self.unended, self.failure
        return stream


def _earlier(times: bytes, by_ns: int) -> bytes:
    return (np.frombuffer(times, dtype=np.int64) - by_ns).tobytes()


class Streams(Message, frozen=True, tag="streams"):
    """From the generator, in answer to Collect, several times; `last` at the end."""

    streams: list[Recorded]
    last: bool


AnyMessage = (
    Hello | Challenge | Proof | Welcome | Refused | Ping | Pong | Prepare | Requests | Ready | Failed | Begin
    | Progress | Cut | Enough | Ended | Collect | Streams
)  # fmt: skip
