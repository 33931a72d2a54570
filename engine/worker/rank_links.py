"""How an executor and its ranks reach each other: the executor's side, the rank's side, and a rank as a process.

Local links use shared memory and sockets of one machine (see local_links.py), TCP links reach other machines (see
tcp_links.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.children import Failure, RankHandle
from engine.errors import RedlineError
from engine.worker.rank_protocol import Frame, FrameKind, RankOptions


@dataclass(frozen=True, slots=True)
class Gone:
    """No frame comes from a rank any more.

    why: what is known besides how its process ended, e.g. that its machine does not answer; empty: nothing.
    """

    why: str = ""


class LinkedRank(RankHandle, Protocol):
    """A rank's process, on this or another machine; a ChildProcess is one."""

    name: str

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for its end; False if it still runs, or can't be asked, after the timeout."""
        ...

    def error(self, failure: Failure | None) -> RedlineError:
        """The error of a rank that has ended: its own report, or how it ended."""
        ...

    def close(self) -> None:
        """Release it; it ends if it still runs."""
        ...


class RankLinks(Protocol):
    """The executor's side. One thread sends, one receives; `stop` may be called from any."""

    @property
    def ranks(self) -> Sequence[LinkedRank]:
        """In order of their numbers; those started so far."""
        ...

    def start(self, options: Sequence[RankOptions]) -> None:
        """Start the ranks; `link` and `store` of their options are set here."""
        ...

    def send(self, kind: FrameKind, body: bytes) -> bool:
        """Send a command to all ranks that receive commands; False if they can't be reached any more."""
        ...

    def end(self) -> None:
        """Have the ranks end once they have executed what was sent. Called by the thread that sends."""
        ...

    def next_frame(self, timeout_s: float | None = None) -> tuple[int, Frame | Gone] | None:
        """The next frame of any rank, with the rank's number; it is not waited for again once it is gone.

        None: `stop` was called. Raises TimeoutError if there is no frame in time.
        """
        ...

    def stop(self) -> None:
        """End the waits of both threads."""
        ...

    def close(self) -> None:
        """Release everything but the ranks, once both threads have ended."""
        ...


class RankEnd(Protocol):
    """The rank's side. One thread receives, others may send."""

    def receive(self) -> Frame | None:
        """Block until the next command, without using the CPU; None: the rank shall end."""
        ...

    def send(self, kind: FrameKind, body: bytes = b"") -> None:
        """Send a frame to the executor. Raises BrokenPipeError if it is gone."""
        ...

    def interrupt(self) -> None:
        """End the wait of the thread that receives."""
        ...

    def close(self) -> None:
        """Wait until what was sent has left, and close."""
        ...
