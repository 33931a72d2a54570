"""A core double with a tokenizer, with its front end outside or inline."""

from collections.abc import Sequence

import msgspec

from engine.clock import FakeClock
from engine.columns import column
from engine.frontend.core_client import CoreClient
from engine.frontend.inline_front_end import InlineTexts
from engine.frontend.tokenizer import Tokenizer
from engine.messages import AddRequest, Admitted, Finished, Outputs, Ready, ToCore, decode_to_core, encode
from tests.engine.inline_transport import InlineTransport

READY = Ready("here", "fake", "float32", 300, 64, 4, 16, 4, 64, True)


class TextCore:
    """Admits each request when it comes, and sends the tokens that the test says."""

    def __init__(self, tokenizer: Tokenizer, *, inline: bool = False):
        self.received: list[ToCore] = []
        self.read: list[AddRequest] = []  # as the core's loop has them
        self.stopped: list[int] = []
        self.transport = InlineTransport(self._receive)
        self.texts = InlineTexts(tokenizer, 512, tokenizer.vocab_size)
        self._inline = inline
        ablations = ("inline-frontend",) if inline else ()
        ready = msgspec.structs.replace(READY, vocab_size=tokenizer.vocab_size, max_model_len=512, ablations=ablations)
        self.client = CoreClient(ready, tokenizer, self.transport, FakeClock())
        self.transport.open(self.client.deliver)

    @property
    def added(self) -> list[AddRequest]:
        return [message for message in self.received if isinstance(message, AddRequest)]

    def _receive(self, data: bytes) -> None:
        message = decode_to_core(data)
        self.received.append(message)
        if isinstance(message, AddRequest):
            self.read.append(self.texts.add(message) if self._inline else message)
            self.send(Outputs(at=0.0, admitted=(Admitted(message.handle, 0, 0.0),)))

    def step(self, tokens: dict[int, list[int]], finished: Sequence[Finished] = ()) -> None:
        """New tokens of requests, by handle, as one message."""
        self.send(
            Outputs(
                at=0.0,
                handles=column(list(tokens), "<i8"),
                tokens=column([token for some in tokens.values() for token in some]),
                counts=b"" if all(len(some) == 1 for some in tokens.values()) else column([*map(len, tokens.values())]),
                finished=tuple(finished),
            )
        )

    def send(self, message: Outputs) -> None:
        if self._inline:
            message, stopped = self.texts.outputs(message)
            self.stopped += stopped
        self.transport.from_core(0, encode(message))
