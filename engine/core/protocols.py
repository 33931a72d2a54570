"""What the core asks of the rooms it doesn't know: built and injected by engine.launch."""

from concurrent.futures import Future
from typing import Protocol


class Executor(Protocol):
    """Runs steps on the ranks, in the order they were submitted."""

    def submit(self, step: bytes) -> "Future[None]":
        """Hand over an encoded StepMessage: the forward pass starts as soon as the steps before it are done."""
        ...

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]":
        """Sample a submitted step, under `masks` for rows that need the host; resolves to an encoded StepResult."""
        ...

    def shutdown(self) -> None:
        """End the workers; what is in flight may be lost."""
        ...
