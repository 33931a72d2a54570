"""A transport to a core in the same thread."""

from collections.abc import Callable

from engine.frontend.transport import LocalFiles
from engine.messages import ToCore, encode


class InlineTransport(LocalFiles):
    """`receive` takes the encoded messages to the core, and the core sends through `from_core`."""

    def __init__(self, receive: Callable[[bytes], None] | None = None):
        self.receive = receive
        self._deliver: Callable[[bytes], None] | None = None

    def open(self, deliver: Callable[[bytes], None]) -> None:
        self._deliver = deliver

    def send(self, message: ToCore) -> None:
        assert self.receive is not None, "no core was attached"
        self.receive(encode(message))

    def from_core(self, _front_end: int, data: bytes) -> None:
        """The core's `send`."""
        if self._deliver is not None:
            self._deliver(data)

    def close(self) -> None:
        self._deliver = None
