"""Interfaces of the parts that the core uses but does not import. engine.launch builds them and passes them in."""

from concurrent.futures import Future
from typing import Any, Protocol

from engine.messages import AddRequest, Outputs


class Executor(Protocol):
    """Runs steps on the ranks, in the order in which they were submitted."""

    def submit(self, step: bytes) -> "Future[None]":
        """Submit an encoded StepMessage; its forward pass starts as soon as the steps before it are done."""
        ...

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":
        """Sample a submitted step, before the next one is submitted; resolves to an encoded StepResult.

        `masks` is an encoded `engine.grammar.StepMasks`, or empty. Slots without a mask may sample any token.
        """
        ...

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]":
        """Call a method on all ranks, between steps. The future raises RedlineError if the caller can fix the cause."""
        ...

    def shutdown(self) -> None:
        """End the workers; steps in flight may be lost."""
        ...


class InlineFrontEnd(Protocol):
    """Tokenizes and detokenizes within the core's loop, as V0 did; see `engine.frontend.inline_front_end`."""

    detokenizes: bool  # False: only multimodal inputs are handled in the loop

    def process(self, message: AddRequest) -> AddRequest:
        """Process multimodal inputs that were sent as their bytes; a RedlineError ends this request only."""
        ...

    def add(self, message: AddRequest) -> AddRequest:
        """Tokenize the request's text, and place its multimodal inputs; a RedlineError ends this request only."""
        ...

    def outputs(self, outputs: Outputs) -> tuple[Outputs, tuple[int, ...]]:
        """Add the texts; also returns the requests that a stop string ended, which the core has to abort.

        The returned outputs already report these requests as finished. All outputs about requests pass through here.
        """
        ...
