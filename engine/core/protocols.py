"""What the core asks of the rooms it doesn't know: built and injected by engine.launch."""

from concurrent.futures import Future
from typing import Any, Protocol

from engine.messages import AddRequest, Outputs


class Executor(Protocol):
    """Runs steps on the ranks, in the order they were submitted."""

    def submit(self, step: bytes) -> "Future[None]":
        """Hand over an encoded StepMessage: the forward pass starts as soon as the steps before it are done."""
        ...

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":
        """Sample a submitted step, under `masks` for rows that need the host; resolves to an encoded StepResult."""
        ...

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]":
        """Have the ranks do what isn't a step, between steps; a RedlineError is the caller's."""
        ...

    def shutdown(self) -> None:
        """End the workers; what is in flight may be lost."""
        ...


class InlineFrontEnd(Protocol):
    """Tokenises and writes texts within the core's loop, as V0 did; see `engine.frontend.inline`."""

    def add(self, message: AddRequest) -> AddRequest:
        """Make tokens of the request's text; a RedlineError ends this request only."""
        ...

    def outputs(self, outputs: Outputs) -> tuple[Outputs, tuple[int, ...]]:
        """Add the texts; gives also the requests that a stop string ended, which the core must abort.

        The end of those is among `finished` already; all that the core sends about requests goes through here.
        """
        ...
