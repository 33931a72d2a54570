"""The order of steps, which all runners share: each is sampled before the next one is computed."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch

from engine.columns import int32s
from engine.messages import StepMessage, decode_copying_step
from engine.worker.kv_blocks import KVBlocks
from engine.worker.rank_protocol import Features
from engine.worker.slots import StepBatch

T = TypeVar("T")


class StepRunner(ABC, Generic[T]):
    """Computes steps as messages come, and executes calls between them.

    A subclass computes a step in `_advance`, and takes it in `sample`. T: what it keeps of a step besides the batch.

    Args:
        calls: by method.
        blocks: of the KV cache; None: none are ever copied.
    """

    def __init__(self, calls: Mapping[str, Callable[..., Any]], blocks: KVBlocks | None = None):
        self.blocks = blocks
        self._calls = calls if blocks is None else {**calls, **blocks.calls}
        self._pending: tuple[StepBatch, T] | None = None
        self._following: deque[StepMessage] = deque()  # later steps of a burst

    @torch.inference_mode()
    def call(self, method: str, arguments: dict[str, Any]) -> Any:
        """Execute a call between two steps. A RedlineError is returned to its caller."""
        return self._calls[method](**arguments)

    @torch.inference_mode()
    def forward(self, message: bytes) -> None:
        """Apply a step message and compute the model. Its steps must be sampled before the next message."""
        if self._pending is not None and self.waits_to_be_sampled:
            raise RuntimeError(f"step {self._pending[0].step} hasn't been sampled")
        if self._following:
            raise RuntimeError(f"step {self._following[0].step} hasn't been sampled")
        first = decode_copying_step(message)
        if first.block_copies:
            assert self.blocks is not None, "this worker copies no KV blocks"
            self.blocks.copy(int32s(first.block_copies, 3))
        self._following.extend(first.later_steps())
        self._pending = self._advance(first)

    def put_features(self, features: Features) -> None:
        """Keep the features of an input until it is encoded. A rank without an encoder has no use for them."""

    @property
    def waits_to_be_sampled(self) -> bool:
        return self._pending is not None and len(self._pending[0].logits_at) > 0

    def close(self) -> None:
        """Called after the last step."""

    def _take(self, step: int) -> tuple[StepBatch, T]:
        """The step that is to be sampled. Later steps of a burst are computed here."""
        if self._pending is None and self._following:
            self._pending = self._advance(self._following.popleft())
        if self._pending is None or self._pending[0].step != step:
            raise RuntimeError(f"step {step} hasn't run")
        taken, self._pending = self._pending, None
        return taken

    @abstractmethod
    def _advance(self, message: StepMessage) -> tuple[StepBatch, T]:
        """Compute the model for a step."""
